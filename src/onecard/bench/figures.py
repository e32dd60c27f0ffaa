"""From a run's raw records to its figures."""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onecard.bench.histogram import Histogram
from onecard.bench.records import ANSWERED, FAILED, OPEN, REFUSED
from onecard.bench.result import PERCENTILES, RunResult, Second, Sender
from onecard.bench.run import Run
from onecard.bench.slo import Slo, percentile_name

_Floats = npt.NDArray[np.float64]
_Truths = npt.NDArray[np.bool_]
_MOST_LAG = 0.1  # of the latency that is judged
_GROWTH = 1.5
_LEAST_GROWTH = (5.0, 0.01)  # requests; share of all that were due
_GRID = 400
_RESTS_ON = 10  # slower requests than a percentile, for it to say something


def figures_of(run: Run, rows: int, slo: Slo | None = None) -> RunResult:
    """The figures of a run.

    Args:
        run: raw.
        rows: of a request.
        slo: that the run is held against.
    """
    load, columns = run.load, _columns(run)
    due, ended, answered, is_open = columns
    latencies = _latencies(run, columns)
    histogram = Histogram(latencies)
    good = int(answered.sum())
    left = int(is_open.sum())
    in_time = int((latencies[:good] <= slo.limit_s).sum()) if slo else 0
    reasons = collections.Counter(str(each) for each in np.array(run.records.outcomes, object)[~answered & ~is_open])
    percentiles = {percentile_name(p): 1e3 * histogram.percentile_s(p) for p in (*PERCENTILES, 100.0)}
    objective_ms = 1e3 * histogram.percentile_s(slo.percentile) if slo else math.nan
    span_s = _span_s(run, ended)
    return RunResult(
        scenario=load.scenario,
        open_loop=load.is_open,
        offered_qps=_offered(run, due),
        span_s=span_s,
        queries=len(due) - (left if run.interrupted else 0),
        answered=good,
        unanswered=0 if run.interrupted else left,
        refused=_of_kind(reasons, REFUSED),
        failed=_of_kind(reasons, FAILED),
        mean_ms=1e3 * histogram.mean_s,
        percentiles_ms=percentiles,
        answered_per_s=good / span_s,
        rows_per_s=good * rows * (load.samples if load.scenario == "multi-stream" else 1) / span_s,
        goodput_per_s=in_time / span_s if slo else math.nan,
        objective=str(slo) if slo else "",
        objective_ms=objective_ms,
        objective_kept=objective_ms <= 1e3 * slo.limit_s if slo else None,
        backlog_grows=load.scenario == "server" and backlog_grows(due, ended),
        given_up=run.given_up,
        interrupted=run.interrupted,
        sender=_sender(run, percentiles["p99"], slo) if load.scenario == "server" else None,
        seconds=_seconds(columns),
        histogram=histogram.encode(),
        notes=tuple(_notes(run, histogram, slo)),
    )


class _Columns(NamedTuple):
    """Of all queries: when they were due and ended, in seconds from the start, and how."""

    due: _Floats
    ended: _Floats
    answered: _Truths
    is_open: _Truths


def _columns(run: Run) -> _Columns:
    records = run.records
    outcomes = np.array(records.outcomes, object)
    times = np.array(records.due) - run.start, np.array(records.ended) - run.start
    return _Columns(*times, outcomes == ANSWERED, outcomes == OPEN)


def _latencies(run: Run, columns: _Columns) -> _Floats:
    """Of the answered queries, and then how long those without an answer have waited, in seconds."""
    due, ended, answered, is_open = columns
    latencies = (ended - due)[answered]
    if run.interrupted:
        return latencies
    return np.concatenate((latencies, (run.end - run.start - due)[is_open]))


def _span_s(run: Run, ended: _Floats) -> float:
    """From the start to the last answer; at least the whole schedule, where it was kept to."""
    load = run.load
    last_s = float(np.nanmax(ended)) if np.isfinite(ended).any() else run.end - run.start
    is_whole = load.scenario == "server" and not (load.requests or run.given_up or run.interrupted)
    return max(last_s, load.duration_s if is_whole else 0.0, 1e-9)


