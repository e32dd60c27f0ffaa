import msgspec
import pytest
import torch

from onecard.backends import get_backend
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.models.onnx_module import OnnxModule
from onecard.recipe import Recipe
from onecard.spec import TensorSpec, parse_spec
from tests.unit.backends.small_models import (
    MODELS,
    assert_right,
    assert_right_elsewhere,
    build,
    cnn,
    encoder,
    inputs_for,
    sizes_of,
    target_for,
)

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_every_size(name, tmp_path, capfd):
    module, spec = MODELS[name]()
    target = target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path)
    build(module, target, tmp_path / "made", **{"B": 1} if name == "cnn" else {"B": 1, "S": 8})
    assert_right(module, target, tmp_path / "made", sizes_of(spec))
    assert capfd.readouterr().out == ""


def test_static_graph_in_a_new_process(tmp_path):
    module, spec = encoder()
    target = target_for(Recipe("onnxruntime", "cpu", static=True), spec, tmp_path, B=2, S=16)
    build(module, target, tmp_path / "made")
    assert_right_elsewhere(module, target, tmp_path / "made", B=2, S=16)


def test_an_onnx_file_is_copied(tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path)
    build(module, target, tmp_path / "first", B=2)

    file = tmp_path / "first" / "model.onnx"
    build(FlatModule(OnnxModule(file), positional(("image",))), target, tmp_path / "second", B=2)
    assert (tmp_path / "second" / "model.onnx").read_bytes() == file.read_bytes()
    assert_right(module, target, tmp_path / "second", [{"B": 3}])


def test_openvino_takes_an_onnx_file_by_its_names(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    module, spec = encoder()
    build(module, target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path), tmp_path / "first", B=2, S=8)
    original = OnnxModule(tmp_path / "first" / "model.onnx")
    target = target_for(Recipe("openvino"), spec, tmp_path)
    build(FlatModule(original, positional(original.input_names)), target, tmp_path / "second", B=2, S=8)
    assert_right(module, target, tmp_path / "second", [{"B": 1, "S": 1}, {"B": 3, "S": 7}])


def test_an_output_whose_size_no_symbol_names(tmp_path):
    class Shortened(torch.nn.Module):
        def forward(self, x):
            return x[:, 1:] * 2, x.sum(1)

    spec = parse_spec(["x: float32[B,S], B=1..4, S=2..16"])
    outputs = (TensorSpec("output_0", "float32", ("B", "output_0_1")), TensorSpec("output_1", "float32", ("B",)))
    spec = msgspec.structs.replace(spec, outputs=outputs)
    module = FlatModule(Shortened(), positional(("x",))).eval()
    target = target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path)
    build(module, target, tmp_path / "made", B=2, S=4)
    assert_right(module, target, tmp_path / "made", [{"B": 1, "S": 2}, {"B": 4, "S": 9}])


def test_bfloat16_inputs_are_bound_or_refused(tmp_path):
    spec = parse_spec(["x: bfloat16[B,4], B=1..4"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", 4)),))

    class ToFloat(torch.nn.Module):
        def forward(self, x):
            return x.float() * 2

    module = FlatModule(ToFloat(), positional(("x",))).eval()
    target = target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path)
    (tmp_path / "made").mkdir()
    x = torch.randn(3, 4).bfloat16()
    get_backend("onnxruntime").build(module, {"x": x}, tmp_path / "made", target)
    answer = get_backend("onnxruntime").load(tmp_path / "made", target)({"x": x})
    torch.testing.assert_close(answer["output"], x.float() * 2)


@pytest.mark.parametrize("mode", ["cuda", "tensorrt"])
def test_unavailable_without_the_gpu_build(mode, tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    _, spec = cnn()
    backend = get_backend("onnxruntime")
    verdict = backend.available(target_for(Recipe("onnxruntime", mode), spec, tmp_path, "cuda:0"))
    assert verdict is not None
    assert verdict.reason == "unavailable"
    assert "onnxruntime-gpu" in verdict.cure
    on_cpu = backend.available(target_for(Recipe("onnxruntime", mode), spec, tmp_path))
    assert on_cpu is not None
    assert "does not run on cpu" in on_cpu.detail


def test_inputs_reach_the_graph_by_name(tmp_path):
    module, spec = encoder()
    target = target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path)
    build(module, target, tmp_path / "made", B=2, S=8)
    runner = get_backend("onnxruntime").load(tmp_path / "made", target)
    inputs = inputs_for(spec, B=2, S=9)
    swapped = dict(reversed(inputs.items()))
    torch.testing.assert_close(runner(swapped), runner(inputs))


def test_nodes_bear_the_names_of_their_layers(tmp_path):
    import onnx

    module, spec = cnn()
    build(module, target_for(Recipe("onnxruntime", "cpu"), spec, tmp_path), tmp_path / "made", B=2)
    nodes = onnx.load(str(tmp_path / "made" / "model.onnx")).graph.node
    weighted = [node.name.rpartition("/")[0] for node in nodes if node.op_type in ("Conv", "Gemm")]
    assert weighted == ["features.0", "features.3", "head"]  # not of the batch norms that are folded into them
    assert len({node.name for node in nodes}) == len(nodes)
    assert not any(node.metadata_props for node in nodes)


def test_int8_is_refused_where_it_gains_nothing(tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("onnxruntime", "cuda", ("int8",)), spec, tmp_path, "cuda:0")
    with pytest.raises(Unsupported, match="gains nothing from 'int8'"):
        build(module, target, tmp_path / "made", B=2)
