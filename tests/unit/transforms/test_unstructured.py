"""Unstructured pruning, the baseline: half of the weights are zero, the size and the work are as before."""

import pytest
import torch
from torch import nn

from onecard.calibration.bench import Bench, Judgement
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.spec import parse_spec
from onecard.training.cost import measure_cost
from onecard.transforms.unstructured import unstructured, zero_share
from tests.unit.backends.small_models import cnn, eager, inputs_for


def bench_for(module, spec, found, judge=None):
    return Bench(spec, "cpu", inputs_for(spec, B=2), judge=judge, record=found.append)


def test_half_of_every_layer_is_zero_and_nothing_is_gained():
    module, spec = cnn()
    before = measure_cost(module, spec, "cpu")
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    found = []
    pruned = unstructured(module, bench_for(module, spec, found))
    assert zero_share(pruned) == pytest.approx(0.5)
    assert measure_cost(pruned, spec, "cpu") == before
    assert set(dict(pruned.named_parameters())) == set(weights)  # no masks are left
    for name, parameter in pruned.named_parameters():
        kept = parameter != 0
        assert torch.equal(parameter[kept], weights[name][kept])
        if parameter.dim() == 1:
            assert torch.equal(parameter, weights[name])
            continue
        assert weights[name][~kept].abs().max() <= weights[name][kept].abs().min()
    assert found[0].scheme == "unstructured" and found[0].layers == 3
    assert "baseline" in found[0].notes[0]


def test_the_trial_that_is_judged_is_the_one_that_is_built():
    module, spec = cnn()
    inputs, answers, found = inputs_for(spec, 7, B=3), [], []

    def judge(run):
        with torch.inference_mode():
            answers.append(run(inputs)["output"])
        return Judgement(0.2, None, True)

    original = eager(module, spec, inputs)["output"]
    pruned = unstructured(module, bench_for(module, spec, found, judge))
    assert torch.equal(answers[0], eager(pruned, spec, inputs)["output"])
    assert not torch.allclose(answers[0], original)
    assert found[0].trials[0].error == 0.2


def test_a_model_without_layers_is_refused():
    spec = parse_spec(["x: float32[B,4], B=1..4"])
    with pytest.raises(Unsupported, match="no layer"):
        unstructured(FlatModule(nn.ReLU(), positional(("x",))), Bench(spec, "cpu", {"x": torch.randn(2, 4)}))
