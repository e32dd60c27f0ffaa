"""The order of copies and computations, on a link that copies as late and spoils slots as early as it may."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onecard.errors import DeviceMemoryError, EngineClosedError
from onecard.models.flat import FlatModule, positional
from onecard.spec import parse_spec
from onecard.streaming.capture import capture
from onecard.streaming.link import HostLink
from onecard.streaming.residency import Budget, plan_residency
from onecard.streaming.runner import StreamRunner, StreamWarning
from onecard.streaming.split import split_program
from onecard.streaming.store import ModuleSource
from tests.unit.streaming.stacks import LENGTH, VOCABULARY, decoder, ids, weight_bytes

SPEC = [f"ids: int64[B,{LENGTH}], B=1..4"]
BUDGETS = {"all stays": 10**7, "some stays": 175_000, "two slots": 137_000, "one slot": 103_000}


class RecordingLink(HostLink):
    """A copy spoils its slot when it is asked for, and is done when it is waited for; everything is written down.

    So what is read too late, or without waiting, is not a number but NaN.
    """

    def __init__(self, limit_bytes: int = 10**9, pins: bool = True) -> None:
        super().__init__(limit_bytes)
        self.log: list[tuple[object, ...]] = []
        self.pinned: set[int] = set()
        self.finished = 0
        self._pins = pins
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._clock = 0

    def pin(self, buffer: Tensor) -> bool:
        if self._pins:
            self.pinned.add(buffer.data_ptr())
        return self._pins

    def unpin(self, buffer: Tensor) -> None:
        self.pinned.remove(buffer.data_ptr())

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def copy(self, buffer: Tensor, source: Tensor, after: object) -> int:
        buffer.fill_(0xFF)
        copied = self._tick()
        self._pending[copied] = (buffer, source)
        self.log.append(("copy", buffer.data_ptr(), after, copied))
        return copied

    def wait(self, copied: int) -> None:
        for earlier in sorted(t for t in self._pending if t <= copied):  # copies run in order
            buffer, source = self._pending.pop(earlier)
            buffer.copy_(source)
        self.log.append(("wait", copied, self._tick()))

    def mark(self) -> int:
        self.log.append(("mark", self._tick()))
        return self._clock

    def finish(self) -> None:
        self.finished += 1

    def note(self, forward: Callable[..., object], index: int) -> Callable[..., object]:
        def noted(*args: object) -> object:
            self.log.append(("compute", index, self._tick()))
            return forward(*args)

        return noted


def make(module: nn.Module, budget: int, link: HostLink | None = None, slots: int = 2) -> StreamRunner:
    flat = FlatModule(module, positional(("ids",))).eval()
    split = split_program(capture(flat, parse_spec(SPEC), "cpu").program, 14_000)
    if isinstance(link, RecordingLink):
        for index, part in enumerate(split.parts):
            part.module.forward = link.note(part.module.forward, index)
    residency = plan_residency(split.sizes, Budget(budget, split.activation_bytes, slots))
    link = link or HostLink(budget - split.activation_bytes)
    return StreamRunner(split, residency, ModuleSource(module, None, consume=False), link)


@torch.inference_mode()
def wanted(module: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
    answer = module(given)
    return answer["logits"], answer["state"]


def same(answers: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, e) for a, e in zip(answers, expected, strict=True))


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_answers_are_the_same_to_the_last_bit(budget, slots):
    module = decoder()
    runner = make(module, budget, slots=slots)
    for rows in (2, 1, 4, 3, 2):
        assert same(runner([ids(rows)]), wanted(module, ids(rows)))


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_device_memory_stays_within_the_budget(budget):
    module = decoder()
    link = HostLink(budget)
    runner = make(module, budget, link)
    for _ in range(3):
        runner([ids()])
    assert link.peak_bytes == link.allocated_bytes == runner.residency.weight_bytes
    assert link.peak_bytes + runner.residency.budget.activation_bytes <= budget
    if budget < weight_bytes(module):
        assert runner.residency.pass_bytes > 0


@pytest.mark.parametrize("budget", [v for k, v in BUDGETS.items() if k != "all stays"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_slot_is_written_after_its_use_and_read_after_its_copy(budget, slots):
    module, link = decoder(), RecordingLink()
    runner = make(module, budget, link, slots)
    for rows in (2, 3, 1):
        assert same(runner([ids(rows)]), wanted(module, ids(rows)))
    streamed = runner.residency.streamed
    copies = {event[3]: event for event in link.log if event[0] == "copy"}
    used: dict[object, int] = {}  # slot: when it was last computed from
    slot: object = None
    for event in link.log:
        if event[0] == "wait":
            slot = copies[event[1]][1]
        elif event[0] == "compute" and event[1] in streamed:
            used[slot] = event[2]
        elif event[0] == "copy":
            assert event[2] > used.get(event[1], 0), "the copy does not wait for the computation before it"
    assert len(copies) == 3 * len(streamed) + runner.residency.slots


def test_copies_run_ahead_across_parts_and_calls():
    link = RecordingLink()
    runner = make(decoder(), BUDGETS["two slots"], link)
    streamed, slots = runner.residency.streamed, runner.residency.slots
    runner([ids()])
    runner([ids()])
    copied = waited = 0
    for event in link.log:
        copied += event[0] == "copy"
        waited += event[0] == "wait"
        if event[0] == "compute" and event[1] in streamed:
            assert copied == waited - 1 + slots  # its own copy and those of the parts after it, the next call's too
    assert copied == 2 * len(streamed) + slots


class Fragile(nn.Module):
    """A decoder that cannot look up its last token, whose failure comes from within a part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = decoder()
        self.late = nn.Embedding(VOCABULARY - 1, 8)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        answer = self.inner(ids)
        return {"logits": answer["logits"], "state": answer["state"] + self.late(ids).sum()}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_after_a_failure_within_a_part_the_next_call_is_right(budget):
    module, link = Fragile().eval(), RecordingLink()
    runner = make(module, budget, link)
    for _ in range(2):
        with pytest.raises(IndexError):
            runner([torch.full((1, LENGTH), VOCABULARY - 1)])
        assert same(runner([ids(3)]), wanted(module, ids(3)))


