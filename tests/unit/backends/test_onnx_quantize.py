import collections
import dataclasses
import math
import warnings
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from onecard.backends import get_backend
from onecard.calibration.bench import NO_ROWS_CURE, Bench, Judgement
from onecard.calibration.sensitivity import quantisable_layers
from onecard.errors import Unsupported, UsageError
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, positional
from onecard.models.onnx_module import OnnxModule
from onecard.recipe import Recipe
from onecard.spec import Spec, TensorSpec, parse_spec
from tests.unit.backends.small_models import build, eager, encoder, inputs_for, target_for

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

BACKEND = "onnxruntime"


class Residual(nn.Module):
    """A stem, a depthwise and a pointwise convolution around a shortcut, pooled into a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.point = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.last = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        return self.head(self.last(x + self.point(self.deep(x))).mean((2, 3)))


class Outlier(nn.Module):
    """One channel between ``a`` and ``b`` is 10,000 times larger than the rest, and divided again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.d = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.a.weight[0] *= 1e4
            self.b.weight[:, 0] /= 1e4

    def forward(self, image: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(torch.relu(self.b(self.a(image))))))


class Products(nn.Module):
    """What an encoder is made of, without attention: a norm, two products and a shortcut over [B, S, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.back = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.norm(x + self.back(torch.nn.functional.gelu(self.wide(x))))


def products() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    spec = parse_spec(["x: float32[B,S,64], B=1..8, S=1..32"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", "S", 64)),))
    return FlatModule(Products(), positional(("x",))).eval(), spec


def flat(inner: nn.Module, output: tuple[str | int, ...]) -> tuple[FlatModule, Spec]:
    spec = parse_spec(["image: float32[B,3,16,16], B=1..8"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", output),))
    return FlatModule(inner, positional(("image",))).eval(), spec


def residual() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, 16, 16))
    return flat(model, ("B", 10))


def outlier() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    return flat(Outlier(), ("B", 4, 16, 16))


def bench_for(module: FlatModule, spec: Spec, tmp_path: Path, limit: float = math.inf, **rows: int) -> Bench:
    """A bench with rows of ``rows`` sizes and a judge of the relative error; it records into ``memo['found']``."""
    data = inputs_for(spec, 5, **rows)
    wanted = eager(module, spec, data)

    def judge(run):
        answer = run(data)
        error = max(float((answer[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)
        return Judgement(error, None, error <= limit)

    found: list[Compression] = []
    work = tmp_path / "work"
    return Bench(spec, "cpu", data, data, judge, work=work, record=found.append, memo={"found": found})


def quantised(module: FlatModule, bench: Bench, scheme: str, tmp_path: Path, **bucket: int) -> Path:
    """Build, check that nothing stray is left, and give the artifact."""
    folder = tmp_path / ("made" + "".join(map(str, bucket.values())))
    target = target_for(Recipe(BACKEND, "cpu", (scheme,), bool(bucket)), bench.spec, tmp_path, **bucket)
    example = bucket or dict.fromkeys(bench.spec.symbols, 4)
    build(module, dataclasses.replace(target, bench=bench), folder, **example)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    return folder


def operators(folder: Path) -> collections.Counter[str]:
    """What the session runs, as the backend makes it."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder.parent / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(folder / "model.onnx"),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    return collections.Counter(n.op_type for n in onnx.load(str(folder.parent / "optimised.onnx")).graph.node)


