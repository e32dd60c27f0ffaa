import collections
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from onecard.backends import get_backend, nncf_quantize
from onecard.backends.base import Target
from onecard.backends.export import quiet_export
from onecard.backends.openvino import _compile, _convert
from onecard.backends.openvino_layers import layer_nodes, name_layers
from onecard.backends.signal_stack import kept_signal_stack
from onecard.calibration.bench import NO_ROWS_CURE, Bench, Judgement
from onecard.errors import Unsupported, UsageError
from onecard.models.flat import FlatModule, positional
from onecard.recipe import Recipe
from onecard.spec import Spec, TensorSpec, parse_spec
from tests.unit.backends.small_models import build, cnn, eager, encoder, inputs_for, sizes_of, target_for

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
pytest.importorskip("nncf", reason="nncf is not installed")

ROWS = 6


class Stages(nn.Module):
    """A stem, a depthwise and a grouped convolution with batch norms of either sign, and three alike linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, 1, 1, groups=2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, image):
        x = image
        for layer, norm in zip((self.stem, self.depthwise, self.grouped), self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        x = x.mean((2, 3))
        q, k, v = self.q(x), self.k(x), self.v(torch.relu(x))
        return v + q * k


class FixedBatch(nn.Module):
    """Its batch cannot vary once it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8 * 64, 10)

    def forward(self, image):
        return self.head(torch.relu(self.conv(image)).view(int(image.shape[0]), 8 * 64))


