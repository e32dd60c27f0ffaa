"""The search for the knee on a simulated queue of known capacity, and the figures of what it simulates."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from onecard.arrivals import poisson_times
from onecard.bench.figures import backlog_grows, figures_of
from onecard.bench.knee import find_knee
from onecard.bench.load import Load
from onecard.bench.records import Records
from onecard.bench.run import Run
from onecard.bench.slo import Slo, parse_slo

SERVICE_S = 0.01
KNEE = 77.5
"""Requests a second at which 99 % of this queue's are answered within 100 ms; see the first test."""


def simulated(qps: float, seconds: float, seed: int, slo: Slo, late_s: float = 0.0):
    """One worker with a fixed service time: M/D/1."""
    records = Records()
    free = 0.0
    due_times = poisson_times(qps, max(1, int(qps * seconds)), seed)
    for due in due_times:
        free = max(free, due) + SERVICE_S
        number = records.add(due)
        records.taken[number] = records.sent[number] = due + late_s
        records.end(number, "", free)
    load = Load("server", due_times[-1], qps=qps)
    return figures_of(Run(load, records, 0.0, free, len(due_times), 0, 0), 1, slo)


def search(slo: Slo, start: float, seconds: float = 60.0, tolerance: float = 0.02, stop_after: int = 10_000):
    made = []

    async def measure(qps: float, seed: int):
        if len(made) == stop_after:
            return None
        made.append(qps)
        return simulated(qps, seconds, seed, slo)

    return asyncio.run(find_knee(measure, start, 1e3 * slo.limit_s, tolerance)), made


def test_what_this_queue_can_do():
    slo = parse_slo("p99=100ms")
    assert (
        simulated(KNEE * 0.98, 3000.0, 0, slo).objective_ms < 100 < simulated(KNEE * 1.02, 3000.0, 0, slo).objective_ms
    )


@pytest.mark.parametrize("start", [1.0, 70.0, 100.0, 800.0])
def test_the_knee_is_where_the_queue_has_it(start):
    slo = parse_slo("p99=100ms")
    knee, made = search(slo, start)
    assert knee.qps == pytest.approx(KNEE, rel=0.05)
    assert knee.complete and knee.note == ""
    assert knee.qps < knee.above_qps <= knee.qps * 1.02
    assert len(made) < 60 and len(knee.points) == len(made)
    assert {p.reason for p in knee.points if not p.kept} <= {"p99 above the limit", "the backlog grows"}


def test_rates_far_from_the_limit_are_run_once():
    knee, made = search(parse_slo("p99=100ms"), 10.0)
    assert made.count(10.0) == 1, "p99 is far below"
    assert all(made.count(p.qps) in (2, 3) for p in knee.points if 60 < p.result.objective_ms < 150)


def test_a_limit_that_no_rate_keeps():
    knee, made = search(parse_slo("p99=4ms"), 50.0)
    assert knee.qps == 0.0 and not knee.complete
    assert "no rate down to" in knee.note and len(made) == 11


def test_a_search_that_is_stopped_has_what_it_found():
    knee, _ = search(parse_slo("p99=100ms"), 10.0, stop_after=3)
    assert knee.qps == 40.0 and knee.above_qps == math.inf and not knee.complete
    assert len(knee.points) == 3
    assert search(parse_slo("p99=100ms"), 10.0, stop_after=0)[0].points == ()


def test_the_backlog_of_too_much_load_grows():
    slo = parse_slo("p99=10s")
    lost = sum(simulated(105.0, 20.0, seed, slo).backlog_grows for seed in range(20))
    kept = sum(simulated(90.0, 20.0, seed, slo).backlog_grows for seed in range(20))
    assert lost >= 12 and kept <= 2
    assert simulated(130.0, 20.0, 0, slo).shortfall == "the backlog grows", "though its p99 is within the limit still"
    assert not backlog_grows(np.array([]), np.array([]))


def test_a_sender_that_is_late_says_so():
    slo = parse_slo("p99=100ms")
    assert simulated(50.0, 60.0, 0, slo).sender.bound == ""
    late = simulated(50.0, 60.0, 0, slo, late_s=0.02)
    assert "late itself: p99 of its lag is 20 ms" in late.sender.bound
    assert late.sender.lag_p50_ms == pytest.approx(20)


def test_figures_by_hand():
    records = Records()
    ends = ((10.0, 10.01, ""), (10.5, 10.52, ""), (11.0, 11.5, ""), (11.1, 11.2, "refused HTTP 429"),
            (11.2, 11.3, "failed HTTP 500"), (11.9, None, ""))  # fmt: skip
    for due, ended, outcome in ends:
        number = records.add(due)
        records.taken[number] = records.sent[number] = due
        if ended is not None:
            assert records.end(number, outcome, ended)
    run = figures_of(Run(Load("server", 2.0, qps=3.0), records, 10.0, 13.0, 6, 0, 2), 4, parse_slo("p99=100ms"))
    assert (run.queries, run.answered, run.unanswered) == (6, 3, 1)
    assert run.refused == {"HTTP 429": 1} and run.failed == {"HTTP 500": 1}
    assert run.span_s == 2.0 and run.answered_per_s == 1.5 and run.rows_per_s == 6.0 and run.goodput_per_s == 1.0
    assert run.percentiles_ms["max"] == pytest.approx(1100), "waited so long at least"
    assert run.percentiles_ms["p50"] == pytest.approx(20, rel=1e-3)
    assert [(s.sent, s.answered, s.failed) for s in run.seconds] == [(2, 2, 0), (4, 1, 2)]
    assert run.seconds[0].p50_ms == pytest.approx(15)
    assert run.objective_kept is False


def test_a_query_of_several_requests_ends_with_the_last():
    records = Records()
    number = records.add(0.0, 3)
    assert not records.end(number, "", 1.0)
    assert not records.end(number, "failed HTTP 500", 2.0)
    assert records.end(number, "refused HTTP 429", 3.0)
    assert records.outcomes[number] == "failed HTTP 500" and records.ended[number] == 3.0