def test_a_failure_amid_the_parts_leaves_no_old_weights():
    module, link = decoder(), RecordingLink()
    runner = make(module, BUDGETS["two slots"], link)
    middle = runner._split.parts[len(runner._split.parts) // 2].module
    right, middle.forward = middle.forward, lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        runner([ids()])
    middle.forward = right
    assert same(runner([ids()]), wanted(module, ids()))


def test_no_room_for_activations_is_said_and_gone_with_a_smaller_batch():
    module = decoder()
    runner = make(module, BUDGETS["two slots"])
    first = runner._split.parts[0].module
    right = first.forward

    def narrow(*args: object) -> object:
        if any(isinstance(a, Tensor) and a.dtype == torch.int64 and len(a) > 1 for a in args):
            raise torch.OutOfMemoryError("no room for 3 bytes")
        return right(*args)

    first.forward = narrow
    with pytest.raises(DeviceMemoryError, match=r"no room for 3 bytes.*smaller batch"):
        runner([ids(2)])
    assert same(runner([ids(1)]), wanted(module, ids(1)))


def test_threads_take_turns_and_each_gets_its_own_answer():
    module = decoder()
    runner = make(module, BUDGETS["two slots"], RecordingLink())
    expected = {rows: wanted(module, ids(rows)) for rows in (1, 2, 3, 4)}
    wrong: list[int] = []

    def call(rows: int) -> None:
        wrong.extend(rows for _ in range(10) if not same(runner([ids(rows)]), expected[rows]))

    threads = [threading.Thread(target=call, args=(rows,)) for rows in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Views(nn.Module):
    """Views of weights go from the first part to the last, and out; so does an input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        turned = self.table.weight.t()
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": x @ turned, "state": turned[:, :3]}


def test_a_view_of_a_weight_outlives_its_slot_and_belongs_to_the_caller():
    module, link = Views().eval(), RecordingLink()
    activations = make(module, 10**7).residency.budget.activation_bytes
    for budget, streamed in ((10**7, False), (activations + 80_000, True)):  # the table alone takes 76,800 bytes
        runner = make(module, budget, link)
        assert (0 in runner.residency.streamed) == streamed
        answers = runner([ids()])
        assert same(answers, wanted(module, ids()))
        kept = [a.clone() for a in answers]
        with torch.inference_mode():
            answers[1].zero_()
        again = runner([ids()])
        assert same(again, tuple(kept))


def test_answers_are_not_overwritten_by_the_next_call():
    runner = make(decoder(), BUDGETS["two slots"])
    first = runner([ids(2)])
    before = [a.clone() for a in first]
    runner([ids(2) + 1 - 1])
    runner([torch.zeros(2, LENGTH, dtype=torch.int64)])
    assert same(first, tuple(before))


def test_closing_releases_everything():
    link = RecordingLink()
    runner = make(decoder(), BUDGETS["some stays"], link)
    runner([ids()])
    assert link.pinned and link.allocated_bytes
    finished = link.finished
    runner.close()
    runner.close()
    assert not link.pinned and link.allocated_bytes == 0
    assert link.finished == finished + 1  # nothing is unlocked while a copy may read it
    with pytest.raises(EngineClosedError, match="closed"):
        runner([ids()])


def test_a_runner_that_is_dropped_unlocks_its_memory():
    link = RecordingLink()
    runner = make(decoder(), BUDGETS["some stays"], link)
    assert link.pinned
    del runner
    gc.collect()
    assert not link.pinned


def test_a_failure_while_loading_releases_everything():
    link = RecordingLink(limit_bytes=90_000)
    with pytest.raises(DeviceMemoryError, match="above the limit"):
        make(decoder(), BUDGETS["some stays"], link)
    assert link.allocated_bytes == 0 and not link.pinned


def test_memory_that_cannot_be_locked_is_said_once_and_works():
    module = decoder()
    with pytest.warns(StreamWarning, match="could not be locked") as caught:
        runner = make(module, BUDGETS["two slots"], RecordingLink(pins=False))
    assert len(caught) == 1 and Path(caught[0].filename).name
    assert not runner.is_pinned
    assert same(runner([ids()]), wanted(module, ids()))
