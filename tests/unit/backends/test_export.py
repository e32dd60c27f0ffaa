import msgspec
import pytest
import torch

from onecard.backends.export import export_program
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.recipe import Recipe
from onecard.spec import Range, parse_spec
from tests.unit.backends.small_models import cnn, encoder, inputs_for, target_for


def flat(function, *names):
    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    return FlatModule(Model(), positional(names)).eval()


def test_examples_of_size_one_do_not_fix_a_dimension(tmp_path):
    module, spec = encoder()
    program = export_program(module, inputs_for(spec, B=1, S=1), target_for(Recipe("aoti"), spec, tmp_path))
    inputs = inputs_for(spec, B=5, S=9)
    torch.testing.assert_close(program.module()(*inputs.values()), module(*inputs.values()))


def test_a_range_of_one_size_is_static(tmp_path):
    module, spec = encoder()
    spec = msgspec.structs.replace(spec, symbols={"B": Range(1, 1), "S": Range(1, 32)})
    program = export_program(module, inputs_for(spec, B=1, S=4), target_for(Recipe("aoti"), spec, tmp_path))
    assert len(program.range_constraints) == 1


def test_a_bucket_has_no_dynamic_dimension(tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("aoti", static=True), spec, tmp_path, B=4)
    assert not export_program(module, inputs_for(spec, B=4), target).range_constraints


def test_inference_tensors_can_be_examples(tmp_path):
    module, spec = cnn()
    with torch.inference_mode():
        inputs = {"image": torch.zeros(2, 3, 32, 32)}
        assert export_program(module, inputs, target_for(Recipe("aoti"), spec, tmp_path)).range_constraints


def test_two_symbols_of_one_size_stay_apart(tmp_path):
    spec = parse_spec(["x: float32[B,S], B=1..9, S=1..9"])
    module = flat(lambda x: x * 2, "x")
    program = export_program(module, {"x": torch.ones(3, 3)}, target_for(Recipe("aoti"), spec, tmp_path))
    assert program.module()(torch.ones(2, 7))[0].shape == (2, 7)


FIXED = {
    "broadcast against 4": lambda x: x + torch.ones(4, 1),
    "a multiple of 4": lambda x: x.view(-1, 8),
    "reshape of 4": lambda x: x.reshape(4, 6) * 2,
}


@pytest.mark.parametrize("function", FIXED.values(), ids=FIXED)
def test_a_model_that_fixes_a_dimension_is_refused(function, tmp_path):
    spec = parse_spec(["x: float32[B,6], B=1..64"])
    with pytest.raises(Unsupported) as refused:
        export_program(flat(function, "x"), {"x": torch.ones(4, 6)}, target_for(Recipe("aoti"), spec, tmp_path))
    assert "static" in refused.value.cure


def test_dimensions_related_by_the_model_are_inferred(tmp_path):
    spec = parse_spec(["x: float32[B,S], B=1..8, S=2..16"])
    module = flat(lambda x: x[:, 1:] * 2, "x")
    program = export_program(module, {"x": torch.ones(2, 4)}, target_for(Recipe("aoti"), spec, tmp_path))
    assert program.module()(torch.ones(1, 9))[0].shape == (1, 8)


def test_data_dependent_models_are_refused_with_a_reason(tmp_path):
    spec = parse_spec(["x: float32[B,6], B=1..64"])
    module = flat(lambda x: x * 2 if x.sum() > 0 else x, "x")
    with pytest.raises(Unsupported, match=r"torch\.export cannot trace") as refused:
        export_program(module, {"x": torch.ones(4, 6)}, target_for(Recipe("aoti"), spec, tmp_path))
    assert "\n" not in refused.value.detail