def error_of(module: FlatModule, spec: Spec, folder: Path, tmp_path: Path, **sizes: int) -> float:
    inputs = inputs_for(spec, 9, **sizes)
    wanted = eager(module, spec, inputs)
    runner = get_backend(BACKEND).load(folder, target_for(Recipe(BACKEND, "cpu"), spec, tmp_path))
    answer = runner(inputs)
    runner.close()
    return max(float((answer[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlatModule, Bench, Path]:
    """The residual net in int8: module, bench and artifact."""
    module, spec = residual()
    tmp_path = tmp_path_factory.mktemp("whole")
    bench = bench_for(module, spec, tmp_path, B=8)
    return module, bench, quantised(module, bench, "int8", tmp_path)


def test_int8_runs_in_8_bits_from_end_to_end(whole, tmp_path):
    module, bench, folder = whole
    found = operators(folder)
    assert found["QLinearConv"] == 4
    assert found["QLinearAdd"] == found["QLinearGlobalAveragePool"] == found["QGemm"] == 1
    assert found["QuantizeLinear"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "DequantizeLinear", "Clip", "Relu"} & found.keys()
    assert 1e-4 < error_of(module, bench.spec, folder, tmp_path, B=3) < 0.1


def test_all_calibration_methods_are_tried_and_the_best_stands(whole):
    (found,) = whole[1].memo["found"]
    assert [t.method for t in found.trials] == ["minmax", "entropy", "percentile"]
    assert all(t.error < 1 for t in found.trials), found.notes
    assert found.method == min(found.trials, key=lambda t: t.error).method
    assert (found.layers, found.rows) == (5, 8)


def test_layers_are_the_modules(whole):
    from onecard.backends import onnx_quantize

    module, bench, folder = whole
    source = folder.parent / "work" / "float" / "model.onnx"
    work = onnx_quantize._prepared("int8", source, module, bench)
    assert tuple(work.layers) == quantisable_layers(module)
    assert str(Path.cwd()).encode() not in source.read_bytes()


def test_the_layer_that_loses_most_is_kept_in_floats(tmp_path):
    module, spec = outlier()
    bench = bench_for(module, spec, tmp_path, limit=0.05, B=8)
    folder = quantised(module, bench, "int8", tmp_path)
    (found,) = bench.memo["found"]
    assert found.kept
    assert found.kept[0] == "b"
    assert min(t.error for t in found.trials if not t.kept) > 0.1
    ran = operators(folder)
    assert ran["Conv"] + ran["FusedConv"] == len(found.kept)
    assert error_of(module, spec, folder, tmp_path, B=3) < 0.05


def test_every_bucket_is_the_settled_graph(tmp_path, capfd):
    import onnx

    module, spec = residual()
    bench = bench_for(module, spec, tmp_path, B=8)
    for rows in (8, 1):
        folder = quantised(module, bench, "int8", tmp_path, B=rows)
        shape = onnx.load(str(folder / "model.onnx")).graph.input[0].type.tensor_type.shape
        assert [dim.dim_value for dim in shape.dim] == [rows, 3, 16, 16]
        assert error_of(module, spec, folder, tmp_path, B=rows) < 0.1
    assert len(bench.memo["found"]) == 1
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize(
    ("scheme", "kernel", "limit"),
    [
        ("int8_dynamic", "DynamicQuantizeMatMul", 0.05),
        ("int8_weights", "MatMulNBits", 0.05),
        ("int4_weights", "MatMulNBits", 0.2),
        ("int8", "MatMulIntegerToFloat", 0.1),
    ],
)
def test_products(scheme, kernel, limit, tmp_path):
    module, spec = products()
    bench = bench_for(module, spec, tmp_path, B=4, S=16)
    folder = quantised(module, bench, scheme, tmp_path)
    ran = operators(folder)
    assert ran[kernel] == 2
    assert ran["SkipLayerNormalization"] == 1, "the shortcut is no longer fused with its norm"
    assert ran["DequantizeLinear"] == 0
    for sizes in ({"B": 1, "S": 1}, {"B": 3, "S": 7}, {"B": 8, "S": 32}):
        assert 1e-6 < error_of(module, spec, folder, tmp_path, **sizes) < limit


def test_an_encoder(tmp_path):
    module, spec = encoder()
    bench = bench_for(module, spec, tmp_path, B=4, S=16)
    folder = quantised(module, bench, "int8_dynamic", tmp_path)
    for sizes in ({"B": 1, "S": 1}, {"B": 3, "S": 7}, {"B": 8, "S": 32}):
        assert 1e-6 < error_of(module, spec, folder, tmp_path, **sizes) < 0.05


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weights"])
def test_weights_need_no_rows(scheme, tmp_path):
    module, spec = products()
    bench = dataclasses.replace(bench_for(module, spec, tmp_path, B=1, S=4), calibration=None, judge=None)
    quantised(module, bench, scheme, tmp_path)
    (found,) = bench.memo["found"]
    assert found.trials == ()
    assert found.layers > 0


def test_a_large_convolution_is_a_quarter_of_its_size(tmp_path):
    torch.manual_seed(0)
    module, spec = flat(nn.Sequential(nn.Conv2d(3, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3)), ("B", 128, 12, 12))
    folder = quantised(module, bench_for(module, spec, tmp_path, B=4), "int8", tmp_path)
    whole = (tmp_path / "work" / "float" / "model.onnx").stat().st_size
    assert whole / (folder / "model.onnx").stat().st_size > 3.8


def test_an_onnx_file_has_its_nodes_for_layers(tmp_path):
    module, spec = residual()
    build(module, target_for(Recipe(BACKEND, "cpu"), spec, tmp_path), tmp_path / "first", B=2)
    file = FlatModule(OnnxModule(tmp_path / "first" / "model.onnx"), positional(("image",)))
    bench = bench_for(module, spec, tmp_path, limit=0.0, B=8)  # nothing passes, and nothing can be ranked
    folder = quantised(file, bench, "int8", tmp_path)
    (found,) = bench.memo["found"]
    assert (found.layers, found.sensitivity, found.kept) == (5, (), ())
    assert operators(folder)["QLinearConv"] == 4


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "int8_weights"])
def test_weights_too_large_for_one_message_lie_beside_the_graph(scheme, tmp_path, monkeypatch):
    from onecard.backends import onnx_graph, onnx_quantize

    monkeypatch.setattr(onnx_graph, "EXTERNAL_DATA_BYTES", 0)
    monkeypatch.setattr(onnx_quantize, "EXTERNAL_DATA_BYTES", 0)
    module, spec = products()
    bench = bench_for(module, spec, tmp_path, B=4, S=16)
    for bucket in ({"B": 4, "S": 16}, {"B": 1, "S": 8}):
        target = target_for(Recipe(BACKEND, "cpu", (scheme,), True), spec, tmp_path, **bucket)
        folder = tmp_path / f"made{bucket['B']}"
        build(module, dataclasses.replace(target, bench=bench), folder)
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data"}
        assert error_of(module, spec, folder, tmp_path, **bucket) < 0.1


def test_a_detectors_boxes_stay_floats(tmp_path):
    """What decodes the last convolution's answer needs more than 256 steps."""

    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            grid = torch.arange(256.0).view(1, 1, 16, 16)
            return (torch.sigmoid(self.boxes(torch.relu(self.body(image)))) * 0.1 + grid).flatten(2)

    module, spec = flat(Boxes(), ("B", 4, 256))
    folder = quantised(module, bench_for(module, spec, tmp_path, B=8), "int8", tmp_path)
    ran = operators(folder)
    assert ran["QLinearConv"] == 2
    assert not {"QLinearAdd", "QLinearMul", "QLinearSigmoid"} & ran.keys()


def test_what_cannot_be_quantised_says_so(tmp_path):
    module, spec = residual()
    bench = bench_for(module, spec, tmp_path, B=8)
    with pytest.raises(Unsupported) as refusal:
        quantised(module, dataclasses.replace(bench, calibration=None, judge=None), "int8", tmp_path)
    assert refusal.value.cure == NO_ROWS_CURE

    def again(inner: nn.Module, scheme: str, name: str) -> None:
        made, its_spec = flat(inner, ("B", 3, 16, 16))
        place = tmp_path / name
        place.mkdir()
        quantised(made, bench_for(made, its_spec, place, B=4), scheme, place)

    with pytest.raises(Unsupported, match="no layer that int8 applies to"):
        again(nn.ReLU(), "int8", "relu")
    with pytest.raises(Unsupported, match="no layer that int4_weights applies to"):
        again(nn.Conv2d(3, 3, 1), "int4_weights", "conv")
    target = target_for(Recipe(BACKEND, "cpu", ("int8",)), spec, tmp_path)
    with pytest.raises(UsageError, match="when an artifact is built"):
        build(module, target, tmp_path / "no_bench", B=2)


@pytest.fixture(scope="module")
def trained() -> tuple[FlatModule, Spec]:
    """A program of quantise and dequantise operators, as training for INT8 ends in."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    with warnings.catch_warnings():  # torchao's quantiser uses what torch deprecates
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        original, spec = residual()
        example, shapes = (torch.randn(4, 3, 16, 16),), ({0: torch.export.Dim("B", min=1, max=8)},)
        program = torch.export.export(original.inner, example, dynamic_shapes=shapes).module()
        settings = x86.get_default_x86_inductor_quantization_config()
        prepared = prepare_pt2e(program, x86.X86InductorQuantizer().set_global(settings))
        for _ in range(4):
            prepared(torch.randn(8, 3, 16, 16))
        return FlatModule(convert_pt2e(prepared), positional(("image",))), spec


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("rows", "eight_bit", "limit"), [(True, 4, 0.05), (False, 2, 5e-3)])
def test_a_graph_trained_for_int8_is_fused(rows, eight_bit, limit, trained, tmp_path):
    module, spec = trained
    bench = bench_for(module, spec, tmp_path, B=8)
    folder = quantised(module, bench if rows else dataclasses.replace(bench, calibration=None), "qat", tmp_path)
    ran = operators(folder)
    assert ran["QLinearConv"] == eight_bit
    assert ran["Conv"] + ran["FusedConv"] == 4 - eight_bit
    assert ran["QGemm"] == 1
    assert error_of(module, spec, folder, tmp_path, B=3) < limit
