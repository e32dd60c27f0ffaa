"""Costs counted by hand, and targets as people write them."""

import pytest
import torch
from torch import Tensor, nn

from onecard.errors import UsageError
from onecard.models.live import load_live
from onecard.models.request import Request
from onecard.training.cost import Cost, CostTarget, measure_cost, parse_target, show_amount
from tests.unit.training.prune_models import IDS, Encoder, model_of


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, image: Tensor) -> Tensor:
        return self.two(self.one(self.norm(self.conv(image)).mean((2, 3))))


def test_costs_of_a_small_network_are_those_counted_by_hand():
    model = load_live(Tied(), Request(("image: float32[B,3,10,10], B=1..4",)))
    cost = measure_cost(model.flat, model.spec, "cpu", ("flops", "latency"))
    assert cost.flops == 2 * (8 * 3 * 9 * 100 + 2 * 8 * 8)
    assert cost.params == 8 * 3 * 9 + 2 * 8 + 8 * 8
    assert cost.size_bytes == 4 * (cost.params + 2 * 8) + 8  # running mean and variance, and int64 batches seen
    assert cost.latency_ms is not None and 0 < cost.latency_ms < 1000
    assert measure_cost(model.flat, model.spec, "cpu", ("params",)) == Cost(-1, cost.params, cost.size_bytes)


def test_the_fused_encoder_layer_is_counted_too():
    model = model_of(Encoder, IDS)
    before = torch.backends.mha.get_fastpath_enabled()
    flops = measure_cost(model.flat, model.spec, "cpu").flops
    tokens = 8  # a quarter of the longest sequence, rounded up to 8
    linear = 2 * tokens * (4 * 32 * 32 + 2 * 32 * 64)
    attention = 2 * 2 * tokens * tokens * 32
    assert flops == 2 * (linear + attention) + 2 * 32 * 4
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize(
    ("text", "measure", "value", "is_share"),
    [
        ("flops=0.5", "flops", 0.5, True),
        (" params = .4 ", "params", 0.4, True),
        ("latency=0.6", "latency", 0.6, True),
        ("latency=3ms", "latency", 3.0, False),
        ("size=5MB", "size", 5e6, False),
        ("params=2M", "params", 2e6, False),
        ("flops=1.5G", "flops", 1.5e9, False),
    ],
)
def test_targets_are_shares_or_amounts(text, measure, value, is_share):
    target = parse_target(text)
    assert (target.measure, target.is_share) == (measure, is_share)
    assert target.value == pytest.approx(value)
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "flops",
        "flops=",
        "speed=0.5",
        "flops=0",
        "flops=1",
        "flops=1.2",
        "flops=-0.5",
        "flops=nan",
        "flops=0.5=0.6",
        "size=5apples",
        "latency=0ms",
        "params=lots",
    ],
)
def test_targets_that_make_no_sense_are_refused(text):
    with pytest.raises(UsageError, match="target") as caught:
        parse_target(text)
    assert "flops=0.5" in caught.value.cure


def test_a_goal_is_an_amount_below_the_original():
    original = Cost(1000, 100, 400, 2.0)
    assert CostTarget("flops", 0.5, True).goal(original) == 500
    assert CostTarget("latency", 1.5, False).goal(original) == 1.5
    with pytest.raises(UsageError, match="met by the model as it is"):
        CostTarget("size", 400.0, False).goal(original)


def test_amounts_are_shown_as_people_write_them():
    shown = [show_amount(*pair) for pair in (("flops", 1.32e9), ("params", 4651000), ("size", 512), ("latency", 3.214))]
    assert shown == ["1.32G", "4.65M", "512B", "3.21ms"]
