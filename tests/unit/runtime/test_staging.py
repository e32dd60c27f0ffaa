"""Stages give every caller its own rows, whatever the order in which a card does what it was told."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from onecard.errors import EngineClosedError, EngineError, SpecError
from onecard.kernels import normalize
from onecard.runtime import entries, roads
from onecard.runtime.entries import Source
from onecard.runtime.staging import CpuStage, Flight, Stage
from onecard.runtime.staging_cuda import CudaOptions, CudaStage
from onecard.spec import Bucket, Spec, TensorSpec, parse_spec
from tests.unit.runtime.simulated_card import SimulatedCard
from tests.unit.runtime.staged_batches import INGESTS, SIZES, Batches, Captured, Scorer, same

CARD_SEEDS = range(25)


@pytest.fixture(autouse=True)
def _small_rows_go_straight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roads, "DIRECT_BYTES", 64)


@pytest.fixture(autouse=True)
def _pictures_are_normalised_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated card records torch's calls; what NumPy does it cannot put off."""
    monkeypatch.setattr(normalize, "_LONE_THREAD_BYTES", 0)


class Plain:
    """A model of one function."""

    def __init__(self, spec: Spec, call: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self.spec, self.device, self.call = spec, "cpu", call

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        return self.call(inputs)


def simulated(seed: int = 0, model: Scorer | None = None, depth: int = 3) -> CudaStage:
    return CudaStage(model or Scorer(), SIZES, INGESTS, CudaOptions(depth), SimulatedCard(seed))


def wrong_answers(stage: Stage, batches: Batches, count: int, careless: bool = False) -> int:
    """Fly batches, as many at once as there are slots; how many were answered wrong."""
    wrong = 0
    air: list[tuple[Flight, dict[str, Tensor]]] = []
    for _ in range(count):
        sources, rows, size, expected = batches.next()
        flight = stage.launch(sources, rows, size)
        if careless:
            flight._held.clear()
        air.append((flight, expected))
        while len(air) == stage.depth:
            wrong += not landed(*air.pop(0))
    return wrong + sum(not landed(*flight) for flight in air)


def landed(flight: Flight, expected: dict[str, Tensor]) -> bool:
    flight.wait()
    right = same(flight.outputs, expected)
    flight.release()
    return right


@pytest.mark.parametrize("seed", range(10))
def test_the_cpu_answers_every_batch(seed: int) -> None:
    assert wrong_answers(CpuStage(Scorer(), SIZES, INGESTS), Batches(seed, lambda t: t), 20) == 0


@pytest.mark.parametrize("model", [Scorer, Captured])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_card_answers_every_batch_in_any_order_that_its_events_allow(model: type[Scorer], depth: int) -> None:
    for seed in CARD_SEEDS:
        card = SimulatedCard(seed)
        stage = CudaStage(model(), SIZES, INGESTS, CudaOptions(depth, timings=seed % 2 == 0), card)
        assert wrong_answers(stage, Batches(seed, card.pin), 8) == 0, seed
        stage.close()


@pytest.mark.parametrize("stream", [1, 2], ids=["compute", "copy-out"])
def test_a_missing_event_would_be_seen(stream: int) -> None:
    cards = [SimulatedCard(seed, deaf=[stream]) for seed in CARD_SEEDS]
    wrong = [wrong_answers(CudaStage(Scorer(), SIZES, INGESTS, card=c), Batches(1, c.pin), 8) for c in cards]
    assert sum(map(bool, wrong)) > len(cards) // 4


def test_answers_given_up_too_early_would_be_seen() -> None:
    cards = [SimulatedCard(seed) for seed in CARD_SEEDS]
    stages = [CudaStage(Scorer(), SIZES, INGESTS, card=card) for card in cards]
    batches = [Batches(1, card.pin) for card in cards]
    wrong = [wrong_answers(*pair, 8, careless=True) for pair in zip(stages, batches, strict=True)]
    assert sum(map(bool, wrong)) > len(cards) // 4


def test_a_slot_given_back_too_early_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaStage, "_settle", lambda stage: None)
    wrong = 0
    for seed in CARD_SEEDS:
        batches, stage = Batches(seed, lambda t: t), simulated(seed, depth=1)
        for _ in range(3):
            stage.launch(*batches.next()[:3]).release()
        wrong += bool(wrong_answers(stage, batches, 3))
    assert wrong > len(CARD_SEEDS) // 4


