"""The clock: samples are kept as they were taken, inputs take turns, and warming up ends when it is warm."""

from __future__ import annotations

import gc
import itertools
import statistics
import time

import pytest
import torch
from torch import Tensor

from onecard.evidence import CardState
from onecard.measure.card import CardSampler
from onecard.measure.timer import Effort, Stopwatch, measure, no_garbage_collection, rotation, synchronise

NAP_MS = 4.0
SHORT = Effort(warmup_s=0.05, latency_s=0.05, period_s=0.05, min_samples=5, max_samples=20)


class Runner:
    """Sleeps a known time and remembers what it was called with."""

    def __init__(self, *naps_ms: float) -> None:
        self.naps_ms = naps_ms
        self.seen: list[Tensor] = []

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(self.naps_ms[len(self.seen) % len(self.naps_ms)] / 1000)
        self.seen.append(inputs["x"])
        return inputs


class OwnTime:
    """Stands in for the module ``time``: it goes on only while somebody sleeps, however busy the machine is."""

    def __init__(self) -> None:
        self._now_ns = 10**9

    def sleep(self, seconds: float) -> None:
        self._now_ns += round(seconds * 1e9)

    def perf_counter(self) -> float:
        return self._now_ns / 1e9

    def perf_counter_ns(self) -> int:
        return self._now_ns


@pytest.fixture
def exact(monkeypatch) -> OwnTime:
    own = OwnTime()
    monkeypatch.setattr("onecard.measure.timer.time", own)
    monkeypatch.setattr(f"{__name__}.time", own)
    return own


def inputs(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"x": torch.full((2,), float(i))} for i in range(count)]


def watch_of(run: Runner) -> Stopwatch:
    return Stopwatch(run, inputs(), "cpu", {"B": 2}, rows=2)


def test_a_known_time_is_measured():
    watch = watch_of(Runner(NAP_MS))
    watch.sample(SHORT)
    timing = watch.timing(CardState(), CardState())
    assert min(timing.samples_ms) >= NAP_MS
    assert timing.median_ms == pytest.approx(statistics.median(timing.samples_ms))
    assert min(timing.period_ms) >= NAP_MS
    assert 0 < timing.throughput <= 1000 * 2 / NAP_MS
    assert (timing.bucket, timing.rows, timing.device_ms) == ({"B": 2}, 2, ())


def test_it_is_measured_to_the_point(exact):
    watch = watch_of(Runner(NAP_MS))
    watch.sample(SHORT)
    timing = watch.timing(CardState(), CardState())
    assert {*timing.samples_ms, *timing.period_ms} == {NAP_MS}
    assert timing.throughput == pytest.approx(1000 * 2 / NAP_MS)


def test_inputs_take_turns():
    run = Runner(0.1)
    watch_of(run).sample(SHORT)
    values = [int(x[0]) for x in run.seen]
    assert all((later - earlier) % 3 == 1 for earlier, later in itertools.pairwise(values))


def test_samples_of_several_goes_are_all_kept(exact):
    watch = watch_of(Runner(1.0))
    watch.sample(SHORT)
    first, blocks = list(watch.samples_ms), len(watch.period_ms)
    watch.sample(SHORT)
    assert watch.samples_ms[: len(first)] == first
    assert len(watch.samples_ms) > len(first)
    assert len(watch.period_ms) > blocks >= 1
    timing = watch.timing(CardState(), CardState())
    assert timing.samples_ms == pytest.approx(watch.samples_ms, abs=1e-5)
    watch.clear()
    assert watch.samples_ms == watch.period_ms == watch.device_ms == []
    assert len(timing.samples_ms) > 0


def test_there_are_as_many_samples_as_were_asked_for():
    few = watch_of(Runner(1.0))
    few.sample(Effort(latency_s=0.0, period_s=0.0, min_samples=7))
    assert (len(few.samples_ms), len(few.period_ms)) == (7, 1)
    many = watch_of(Runner(0.0))
    many.sample(Effort(latency_s=60.0, period_s=0.0, max_samples=11))
    assert len(many.samples_ms) == 11


def test_warm_up_ends_early_when_it_is_stable(exact):
    run = Runner(20.0)
    watch_of(run).warm_up(Effort(warmup_s=8.0))  # windows of a second, and one call before them
    assert 2 * 50 <= len(run.seen) - 1 <= 2 * 51


def test_warm_up_that_never_settles_ends_with_its_time(exact):
    run = Runner(*(1.3**i for i in range(18)))
    start = exact.perf_counter()
    watch_of(run).warm_up(Effort(warmup_s=0.3))
    assert 0.3 <= exact.perf_counter() - start < 0.5
    assert len(run.seen) > 2


def test_warm_up_keeps_no_samples():
    watch = watch_of(Runner(1.0))
    watch.warm_up(SHORT)
    assert watch.samples_ms == watch.period_ms == []


def test_measure_warms_up_first_and_reads_the_card():
    run = Runner(1.0)
    timing, _ = measure(watch_of(run), SHORT, CardSampler("cpu"))
    assert len(run.seen) > len(timing.samples_ms) + len(timing.period_ms)
    assert isinstance(timing.before, CardState)
    assert timing.after.throttle == ()


def test_a_wide_spread_is_said(exact):
    timing, warnings = measure(watch_of(Runner(1.0, 30.0)), Effort(0.0, 0.0, 0.0, min_samples=20), CardSampler("cpu"))
    assert timing.iqr_ms > 0.3 * timing.median_ms
    assert [w for w in warnings if "the samples at B2 spread widely" in w]


def test_rotation_makes_distinct_inputs():
    sets = rotation(lambda i: {"x": torch.full((4,), float(i))})
    assert [int(s["x"][0]) for s in sets] == list(range(8))


@pytest.mark.parametrize(("mib", "count"), [(64, 4), (100, 3), (300, 2)])
def test_rotation_needs_fewer_large_inputs(mib, count):
    assert len(rotation(lambda i: {"x": torch.zeros(1).expand(mib << 18)})) == count


def test_the_collector_rests_while_it_is_timed_even_if_that_fails():
    with pytest.raises(ZeroDivisionError), no_garbage_collection():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()


def test_there_is_nothing_to_wait_for_on_a_cpu():
    synchronise("cpu")