def of_image(model: nn.Module, outputs: int) -> tuple[FlatModule, Spec]:
    spec = parse_spec(["image: float32[B,3,32,32], B=1..8"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", outputs)),))
    return FlatModule(model, positional(("image",))).eval(), spec


def error_of(run, module: FlatModule, spec: Spec, inputs: dict[str, torch.Tensor]) -> float:
    answer, wanted = run(inputs), eager(module, spec, inputs)
    return max(((answer[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)


def bench_for(module: FlatModule, spec: Spec, needed: float = 0.1, rows: int = ROWS, **length: int) -> Bench:
    """Rows, and a judge that passes errors up to ``needed``; what is recorded can be found in ``memo["found"]``."""
    calibration = inputs_for(spec, 5, B=rows, **length) if rows else None
    memo: dict[str, list] = {"found": [], "progress": []}

    def judge(run) -> Judgement:
        error = error_of(run, module, spec, inputs_for(spec, 6, B=8, **length))
        return Judgement(error, None, error <= needed)

    return Bench(
        spec,
        "cpu",
        {},
        calibration,
        judge if rows else None,
        progress=memo["progress"].append,
        record=memo["found"].append,
        memo=memo,
    )


def target_with(scheme: str, spec: Spec, tmp_path: Path, bench: Bench | None, mode: str = "", **bucket: int) -> Target:
    recipe = Recipe("openvino", mode, (scheme,), static=bool(bucket))
    return dataclasses.replace(target_for(recipe, spec, tmp_path, **bucket), bench=bench)


def kernels(folder: Path) -> collections.Counter:
    """(layer type, precision) of every convolution and product that OpenVINO would run."""
    with kept_signal_stack():
        compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    pairs = [(i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in infos if "layerType" in i]
    return collections.Counter((kind, what) for kind, what in pairs if kind in ("Convolution", "FullyConnected"))


def converted(module: FlatModule, spec: Spec, tmp_path: Path):
    with quiet_export():
        return _convert(openvino, module, inputs_for(spec, B=2), target_for(Recipe("openvino"), spec, tmp_path))


def weight_types(folder: Path) -> set[str]:
    constants = (op for op in read(folder).get_ops() if op.get_type_name() == "Constant")
    return {op.get_element_type().get_type_name() for op in constants}


def read(folder: Path):
    return openvino.Core().read_model(str(folder / "model.xml"))


def test_int8_runs_every_layer_in_8_bits_at_every_size(tmp_path):
    module, spec = cnn()
    bench = bench_for(module, spec)
    target = target_with("int8", spec, tmp_path, bench)
    build(module, target, tmp_path / "made", B=2)
    runner = get_backend("openvino").load(tmp_path / "made", target)
    assert all(error_of(runner, module, spec, inputs_for(spec, 7, **size)) < 0.05 for size in sizes_of(spec))
    assert set(kernels(tmp_path / "made")) == {("Convolution", "u8"), ("FullyConnected", "u8")}
    (found,) = bench.memo["found"]
    assert found.layers == 3
    assert found.rows == ROWS
    assert [t.method for t in found.trials] == ["minmax", "percentile", "bias"]
    assert found.method == min(found.trials, key=lambda t: t.error).method
    assert f"int8 minmax: calibrating {ROWS}/{ROWS}" in bench.memo["progress"]
    judged = min(trial.error for trial in found.trials)
    assert error_of(runner, module, spec, inputs_for(spec, 6, B=8)) == pytest.approx(judged, rel=1e-5)
    lower = get_backend("openvino").load(tmp_path / "made", target_with("int8", spec, tmp_path, None, "bf16"))
    assert error_of(lower, module, spec, inputs_for(spec, 7, B=3)) < 0.06


def test_buckets_share_one_settled_transformer(tmp_path):
    module, spec = encoder()
    bench = bench_for(module, spec, S=20)  # no bucket's length
    for size in ({"B": 8, "S": 32}, {"B": 1, "S": 8}):
        target = target_with("int8", spec, tmp_path, bench, **size)
        folder = tmp_path / f"made{size['S']}"
        build(module, target, folder)
        runner = get_backend("openvino").load(folder, target)
        assert error_of(runner, module, spec, inputs_for(spec, 8, **size)) < 0.05
        assert {what for _, what in kernels(folder)} <= {"u8", "i8"}
    (found,) = bench.memo["found"]
    assert found.layers == 8
    assert [t.method for t in found.trials] == ["minmax", "percentile"]


def test_weights_alone_need_no_rows(tmp_path):
    module, spec = encoder()
    target = target_with("int8_weights", spec, tmp_path, bench_for(module, spec, rows=0))
    build(module, target, tmp_path / "made", B=2, S=8)
    assert "u8" in weight_types(tmp_path / "made")
    groups = {}
    for scheme in ("int8_weights", "int8_dynamic"):  # they differ only in how the artifact is loaded
        target = target_with(scheme, spec, tmp_path, None)
        runner = get_backend("openvino").load(tmp_path / "made", target)
        assert error_of(runner, module, spec, inputs_for(spec, 8, B=3, S=7)) < 0.05
        compiled = _compile(openvino, str(tmp_path / "made" / "model.xml"), target)
        groups[scheme] = int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
    assert groups == {"int8_weights": 0, "int8_dynamic": 32}


@pytest.mark.parametrize(("rows", "methods"), [(0, []), (ROWS, ["round", "scale"])])
def test_int4_in_groups_is_smaller_than_int8(rows, methods, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    module, spec = of_image(model, 10)
    sizes = {}
    for scheme in ("int8_weights", "int4_weights"):
        bench = bench_for(module, spec, 0.5, rows)
        target = target_with(scheme, spec, tmp_path, bench)
        build(module, target, tmp_path / scheme, B=2)
        sizes[scheme] = (tmp_path / scheme / "model.bin").stat().st_size
    runner = get_backend("openvino").load(tmp_path / "int4_weights", target)
    assert error_of(runner, module, spec, inputs_for(spec, 8, B=3)) < 0.5
    assert "i4" in weight_types(tmp_path / "int4_weights")
    assert sizes["int4_weights"] < 0.6 * sizes["int8_weights"]
    assert [t.method for t in bench.memo["found"][0].trials] == methods


@pytest.mark.parametrize(("scheme", "methods"), [("int8", 3), ("int8_weights", 1)])
def test_the_worst_layers_stay_in_fp32_until_the_judge_passes(scheme, methods, tmp_path):
    torch.manual_seed(0)
    module, spec = of_image(Stages(), 16)
    runs = []

    def judge(run) -> Judgement:
        runs.append(run)
        return Judgement(error_of(run, module, spec, inputs_for(spec, 6, B=8)), None, len(runs) == methods + 2)

    bench = dataclasses.replace(bench_for(module, spec), judge=judge)
    build(module, target_with(scheme, spec, tmp_path, bench), tmp_path / "made", B=2)
    (found,) = bench.memo["found"]
    assert found.layers == 6
    worst = [error.layer for error in found.sensitivity]
    assert set(worst) == {"stem", "depthwise", "grouped", "q", "k", "v"}
    assert found.kept == tuple(worst[:2])
    in_fp32 = sum(node.weight is not None for node in layer_nodes(read(tmp_path / "made")))
    assert in_fp32 == 2
    if scheme == "int8":
        assert sum(n for (_, what), n in kernels(tmp_path / "made").items() if what == "f32") == 2


def test_layers_are_known_by_their_weights(tmp_path):
    torch.manual_seed(0)
    module, spec = of_image(Stages(), 16)
    with torch.no_grad():
        module.inner.norms[1].weight[3] = 0.0  # folded, this channel is zero and has no direction
    model = converted(module, spec, tmp_path)
    nodes = layer_nodes(model)
    names = name_layers(nodes, module)
    assert set(names) == {"stem", "depthwise", "grouped", "q", "k", "v"}
    assert sorted(node for own in names.values() for node in own) == sorted(node.name for node in nodes)
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    assert kinds[names["stem"][0]] == "Convolution"
    assert kinds[names["grouped"][0]] == kinds[names["depthwise"][0]] == "GroupConvolution"
    assert [names[name][0].split("/")[0] for name in "qkv"] == ["linear", "linear_1", "linear_2"]


def test_a_model_of_fixed_batch_is_calibrated_at_its_bucket(tmp_path):
    torch.manual_seed(0)
    module, spec = of_image(FixedBatch(), 10)
    bench = bench_for(module, spec)
    for batch in (5, 2):  # the judge has 8 rows
        target = target_with("int8", spec, tmp_path, bench, B=batch)
        build(module, target, tmp_path / f"made{batch}")
        runner = get_backend("openvino").load(tmp_path / f"made{batch}", target)
        assert error_of(runner, module, spec, inputs_for(spec, 8, B=batch)) < 0.05
        assert set(kernels(tmp_path / f"made{batch}")) == {("Convolution", "u8"), ("FullyConnected", "u8")}
    assert len(bench.memo["found"]) == 1


def test_a_slow_model_is_tried_with_one_method(tmp_path, monkeypatch):
    monkeypatch.setattr(nncf_quantize, "_PATIENCE_S", 0.0)
    module, spec = cnn()
    bench = bench_for(module, spec)
    build(module, target_with("int8", spec, tmp_path, bench), tmp_path / "made", B=2)
    (found,) = bench.memo["found"]
    assert found.method == "minmax"
    assert [t.passed for t in found.trials] == [True, False, False]
    assert any("was not tried" in note for note in found.notes)


def test_an_onnx_file_is_quantised_under_its_own_names(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onecard.models.onnx_module import OnnxModule

    module, spec = cnn()
    build(module, target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path), tmp_path / "onnx", B=2)
    original = FlatModule(OnnxModule(tmp_path / "onnx" / "model.onnx"), positional(("image",))).eval()
    bench = bench_for(module, spec, 0.0)
    target = target_with("int8", spec, tmp_path, bench)
    build(original, target, tmp_path / "made", B=2)
    assert error_of(get_backend("openvino").load(tmp_path / "made", target), module, spec, inputs_for(spec, B=3)) < 0.05
    assert bench.memo["found"][0].layers == 3
    assert not bench.memo["found"][0].sensitivity


def test_no_rows_is_unsupported(tmp_path):
    module, spec = cnn()
    with pytest.raises(Unsupported) as caught:
        build(module, target_with("int8", spec, tmp_path, bench_for(module, spec, rows=0)), tmp_path / "made", B=2)
    assert caught.value.cure == NO_ROWS_CURE


@pytest.mark.parametrize("scheme", sorted(nncf_quantize.SCHEMES))
def test_nothing_to_quantise_is_unsupported(scheme, tmp_path):
    module, spec = of_image(nn.Sequential(nn.ReLU(), nn.Flatten()), 3072)
    with pytest.raises(Unsupported, match="no layer"):
        build(module, target_with(scheme, spec, tmp_path, bench_for(module, spec)), tmp_path / "made", B=2)


def test_int4_of_convolutions_alone_is_unsupported(tmp_path):
    module, spec = of_image(nn.Sequential(nn.Conv2d(3, 8, 32), nn.Flatten()), 8)
    with pytest.raises(Unsupported, match="left every weight"):
        build(module, target_with("int4_weights", spec, tmp_path, bench_for(module, spec)), tmp_path / "made", B=2)


def test_without_a_bench_it_is_the_callers_mistake(tmp_path):
    module, spec = cnn()
    with pytest.raises(UsageError, match="built"):
        build(module, target_with("int8", spec, tmp_path, None), tmp_path / "made", B=2)


_QUIETLY = """
import logging, os, sys, warnings
warnings.simplefilter("error")
from pathlib import Path
import dataclasses
from onecard.calibration.bench import Bench
from tests.unit.backends.small_models import *
before = logging.getLoggerClass()
module, spec = cnn()
os.chdir(sys.argv[1])
for scheme in ("int8", "int8_weights"):
    target = target_for(Recipe("openvino", "", (scheme,)), spec, Path(sys.argv[2]))
    bench = Bench(spec, "cpu", {}, inputs_for(spec, 5, B=4))
    build(module, dataclasses.replace(target, bench=bench), Path(sys.argv[2]) / scheme, B=2)
assert "nncf" in sys.modules
assert "openvino_telemetry" not in sys.modules
assert logging.getLoggerClass() is before
assert not os.listdir(), os.listdir()
"""
_LOADED = """
import sys
sys.modules["nncf"] = None
from pathlib import Path
from tests.unit.backends.small_models import *
module, spec = cnn()
place = Path(sys.argv[2])
target = target_for(Recipe("openvino", "", ("int8",)), spec, place)
verdict = get_backend("openvino").available(target)
assert (verdict.reason, verdict.cure) == ("unavailable", "pip install 'onecard[openvino]'")
assert get_backend("openvino").available(target_for(Recipe("openvino"), spec, place)) is None
assert get_backend("openvino").load(place / "int8", target)(inputs_for(spec, B=3))["output"].shape == (3, 10)
"""


def test_quiet_without_telemetry_and_loaded_without_nncf(tmp_path):
    (tmp_path / "cwd").mkdir()
    for code in (_QUIETLY, _LOADED):
        command = [sys.executable, "-c", code, str(tmp_path / "cwd"), str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout == done.stderr == ""