def test_a_flight_that_nobody_waited_for_leaves_its_slot_clean() -> None:
    for seed in CARD_SEEDS:
        batches, stage = Batches(seed, lambda t: t), simulated(seed, depth=2)
        for _ in range(4):
            stage.launch(*batches.next()[:3]).release()
        assert wrong_answers(stage, batches, 4) == 0, seed


def test_a_launching_and_a_waiting_thread() -> None:
    for seed in range(6):
        card = SimulatedCard(seed)
        stage = CudaStage(Scorer(), SIZES, INGESTS, card=card)
        batches = Batches(seed, card.pin)
        flights: list[tuple[Flight, dict[str, Tensor]] | None] = []
        there = threading.Semaphore(0)
        right: list[bool] = []

        def complete(flights: list = flights, there: threading.Semaphore = there, right: list = right) -> None:
            while there.acquire() and (pair := flights.pop(0)) is not None:
                right.append(landed(*pair))

        thread = threading.Thread(target=complete)
        thread.start()
        for _ in range(30):
            sources, rows, size, expected = batches.next()
            flights.append((stage.launch(sources, rows, size), expected))
            there.release()
        flights.append(None)
        there.release()
        thread.join(60)
        assert right == [True] * 30


def test_launch_blocks_while_all_slots_are_in_use() -> None:
    batches, stage = Batches(0, lambda t: t), simulated(depth=2)
    air = [stage.launch(*batches.next()[:3]) for _ in range(2)]
    sources, rows, size, expected = batches.next()
    launched = threading.Event()
    flights: list[Flight] = []

    def launch() -> None:
        flights.append(stage.launch(sources, rows, size))
        launched.set()

    thread = threading.Thread(target=launch)
    thread.start()
    assert not launched.wait(0.2)
    air[0].release()
    assert launched.wait(30)
    thread.join()
    assert landed(flights[0], expected)
    air[1].release()


def test_closing_wakes_who_waits_and_keeps_the_answers_under_way() -> None:
    batches, stage = Batches(0, lambda t: t), simulated(depth=1)
    sources, rows, size, expected = batches.next()
    flight = stage.launch(sources, rows, size)
    refused: list[Exception] = []

    def launch() -> None:
        try:
            stage.launch(*batches.next()[:3])
        except EngineClosedError as error:
            refused.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    stage.close()
    thread.join(30)
    assert len(refused) == 1
    assert landed(flight, expected)
    with pytest.raises(EngineClosedError):
        stage.launch(*batches.next()[:3])


def test_a_launch_that_is_overtaken_by_closing_copies_nothing() -> None:
    class Closing(dict):
        def __getitem__(self, name: str) -> Tensor:
            stage.close()
            return super().__getitem__(name)

    model = Plain(parse_spec(["x: float32[B,3], B=1..8"]), dict)
    card = SimulatedCard()
    stage = CudaStage(model, [{"B": 8}], card=card)
    with pytest.raises(EngineClosedError):
        stage.launch([Source(Closing(x=torch.ones(8, 3)), 0, 8)], 8, {"B": 8})
    assert not card.copies


@pytest.mark.parametrize("seed", range(8))
def test_a_model_that_raises_costs_no_slot(seed: int) -> None:
    model = Scorer()
    batches, stage = Batches(seed, lambda t: t), simulated(seed, model)

    def fail() -> None:
        raise torch.OutOfMemoryError("no such luck")

    for _ in range(5):
        sources, rows, size, expected = batches.next()
        flight = stage.launch(sources, rows, size)
        model.before = fail
        with pytest.raises(torch.OutOfMemoryError, match="no such luck"):
            stage.launch(*batches.next()[:3])
        model.before = lambda: None
        assert landed(flight, expected)
    assert wrong_answers(stage, batches, 6) == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_failure_on_the_card_is_told_to_who_waits(seed: int) -> None:
    model = Scorer()
    card = SimulatedCard(seed)
    stage = CudaStage(model, SIZES, INGESTS, card=card)
    batches = Batches(seed, card.pin)

    def misfire() -> None:
        raise torch.AcceleratorError("illegal")

    for _ in range(4):
        model.before = lambda: card.streams[1].work.append(misfire)
        flight = stage.launch(*batches.next()[:3])
        model.before = lambda: None
        for _ in range(2):
            with pytest.raises(torch.AcceleratorError, match="illegal"):
                flight.wait()
        flight.release()
    assert wrong_answers(stage, batches, 6) == 0


