"""INT8 graphs through TorchInductor: oneDNN's int8 kernels, built in one process and run in another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from onecard.backends import get_backend
from onecard.backends.packing import Constant, Packings, load_constant
from onecard.backends.tensors import TensorStore
from onecard.calibration.bench import Bench
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.recipe import Recipe
from onecard.spec import Spec, TensorSpec, parse_spec
from onecard.transforms.int8 import dynamic_int8, static_int8
from tests.unit.backends.small_models import assert_right_elsewhere as assert_elsewhere
from tests.unit.backends.small_models import build, cnn, eager, inputs_for, sizes_of, target_for

pytest.importorskip("torchao")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs g++, which is not here")
STEP = 0.02  # one rounding step that falls the other way moves an answer by less


def attention() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    spec = parse_spec(["x: float32[B,S,32], B=1..8, S=1..16"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", "S", 32)),))
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return FlatModule(layer, positional(("x",))).eval(), spec


def mlp() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    spec = parse_spec(["x: float32[B,32], B=1..8"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", 10)),))
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
    return FlatModule(layers, positional(("x",))).eval(), spec


MODELS = {"cnn": cnn, "attention": attention, "mlp": mlp}
KERNELS = {"cnn": {"qconv": 2, "qlinear": 1}, "attention": {"qlinear": 4}, "mlp": {"qlinear": 2}}


def int8(name: str, scheme: str = "int8") -> tuple[FlatModule, Spec]:
    flat, spec = MODELS[name]()
    largest = {symbol: rng.high for symbol, rng in spec.symbols.items()}
    bench = Bench(spec, "cpu", inputs_for(spec, **dict.fromkeys(largest, 2)), inputs_for(spec, 5, **largest))
    return (static_int8 if scheme == "int8" else dynamic_int8)(flat, bench), spec


def assert_int8_kernels(folder: Path, expected: dict[str, int]) -> None:
    code = (folder / "graph.py").read_text()
    assert {k: code.count(f"torch.ops.onednn.{k}_pointwise") for k in expected} == expected
    assert "_mkl_linear" not in code
    assert "mkldnn._linear" not in code
    packed = [c for c in json.loads((folder / "graph.json").read_text())["constants"] if c["pack"]]
    assert len(packed) == sum(expected.values())
    assert all("-int8-" in c["tensor"]["key"] for c in packed)


def assert_close(module: FlatModule, spec: Spec, inputs: dict[str, Tensor], answer: dict[str, Tensor]) -> None:
    for name, wanted in eager(module, spec, inputs).items():
        assert (answer[name] - wanted).norm() / wanted.norm() < STEP


@pytest.mark.parametrize(("name", "scheme"), [("cnn", "int8"), ("attention", "int8"), ("mlp", "int8_dynamic")])
def test_one_graph_serves_every_size_in_another_process(name, scheme, tmp_path):
    module, spec = int8(name, scheme)
    target = dataclasses.replace(target_for(Recipe("inductor", "", (scheme,)), spec, tmp_path), shared=tmp_path)
    folder = tmp_path / "dynamic"
    build(module, target, folder, **dict.fromkeys(spec.symbols, 3))
    assert_int8_kernels(folder, KERNELS[name])
    assert_elsewhere(module, target, folder, **dict.fromkeys(spec.symbols, 5))
    runner = get_backend("inductor").load(folder, target)
    for sizes in sizes_of(spec):
        inputs = inputs_for(spec, 7, **sizes)
        assert_close(module, spec, inputs, runner(inputs))
    runner.close()


def test_static_buckets_share_their_weights_and_load_elsewhere(tmp_path):
    # Of at least two rows: inductor turns a tiny product with a single row into plain loops.
    module, spec = int8("cnn")
    recipe = Recipe("inductor", "", ("int8",), True)
    targets = [dataclasses.replace(target_for(recipe, spec, tmp_path, B=b), shared=tmp_path) for b in (2, 4)]
    for target in targets:
        folder = tmp_path / str(target.bucket["B"])
        build(module, target, folder)
        assert_int8_kernels(folder, KERNELS["cnn"])
    keys = [
        {c["tensor"]["key"] for c in json.loads((tmp_path / b / "graph.json").read_text())["constants"] if c["pack"]}
        for b in ("2", "4")
    ]
    assert keys[0] == keys[1]
    for target in targets:
        assert_elsewhere(module, target, tmp_path / str(target.bucket["B"]), **target.bucket)


def test_a_constant_says_how_it_was_packed_and_only_known_operators_are_called(tmp_path):
    store = TensorStore(tmp_path, {})
    weight, scales = torch.randint(-127, 127, (4, 3, 3, 3), dtype=torch.int8), torch.rand(4)
    rest = (None, 0.5, 3, [1, 1], [1, 1], [1, 1], 1, [2, 3, 8, 8])
    constant = Constant("w", store.add(weight), "onednn.qconv_prepack", rest, ((0, store.add(scales)),))
    store.save()
    constant = msgspec.json.decode(msgspec.json.encode(constant), type=Constant)
    memo: dict = {}
    packed = load_constant(constant, store, "cpu", memo)
    assert packed.layout == torch._mkldnn
    assert load_constant(constant, store, "cpu", memo) is packed
    for name in ("aten.relu", "onednn.qconv_pointwise", "aten.fake_prepack", "os.system"):
        with pytest.raises(ValueError, match="unknown packing operator"):
            load_constant(msgspec.structs.replace(constant, pack=name), store, "cpu", {})
    with pytest.raises(Unsupported, match="opaque layout"):
        Packings().save("w", packed, store)
