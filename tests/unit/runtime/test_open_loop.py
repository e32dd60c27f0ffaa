"""The load generator: random arrivals, latency from the moment a request was due, and an early end that is sure."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from onecard.errors import EngineError
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.runtime.open_loop import Load, LoadResult, allowed_late, arrivals, run_load
from tests.unit.runtime.test_curve import spec

REQUESTS = [{"x": np.full((1, 4), n, np.float32)} for n in range(4)]
TWO_ROWS = [{"x": np.zeros((2, 4), np.float32)}]


@contextmanager
def engine(policy: BatchPolicy | None = None, **model) -> Iterator[Engine]:
    with Engine([NullModel(spec(), **model)], EngineOptions(policy=policy or BatchPolicy())) as opened:
        yield opened


def test_arrivals_are_a_poisson_process():
    times = arrivals(Load(1000.0, 2, 20_000, seed=3))
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(2e-3, rel=0.03), "500 requests of two rows a second"
    assert statistics.stdev(gaps) == pytest.approx(2e-3, rel=0.03), "as an exponential distribution has it"
    assert times == arrivals(Load(1000.0, 2, 20_000, seed=3))
    assert times != arrivals(Load(1000.0, 2, 20_000, seed=4))


@pytest.mark.parametrize("requests", [1, 99, 100, 101, 500, 501, 550, 1000, 7777])
def test_as_many_may_be_late_as_the_p99_allows(requests):
    late = allowed_late(requests)

    def p99(count: int) -> float:
        return LoadResult([1.0] * (requests - count) + [2.0] * count, 1.0, 0.0, False, "").quantile_ms(0.99)

    assert p99(late + 1) == 2000.0, "one more is surely too many"
    assert p99(max(0, late - 1)) == 1000.0, "one less is surely none too many"


@pytest.mark.parametrize(
    ("latencies", "ended", "kept"),
    [
        ([0.1] * 100, False, True),
        ([0.1] * 100, True, False),
        ([0.1] * 95 + [0.3] * 5, False, False),
        ([0.1] * 95 + [math.inf] * 5, False, False),
        ([0.1] * 999 + [math.inf], False, True),
        ([math.inf] * 10, False, False),
        ([], False, False),
    ],
)
def test_whether_a_limit_is_kept(latencies, ended, kept):
    assert LoadResult(latencies, 1.0, 0.0, ended, "").keeps(0.2) is kept


def test_every_request_is_answered_and_timed():
    with engine(delay_s=1e-3) as opened:
        result = run_load(opened, REQUESTS, Load(200.0, 1, 60, seed=1))
    assert len(result.latencies_s) == 60
    assert min(result.latencies_s) >= 1e-3
    assert not result.ended
    assert result.error == ""
    assert 0 < result.rows_per_s < 400


def test_latency_counts_from_when_a_request_was_due():
    """The model stalls once: the requests that were due meanwhile have waited, though they were sent in time."""
    stalls = iter([0.3])
    warm = threading.Event()

    def delay(size) -> float:
        return next(stalls, 1e-4) if warm.is_set() else 0.0

    with engine(BatchPolicy(max_rows=1), delay_s=delay) as opened:
        warm.set()
        result = run_load(opened, REQUESTS, Load(200.0, 1, 60, seed=1))
    late = [s for s in result.latencies_s if s > 0.05]
    assert len(late) >= 20, "a closed loop would have seen one"
    assert max(late) >= 0.3


def test_a_run_that_cannot_keep_its_limit_is_ended_early():
    with engine(BatchPolicy(max_rows=1), delay_s=5e-3) as opened:  # at most 200 a second
        began = time.monotonic()
        result = run_load(opened, REQUESTS, Load(2000.0, 1, 20_000, seed=1, limit_s=0.02))
        assert time.monotonic() - began < 50, "of a hundred seconds of work"
        assert result.ended
        assert not result.keeps(0.02)
        assert len(result.latencies_s) < 1000, "in ten seconds of arrivals two thousand are answered"
        assert opened.queued == (0, 0, 0), "what waited is taken back"
        again = run_load(opened, REQUESTS, Load(50.0, 1, 20, seed=2))
        assert len(again.latencies_s) == 20, "the engine is ready for the next"


def test_a_run_without_a_limit_goes_to_the_end():
    with engine(BatchPolicy(max_rows=1), delay_s=2e-3) as opened:
        result = run_load(opened, REQUESTS, Load(2000.0, 1, 200, seed=1))
    assert len(result.latencies_s) == 200
    assert not result.ended
    assert result.rows_per_s < 500, "what was answered counts, not what was offered"


def test_refused_requests_are_late():
    with engine(BatchPolicy(max_rows=1, queue_items=2), delay_s=0.02) as opened:
        result = run_load(opened, REQUESTS, Load(2000.0, 1, 100, seed=1))
    assert result.latencies_s.count(math.inf) > 20
    assert "queue_items" in result.error
    assert result.quantile_ms(0.99) == math.inf
    assert result.quantile_ms(0.01) < math.inf


def test_failing_requests_are_late():
    def compute(inputs):
        if inputs["x"].max() == 3:
            raise RuntimeError("three is too much")
        return {"y": inputs["x"][:, :2]}

    warm = {"x": np.zeros((1, 4), np.float32)}
    with engine(BatchPolicy(max_rows=1), compute=compute) as opened:
        opened.infer(warm)
        result = run_load(opened, REQUESTS, Load(500.0, 1, 40, seed=1))
    assert result.latencies_s.count(math.inf) == 10
    assert "three is too much" in result.error


def test_requests_of_several_rows():
    with engine(delay_s=1e-3) as opened:
        load = Load(400.0, 2, 40, seed=1)
        result = run_load(opened, TWO_ROWS, load)
    assert load.planned_s == pytest.approx(0.2)
    assert len(result.latencies_s) == 40


def test_stopping_takes_back_what_waits():
    class Stopped(list):
        def __getitem__(self, index):
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with engine(BatchPolicy(max_rows=1), delay_s=0.05) as opened:
        with pytest.raises(KeyboardInterrupt):
            run_load(opened, Stopped(REQUESTS), Load(1e4, 1, 100, seed=1))
        assert opened.queued == (0, 0, 0)


def test_an_engine_that_is_closed_is_no_result():
    with engine() as opened:
        pass
    with pytest.raises(EngineError, match="cannot go on"):
        run_load(opened, REQUESTS, Load(1000.0, 1, 10))