def test_a_batch_that_no_slot_holds_is_refused_and_costs_none() -> None:
    source = Source({"x": np.zeros((9, 3), np.float32)}, 0, 4)
    model = Plain(parse_spec(["x: float32[B,3], B=1..64"]), dict)
    card = SimulatedCard()
    for stage in (CpuStage(model, [{"B": 8}]), CudaStage(model, [{"B": 8}], (), CudaOptions(1), card)):
        for _ in range(2):
            with pytest.raises(EngineError, match="108 bytes"):
                stage.launch([source, source], 8, {"B": 9})


def test_an_array_in_no_known_form_is_refused_and_costs_no_slot() -> None:
    batches, stage = Batches(0, lambda t: t), simulated(depth=1)
    sources, rows, size, _ = batches.next()
    bad = sources[0]._replace(inputs={**sources[0].inputs, "ids": np.zeros((9, 3), np.float64)})
    for _ in range(2):
        with pytest.raises(SpecError, match="'ids' is float64, expected ids: int64"):
            stage.launch([bad, *sources[1:]], rows, size)
    assert wrong_answers(stage, batches, 2) == 0


def test_a_caller_with_too_few_rows_is_refused() -> None:
    model = Plain(parse_spec(["x: float32[B,3], B=1..8"]), dict)
    short = Source({"x": np.zeros((2, 3), np.float32)}, 1, 2)
    for stage in (CpuStage(model, [{"B": 8}]), CudaStage(model, [{"B": 8}], card=SimulatedCard())):
        with pytest.raises(SpecError, match="'x' has 2 rows, expected 3 at least"):
            stage.launch([short, short], 4, {"B": 8})


@pytest.mark.parametrize("stranger", ["float64", ">f4"])
def test_whole_rows_lie_one_behind_the_other_whatever_was_there_before(stranger: str) -> None:
    model = Plain(parse_spec(["x: float32[B,3], B=1..8"]), lambda inputs: {"y": inputs["x"] * 1})
    stage = CpuStage(model, [{"B": 4}])
    rows = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
    for first, second in ((1, 3), (1, 1), (2, 2), (1, 1)):
        sources = [Source({"x": rows}, 0, first), Source({"x": rows}, first, second)]
        flight = stage.launch(sources, first + second, {"B": 4})
        expected = rows * (np.arange(4) < first + second)[:, None]
        np.testing.assert_array_equal(flight.outputs["y"].numpy(), expected)
        with pytest.raises(SpecError, match="expected x: float32"):
            stage.launch([sources[0], Source({"x": rows.astype(stranger)}, 0, 2)], first + 2, {"B": 4})


def test_an_entry_knows_each_of_more_sizes_than_it_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_MOST_SIZES", 3)
    (entry,) = entries.make_entries(parse_spec(["x: float32[B,S], B=1..8, S=1..8"]), ())
    for _ in range(2):
        for rows in range(1, 6):
            assert entry.shape({"B": rows, "S": 7}) == entry.shape({"S": 7, "B": rows}) == (rows, 7)


def test_callers_memory_lives_until_the_flight_was_waited_for() -> None:
    memory = torch.zeros(8, 3)
    model = Plain(parse_spec(["x: float32[B,3], B=1..8"]), lambda inputs: {"y": inputs["x"] + 1})
    card = SimulatedCard()
    stage = CudaStage(model, [{"B": 8}], card=card)
    flight = stage.launch([Source({"x": card.pin(memory)}, 0, 8)], 8, {"B": 8})
    alive = weakref.ref(memory)
    del memory
    gc.collect()
    assert alive() is not None
    flight.wait()
    gc.collect()
    assert alive() is None
    flight.release()


def test_registered_memory_is_read_in_place_until_it_is_forgotten() -> None:
    shared = np.arange(8 * 30, dtype=np.float32).reshape(8, 30)
    model = Plain(parse_spec(["x: float32[B,30], B=1..8"]), lambda inputs: {"y": inputs["x"] * 2})
    card = SimulatedCard()
    stage = CudaStage(model, [{"B": 8}], card=card)
    assert stage.register(shared)
    sources = [Source({"x": shared}, row, 2) for row in (0, 4)]
    flight = stage.launch(sources, 4, {"B": 8})
    assert card.copies[:2] == [240, 240]  # one for each caller
    flight.wait()
    assert torch.equal(flight.outputs["y"][:4], torch.from_numpy(shared[[0, 1, 4, 5]] * 2))
    flight.release()
    card.copies.clear()
    stage.launch(sources, 4, {"B": 8})
    stage.unregister(shared)
    stage.launch(sources, 4, {"B": 8})
    assert 480 in card.copies  # collected: one for both
    assert not stage.register(shared[:, ::2])
    stage.close()


