"""Cutting a graph: in order, about equal, the same answers, and an honest no to what cannot be streamed."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.spec import parse_spec
from onecard.streaming.capture import capture
from onecard.streaming.residency import Budget, plan_residency
from onecard.streaming.split import Split, split_program
from onecard.streaming.table import parts_table
from tests.unit.streaming.stacks import LENGTH, decoder, tied_cnn, weight_bytes

IDS = f"ids: int64[B,{LENGTH}], B=1..4"


def split(module: nn.Module, spec: str, part_bytes: int) -> Split:
    parsed = parse_spec([spec])
    flat = FlatModule(module, positional(tuple(t.name for t in parsed.inputs))).eval()
    return split_program(capture(flat, parsed, "cpu").program, part_bytes)


def test_every_operator_runs_once_and_every_weight_is_there():
    module = decoder()
    cut = split(module, IDS, 20_000)
    assert len(cut.parts) > 4
    assert [p.name for p in cut.parts] == [f"part-{i:03d}" for i in range(len(cut.parts))]
    assert sum(weight.nbytes for weight in cut.weights.values()) == weight_bytes(module)
    assert list(cut.cuts) == sorted(cut.cuts)
    steps = sum(n.op.startswith("call_") for part in cut.parts for n in part.module.graph.nodes)
    assert steps == cut.cuts[-1]


def test_the_parts_are_about_equal_and_within_their_size():
    cut = split(decoder(12), IDS, 60_000)
    sizes = [sum(part.values()) for part in cut.sizes]
    assert max(sizes) <= 60_000
    assert min(sizes[1:-1]) > max(sizes) / 2  # at the ends stand the embeddings alone


def test_a_layer_larger_than_the_size_is_a_part_of_its_own():
    cut = split(decoder(), IDS, 1)
    largest = max(cut.weights.values(), key=lambda weight: weight.nbytes)
    assert all(part.weights == (largest.name,) for part in cut.parts if largest.name in part.weights)


def test_a_tied_weight_is_one_weight_of_two_parts():
    cut = split(decoder(), IDS, 20_000)
    tied = [name for name in cut.weights if "embed" in name or "head" in name]
    assert len(tied) == 1
    users = [index for index, part in enumerate(cut.parts) if tied[0] in part.weights]
    assert users == [0, len(cut.parts) - 1]


def test_the_same_cuts_give_the_same_parts():
    spec = parse_spec([IDS])
    program = capture(FlatModule(decoder(), positional(("ids",))).eval(), spec, "cpu").program
    first = split_program(program, 20_000)
    again = split_program(program, 1, first.cuts)
    assert [p.weights for p in again.parts] == [p.weights for p in first.parts]
    with pytest.raises(Unsupported, match="cannot be cut"):
        split_program(program, 1, (1, 2, 3))


def test_values_die_after_their_last_use():
    cut = split(decoder(), IDS, 20_000)
    alive = set(cut.inputs)
    for part, dead in zip(cut.parts, cut.dies, strict=True):
        assert all(ref.name in alive for ref in part.takes if ref.kind == "value")
        alive |= set(part.gives)
        alive -= set(dead)
    assert alive == {ref.name for ref in cut.outputs}


def test_capturing_leaves_the_module_as_it_was():
    module = decoder()
    before = {name: id(t) for name, t in (*module.named_parameters(), *module.named_buffers())}
    split(module, IDS, 20_000)
    assert {name: id(t) for name, t in (*module.named_parameters(), *module.named_buffers())} == before
    assert module.head.weight is module.embed.weight


def test_a_module_without_values_is_cut_alike():
    with torch.device("meta"):
        announced = type(decoder())()
    announced.head.weight = announced.embed.weight
    assert split(announced.eval(), IDS, 20_000).cuts == split(decoder(), IDS, 20_000).cuts


def test_channels_last_weights_keep_their_strides():
    cut = split(tied_cnn(), "image: float32[B,3,8,8], B=1..4", 5000)
    weight = cut.weights["shared.weight"]
    assert weight.stride == tuple(tied_cnn().shared.weight.stride())


class Measured(nn.Module):
    """Holds two large values at once, and no third."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.drop = nn.Linear(4, 1000, bias=False), nn.Linear(1000, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, 4]
        wide = self.lift(x)
        return self.drop(wide.relu())


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_activations_are_counted_at_the_largest_size(part_bytes):
    cut = split(Measured(), "x: float32[B,4], B=1..50", part_bytes)
    rows = 50 * 4
    assert rows * 2000 <= cut.activation_bytes <= rows * 2000 + 2 * rows * 4


def test_answers_that_the_caller_still_holds_are_counted():
    cut = split(nn.Linear(4, 1000, bias=False), "x: float32[B,4], B=1..50", 1)
    assert cut.activation_bytes == 2 * 50 * 1000 * 4 + 50 * 4 * 4


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x + self.seen


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.linear.weight


@pytest.mark.parametrize(
    ("module", "reason"), [(Counting(), "changes"), (Forgetful(), "cannot trace"), (Gives(), "one of its weights")]
)
def test_what_cannot_be_streamed_says_why(module, reason):
    with pytest.raises(Unsupported) as caught:
        split(module.eval(), "x: float32[2,4]", 100)
    assert reason in caught.value.detail


def test_the_table_shows_layers_and_places():
    cut = split(decoder(), IDS, 20_000)
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(parts_table(cut, plan_residency(cut.sizes, Budget(150_000))))
    shown = captured.get()
    for word in ("part-000", "blocks.0", "copied", "stays", "slots"):
        assert word in shown
    assert "inner." not in shown