def backlog_grows(due: _Floats, ended: _Floats) -> bool:
    """Whether ever more requests were under way while they came: in each quarter of the time more than before.

    Args:
        due: seconds, ascending.
        ended: seconds; NaN without an answer.
    """
    if len(due) < _GRID // _RESTS_ON:
        return False
    grid = np.linspace(due[0], due[-1], _GRID)
    came = np.searchsorted(due, grid, side="right")
    went = np.searchsorted(np.sort(ended[np.isfinite(ended)]), grid, side="right")
    quarters = (came - went).reshape(4, -1).mean(axis=1)
    least, share = _LEAST_GROWTH
    rises = bool((np.diff(quarters) > 0).all())
    return rises and quarters[3] > _GROWTH * quarters[1] and quarters[3] - quarters[1] > max(least, share * len(due))


def _offered(run: Run, due: _Floats) -> float:
    if run.load.scenario != "server":
        return 0.0
    return run.load.qps or (len(due) / max(float(due[-1]), 1e-9) if len(due) else 0.0)


def _of_kind(reasons: collections.Counter[str], kind: str) -> dict[str, int]:
    found = {reason.removeprefix(kind): count for reason, count in reasons.items() if reason.startswith(kind)}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _sender(run: Run, p99_ms: float, slo: Slo | None) -> Sender:
    taken = np.array(run.records.taken)
    lag_ms = 1e3 * (taken - np.array(run.records.due))
    if not len(lag_ms):
        return Sender(math.nan, math.nan, math.nan, run.waited, run.peak)
    p50, p99, most = (float(v) for v in np.percentile(lag_ms, (50, 99, 100)))
    judged_ms = min(p99_ms if math.isfinite(p99_ms) else math.inf, 1e3 * slo.limit_s if slo else math.inf)
    bound = ""
    if p99 > _MOST_LAG * judged_ms:
        of = "the limit" if slo and judged_ms < p99_ms else "the p99 latency"
        bound = f"the load generator was late itself: p99 of its lag is {p99:.3g} ms, {p99 / judged_ms:.0%} of {of}"
    return Sender(p50, p99, most, run.waited, run.peak, bound)


def _seconds(columns: _Columns) -> tuple[Second, ...]:
    due, ended, answered, _ = columns
    if not len(due):
        return ()
    over = np.isfinite(ended)
    length = int(max(due[-1], ended[over].max() if over.any() else 0.0)) + 1
    sent = np.bincount(np.maximum(due, 0).astype(int), minlength=length)
    came = np.bincount(np.maximum(ended[answered], 0).astype(int), minlength=length)
    failed = np.bincount(np.maximum(ended[over & ~answered], 0).astype(int), minlength=length)
    edges = np.searchsorted(due, np.arange(length + 1))
    found = []
    for second in range(length):
        part = slice(edges[second], edges[second + 1])
        ms = 1e3 * (ended[part] - due[part])[answered[part]]
        p50, p99 = np.percentile(ms, (50, 99)) if len(ms) else (math.nan, math.nan)
        counts = int(sent[second]), int(came[second]), int(failed[second])
        found.append(Second(second, *counts, float(p50), float(p99)))
    return tuple(found)


def _notes(run: Run, histogram: Histogram, slo: Slo | None) -> list[str]:
    notes = []
    left = run.records.outcomes.count(OPEN)
    if run.interrupted:
        notes.append(f"stopped early; {left} queries that were under way then are left out.")
    elif left:
        notes.append(f"{left} queries had no answer when the wait for answers ended; they count as slower than shown.")
    if run.waited and run.load.scenario == "server":
        notes.append(
            f"{run.waited} requests waited for one of {run.load.most_in_flight} connections; that is in their latency."
        )
    if slo and histogram.total and histogram.total * (1 - slo.percentile / 100) < _RESTS_ON and slo.percentile < 100:  # noqa: PLR2004
        notes.append(
            f"{slo.name} of {histogram.total} queries rests on fewer than {_RESTS_ON} slow ones: run for longer."
        )
    return notes
