"""The curve of models whose time per batch is a known function: orders and rules, not times, are compared."""

from __future__ import annotations

import math
import threading
import time

import msgspec
import pytest
import torch

from onecard.errors import EngineError, UsageError
from onecard.runtime.curve import LanePlace, batches_of, measure_curve
from onecard.runtime.engine import EngineOptions
from onecard.runtime.null import NullModel
from onecard.runtime.stages import open_stage
from onecard.spec import Bucket, Spec, TensorSpec, parse_spec
from onecard.tuning import LoadPoint


def spec(text: str = "x: float32[B,4], B=1..64") -> Spec:
    given = parse_spec([text])
    dims = ("B", 2) if "B" in given.symbols else (2,)
    return msgspec.structs.replace(given, outputs=(TensorSpec("y", "float32", dims),))


def slow(size: Bucket) -> float:
    return 2e-3 + 2e-5 * size["B"]


class OwnTime:
    """Stands in for the module ``time``: a clock of each thread's own, which goes on only while that thread sleeps.

    So a batch takes just as long as its model says, however busy the machine is.
    """

    def __init__(self) -> None:
        self._own = threading.local()

    def sleep(self, seconds: float) -> None:
        self._own.now = self.perf_counter() + seconds

    def perf_counter(self) -> float:
        return getattr(self._own, "now", 1.0)

    monotonic = staticmethod(time.monotonic)


@pytest.fixture
def exact(monkeypatch) -> None:
    own = OwnTime()
    monkeypatch.setattr("onecard.runtime.curve.time", own)
    monkeypatch.setattr("onecard.runtime.null.time", own)


def measure(models: list[NullModel], batches: tuple[int, ...], point_s: float = 0.1, **more) -> list[LoadPoint]:
    places = [LanePlace(model, open_stage(model, EngineOptions())) for model in models]
    try:
        return measure_curve(places, batches, point_s, more.pop("until", math.inf), **more)
    finally:
        for place in places:
            place.stage.close()


@pytest.mark.parametrize(
    ("model", "asked", "expected"),
    [
        (NullModel(spec()), (), (1, 2, 4, 8, 16, 32, 64)),
        (NullModel(spec("x: float32[B,4], B=3..50")), (), (4, 8, 16, 32, 50)),
        (NullModel(spec(), batches=(1, 6, 24)), (), (1, 6, 24)),
        (NullModel(spec()), (5, 3, 5), (3, 5)),
        (NullModel(spec("x: float32[4]")), (), (1,)),
    ],
    ids=["any size", "a range", "static sizes", "asked for", "no batch dimension"],
)
def test_which_batches(model, asked, expected):
    assert batches_of(model, asked) == expected


@pytest.mark.parametrize("rows", [0, 65])
def test_a_batch_out_of_range(rows):
    with pytest.raises(UsageError, match=f"batch {rows} cannot be run: this model takes 1 to 64 rows"):
        batches_of(NullModel(spec()), (rows,))


def test_larger_batches_give_more_and_take_longer(exact):
    points = measure([NullModel(spec(), delay_s=slow)], (32, 1, 8))
    assert [(p.batch, p.lanes, p.failed) for p in points] == [(1, 1, ""), (8, 1, ""), (32, 1, "")]
    rates = [p.rows_per_s for p in points]
    assert rates == sorted(rates)
    for point in points:
        takes_ms = 1e3 * slow({"B": point.batch})
        assert (point.p50_ms, point.p99_ms) == pytest.approx((takes_ms, takes_ms))
        assert point.rows_per_s == pytest.approx(1e3 * point.batch / takes_ms)
        assert point.batches >= 3 * int(0.1 / 3 / slow({"B": point.batch})), "three rounds of a third of the time each"


def test_no_batch_is_measured_to_be_quicker_than_it_was():
    for point in measure([NullModel(spec(), delay_s=slow)], (1, 32)):
        least_ms = 1e3 * slow({"B": point.batch})
        assert least_ms <= point.p50_ms <= point.p99_ms
        assert point.rows_per_s <= 1e3 * point.batch / least_ms
        assert point.batches >= 6


def test_what_lanes_give_is_added_up(exact):
    (one,) = measure([NullModel(spec(), delay_s=0.01)], (4,), 0.15)
    (two,) = measure([NullModel(spec(), delay_s=0.01), NullModel(spec(), delay_s=0.01)], (4,), 0.15)
    assert (one.lanes, two.lanes) == (1, 2)
    assert one.rows_per_s == pytest.approx(400)
    assert two.rows_per_s == pytest.approx(800)
    assert two.service_ms == pytest.approx(one.service_ms)


def test_lanes_run_side_by_side():
    """The first two batches of each lane wait for those of the other: one after the other, they would wait in vain."""
    both = threading.Barrier(2)

    def meeting():
        left = iter(range(2))

        def compute(inputs):
            if next(left, None) is not None:
                both.wait(30)
            return {"y": torch.zeros(len(inputs["x"]), 2)}

        return compute

    (point,) = measure([NullModel(spec(), compute=meeting(), delay_s=1e-3) for _ in range(2)], (4,), 0.02)
    assert (point.lanes, point.failed) == (2, "")


class Picky(NullModel):
    """Fails for batches from 8 rows on."""

    def __init__(self, error: Exception) -> None:
        super().__init__(spec(), delay_s=1e-4)
        self.error = error
        self.failures = 0

    def run(self, inputs, size):
        if size["B"] >= 8:
            self.failures += 1
            raise self.error
        return super().run(inputs, size)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("no room for 8 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ValueError("not so many"), "ValueError: not so many"),
    ],
    ids=["device memory", "host memory", "the model"],
)
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_size_that_fails_is_a_point_and_no_end(error, reason, lanes):
    models = [Picky(error) for _ in range(lanes)]
    points = measure(models, (2, 4, 8, 16), 0.02)
    assert [p.failed for p in points] == ["", "", reason, reason]
    assert points[2] == LoadPoint(8, lanes, failed=reason)
    assert all(model.failures == 2 for model in models), "it is not tried again"


def test_a_lost_device_is_the_end():
    with pytest.raises(EngineError, match="illegal memory access"):
        measure([Picky(torch.AcceleratorError("CUDA error: an illegal memory access"))], (2, 8), 0.02)


def test_what_the_time_does_not_reach_is_said():
    points = measure([NullModel(spec(), delay_s=0.05)], (1, 2), 0.1, until=time.monotonic() - 1)
    assert [p.failed for p in points] == ["not measured: the time was over"] * 2


def test_sizes_take_turns():
    seen: list[tuple[int, int]] = []
    measure([NullModel(spec())], (1, 2, 4), 0.01, observe=lambda batch, done: seen.append((batch, done)))
    assert [batch for batch, _ in seen] == [4, 2, 1, 1, 2, 4, 4, 2, 1, 1, 2, 4]
    assert [done for _, done in seen] == [*range(12)]


def test_every_batch_has_its_rows():
    shapes: set[tuple[int, ...]] = set()

    def compute(inputs):
        shapes.add(tuple(inputs["x"].shape))
        return {"y": torch.zeros(len(inputs["x"]), 2)}

    measure([NullModel(spec(), batches=(4, 8), compute=compute)], (3, 8), 0.01)
    assert shapes == {(4, 4), (8, 4)}, "three rows are padded to four"


@pytest.mark.parametrize("lanes", [1, 2])
def test_stopping_leaves_no_thread_behind(lanes):
    def observe(batch: int, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([NullModel(spec(), delay_s=1e-3) for _ in range(lanes)], (1, 2), 0.5, observe=observe)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("onecard-tune")]
