import pytest
import torch
from torch import nn

from onecard.backends import get_backend
from onecard.backends.export import export_program, quiet_export
from onecard.backends.quantized_program import float_weights
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.recipe import Recipe
from tests.unit.backends.small_models import build, cnn, eager, encoder, inputs_for, target_for
from tests.unit.backends.test_nncf_quantize import error_of, kernels, weight_types

pytest.importorskip("openvino", reason="openvino is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")

SIZES = {"cnn": {"B": 2}, "encoder": {"B": 2, "S": 8}}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def pt2e(module: FlatModule, spec, target, is_dynamic: bool = False, **size: int) -> FlatModule:
    """The module as torchao's pt2e leaves it: int8 weights, a pair of operators at every activation."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    config = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
    program = export_program(module, inputs_for(spec, **size), target)
    with quiet_export():
        graph = prepare_pt2e(program.module(), X86InductorQuantizer().set_global(config))
        for seed in range(3):
            graph(*inputs_for(spec, seed, **size).values())
        return FlatModule(convert_pt2e(graph), positional(tuple(t.name for t in spec.inputs)))


def sources(program) -> list[torch.fx.Node]:
    """What each dequantising operator takes."""
    return [node.args[0] for node in program.graph.nodes if "decomposed.dequantize" in str(node.target)]


@pytest.mark.parametrize(("name", "make"), [("cnn", cnn), ("encoder", encoder)])
def test_openvino_computes_what_pt2e_does(name, make, tmp_path):
    module, spec = make()
    target = target_for(Recipe("openvino"), spec, tmp_path)
    trained = pt2e(module, spec, target, **SIZES[name])
    build(trained, target, tmp_path / "made", **SIZES[name])
    runner = get_backend("openvino").load(tmp_path / "made", target)
    for batch in (1, 2, 5):
        inputs = inputs_for(spec, 7, **(SIZES[name] | {"B": batch}))
        assert error_of(runner, trained, spec, inputs) < 1e-3 < error_of(runner, module, spec, inputs)
    assert "i8" in weight_types(tmp_path / "made")
    assert ("FullyConnected", "u8") in kernels(tmp_path / "made")


def test_a_program_without_codes_is_itself(tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("openvino"), spec, tmp_path)
    program = export_program(module, inputs_for(spec, B=2), target)
    assert float_weights(program, inputs_for(spec, B=2), target) is program


def test_the_rewritten_program_gives_the_same_answers(tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("openvino"), spec, tmp_path, B=2)
    trained, inputs = pt2e(module, spec, target, B=2), inputs_for(spec, 3, B=2)
    program = export_program(trained, inputs, target)
    rewritten = float_weights(program, inputs, target)
    assert [source.op for source in sources(program)].count("placeholder") == 3  # the weights' codes
    assert all("quantize_per" in str(source.target) for source in sources(rewritten))
    torch.testing.assert_close(rewritten.module()(inputs["image"])[0], eager(trained, spec, inputs)["output"])


def test_scales_found_at_run_time_are_unsupported(tmp_path):
    module, spec = cnn()
    module = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), positional(("image",))).eval()
    target = target_for(Recipe("openvino"), spec, tmp_path, B=2)
    trained = pt2e(module, spec, target, is_dynamic=True, B=2)
    with pytest.raises(Unsupported, match="known in advance"):
        build(trained, target, tmp_path / "made")