def test_times_come_from_the_card() -> None:
    batches, stage = Batches(0, lambda t: t), simulated()
    flight = stage.launch(*batches.next()[:3])
    assert flight.timings.compute_s == 0
    flight.wait()
    assert flight.timings.gather_s > 0
    assert min(flight.timings[1:]) > 0
    flight.release()


def test_answers_of_a_size_that_the_spec_does_not_tell_grow_the_slot() -> None:
    spec = parse_spec(["x: float32[B], B=1..4"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("y", "float32", ("B", "y_1")),))
    for repeats in (1, 300):
        model = Plain(spec, lambda inputs, n=repeats: {"y": inputs["x"][:, None].repeat(1, n)})
        stage = CudaStage(model, [{"B": 4}], (), CudaOptions(1), SimulatedCard())
        for value in (1.0, 2.0):
            flight = stage.launch([Source({"x": torch.full((3,), value)}, 0, 3)], 3, {"B": 4})
            expected = torch.tensor([value] * 3 + [0.0])[:, None].repeat(1, repeats)
            assert landed(flight, {"y": expected})


def test_a_model_without_a_batch_dimension() -> None:
    spec = parse_spec(["x: float32[S,4], S=1..8", "scale: float32[]"])
    model = Plain(spec, lambda inputs: {"y": inputs["x"] * inputs["scale"]})
    card = SimulatedCard()
    for stage in (CpuStage(model, [{"S": 8}]), CudaStage(model, [{"S": 8}], card=card)):
        for length in (8, 3, 5):
            x = np.random.default_rng(length).normal(size=(length, 4)).astype(np.float32)
            flight = stage.launch([Source({"x": x, "scale": np.array(2.0, np.float32)}, 0, 1)], 1, {"S": 8})
            expected = torch.zeros(8, 4)
            expected[:length] = torch.from_numpy(x) * 2
            assert landed(flight, {"y": expected})


def test_a_caller_that_fills_the_batch_is_not_copied_on_the_cpu() -> None:
    seen: list[int] = []
    model = Plain(
        parse_spec(["x: float32[B,3], B=1..8"]),
        lambda inputs: seen.append(inputs["x"].data_ptr()) or {"y": inputs["x"] + 1},
    )
    stage = CpuStage(model, [{"B": 8}])
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    frozen = x.copy()
    frozen.flags.writeable = False
    for array in (x, frozen, torch.from_numpy(x), np.asfortranarray(x)):
        flight = stage.launch([Source({"x": array}, 2, 8)], 8, {"B": 8})
        assert landed(flight, {"y": torch.from_numpy(x[2:] + 1)})
    own = x[2:].ctypes.data
    assert [address == own for address in seen] == [True, False, True, False]


def test_answers_on_the_cpu_are_nobody_elses() -> None:
    model = Plain(
        parse_spec(["x: float32[B,3], B=1..8"]),
        lambda inputs: {
            "same": inputs["x"],
            "part": inputs["x"][:, 1:],
            "spread": inputs["x"].sum().expand(len(inputs["x"])),
        },
    )
    stage = CpuStage(model, [{"B": 8}])
    x = torch.ones(8, 3)
    whole = stage.launch([Source({"x": x}, 0, 8)], 8, {"B": 8})
    halves = stage.launch([Source({"x": x}, 0, 4), Source({"x": x}, 4, 4)], 8, {"B": 8})
    x.fill_(5)
    stage.launch([Source({"x": x}, 0, 4), Source({"x": x}, 4, 4)], 8, {"B": 8})
    for flight in (whole, halves):
        assert flight.owned
        assert flight.outputs["same"].eq(1).all()
        assert flight.outputs["part"].eq(1).all()
        flight.outputs["spread"][0] = 0
        assert flight.outputs["spread"].tolist() == [0.0, *[24.0] * 7]


def test_a_closed_cpu_stage_says_so() -> None:
    stage = CpuStage(Scorer(), SIZES)
    assert not stage.register(np.zeros(3))
    stage.unregister(np.zeros(3))
    stage.close()
    with pytest.raises(EngineClosedError):
        stage.launch([], 0, SIZES[0])
