"""TorchInductor's kernels, built in one process, run in another that has no compiler."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onecard.backends import get_backend
from onecard.backends.base import Target
from onecard.models.flat import FlatModule, positional
from onecard.recipe import Recipe
from onecard.spec import Spec, TensorSpec, parse_spec
from tests.unit.backends.small_models import assert_right, build, cnn, eager, encoder, inputs_for, target_for

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs g++, which is not here")

WITHOUT_COMPILER = """
import json, os, pathlib, shutil, sys, warnings
warnings.simplefilter("error")
import msgspec
from safetensors.torch import load_file, save_file
from onecard.backends import get_backend
from onecard.backends.base import Target
from onecard.recipe import Recipe
from onecard.spec import Spec
assert not any(map(shutil.which, ("g++", "gcc", "c++", "cc", "clang++", "ld", "sh")))
folder, recipe, spec, buckets = map(json.loads, sys.argv[1:])
tmp, memo = pathlib.Path(folder), {}
for label, bucket in buckets.items():
    kinds = msgspec.convert(recipe, Recipe), msgspec.convert(spec, Spec)
    target = Target(*kinds, "cpu", bucket, tmp, tmp / "shared", memo=memo)
    runner = get_backend("inductor").load(tmp / label, target)
    for case in sorted(tmp.glob(f"{label}-in-*")):
        save_file(runner(load_file(case)), tmp / case.name.replace("-in-", "-out-"))
    runner.close()
"""


class Picture(nn.Module):
    """A folded convolution, and a linear layer that holds nearly all of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 16 * 16, 512)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.conv(image).flatten(1))


def picture() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    spec = parse_spec(["image: float32[B,3,16,16], B=1..4"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", 512)),))
    return FlatModule(Picture(), positional(("image",))).eval(), spec


@dataclasses.dataclass
class Built:
    """Artifacts of one variant: a module, and a target by the name of its folder."""

    module: FlatModule
    spec: Spec
    folder: Path
    targets: dict[str, Target]
    sizes: list[int]


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def build_all(
    module: FlatModule, spec: Spec, folder: Path, buckets: list[dict[str, int] | None], **example: int
) -> Built:
    recipe = Recipe("inductor", static=buckets != [None])
    built = Built(module, spec, folder, {}, [])
    for index, bucket in enumerate(buckets):
        target = target_for(recipe, spec, folder, **(bucket or {}))
        build(module, target, folder / f"part{index}", **example)
        built.targets[f"part{index}"] = target
        built.sizes.append(size_of(folder))
    return built


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_all(*picture(), tmp_path_factory.mktemp("static"), [{"B": 4}, {"B": 1}])


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_all(*encoder(), tmp_path_factory.mktemp("dynamic"), [None], B=2, S=8)


def assert_right_without_compiler(built: Built, sizes: dict[str, list[dict[str, int]]]) -> None:
    """Load every artifact in one new process whose PATH is empty, and compare its answers."""
    cases = {f"{label}-in-{i}": s for label, many in sizes.items() for i, s in enumerate(many)}
    for name, size in cases.items():
        save_file(inputs_for(built.spec, 3, **size), built.folder / name)
    recipe = next(iter(built.targets.values())).recipe
    buckets = {label: target.bucket for label, target in built.targets.items()}
    values = str(built.folder), msgspec.to_builtins(recipe), msgspec.to_builtins(built.spec), buckets
    command = [sys.executable, "-c", WITHOUT_COMPILER, *map(json.dumps, values)]
    clean = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, env={**clean, "PATH": ""}, cwd=built.folder
    )
    assert done.returncode == 0, done.stderr
    for name, size in cases.items():
        answer = load_file(built.folder / name.replace("-in-", "-out-"))
        expected = eager(built.module, built.spec, inputs_for(built.spec, 3, **size))
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_static_buckets_run_without_a_compiler(static):
    assert_right_without_compiler(static, {"part0": [{"B": 4}], "part1": [{"B": 1}]})


def test_one_dynamic_artifact_serves_every_size_without_a_compiler(dynamic):
    sizes = [{"B": 1, "S": 1}, {"B": 3, "S": 7}, {"B": 8, "S": 32}, {"B": 1, "S": 32}, {"B": 8, "S": 1}]
    assert_right_without_compiler(dynamic, {"part0": sizes})


def test_buckets_share_their_weights(static):
    one, both = static.sizes
    assert one > 4 * 8 * 16 * 16 * 512
    assert both < 1.5 * one


class Attention(nn.Module):
    """Torch's own, which multiplies its weights with transposed rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        normal = self.norm(rows)
        return rows + self.attention(normal, normal, normal, need_weights=False)[0]


@pytest.mark.parametrize("bucket", [{"B": 4}, None], ids=["static", "dynamic"])
def test_weights_are_kept_once_however_the_rows_lie(bucket, tmp_path):
    torch.manual_seed(0)
    module = FlatModule(Attention(), positional(("rows",))).eval().requires_grad_(False)
    spec = parse_spec(["rows: float32[B,40,64], B=1..4"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", 40, 64)),))
    built = build_all(module, spec, tmp_path, [bucket], B=4)
    weights = sum(p.nbytes for p in module.parameters())
    assert weights < sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) < 1.5 * weights
    sizes = [{"B": 4}] if bucket else [{"B": 1}, {"B": 3}, {"B": 4}]
    assert_right(module, built.targets["part0"], tmp_path / "part0", sizes)


def test_answers_are_the_callers_own(static):
    assert_right(static.module, static.targets["part0"], static.folder / "part0", [{"B": 4}])


def test_an_unaligned_input_is_right_too(static):
    target = static.targets["part1"]
    runner = get_backend("inductor").load(static.folder / "part1", target)
    image = torch.randn(3 * 16 * 16 + 1)[1:].view(1, 3, 16, 16)
    expected = eager(static.module, static.spec, {"image": image})
    torch.testing.assert_close(runner({"image": image}), expected, rtol=1e-4, atol=1e-4)


def test_loading_leaves_the_environment_as_it_was(dynamic):
    before = dict(os.environ)
    runner = get_backend("inductor").load(dynamic.folder / "part0", dynamic.targets["part0"])
    assert dict(os.environ) == before
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner(inputs_for(dynamic.spec, B=1, S=1))


def test_an_artifact_holds_no_pickles(static):
    names = {
        p.suffix for p in static.folder.rglob("*") if p.is_file() and "-in-" not in p.name and "-out-" not in p.name
    }
    assert names <= {".py", ".json", ".so", ".safetensors"}


def test_a_packing_operator_that_is_not_onednns_is_refused(static, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(static.folder / "part1", folder)
    plan = json.loads((folder / "graph.json").read_bytes())
    plan["constants"][0] |= {"pack": "aten.system.default", "arguments": ["echo"]}
    (folder / "graph.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="unknown packing operator aten"):
        get_backend("inductor").load(folder, static.targets["part1"])


def test_needs_a_compiler_to_build(tmp_path, monkeypatch):
    _, spec = cnn()
    monkeypatch.setenv("PATH", str(tmp_path))
    verdict = get_backend("inductor").available(target_for(Recipe("inductor"), spec, tmp_path))
    assert verdict is not None
    assert verdict.reason == "unavailable"
    assert "g++" in verdict.cure
