"""A run's figures in words, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onecard.bench.load import SCENARIOS
from onecard.bench.result import RunResult
from onecard.report.format import NONE, clean, count, duration_ms, duration_s


def describe(run: RunResult) -> str:
    """The kind of load, in words."""
    if run.scenario == "closed-loop":
        return "closed loop: callers wait for answers, so a stall is seen by few requests; for comparison only"
    when = "latency from when a request was due" if run.open_loop else "by definition, each waits for the one before"
    return f"{SCENARIOS[run.scenario]}; {when}"


def rows_of(run: RunResult) -> Iterator[tuple[str, str]]:
    """The figures beside the latencies, each with its name."""
    if run.offered_qps:
        yield "offered", f"{rate(run.offered_qps)}/s"
    yield "queries", f"{run.queries:,} in {duration_s(run.span_s)}"
    yield "answered", f"{run.answered:,} ({_share(run.answered_share)}), {rate(run.answered_per_s)}/s"
    yield "rows", f"{rate(run.rows_per_s)}/s"
    if run.objective:
        yield "in time (goodput)", f"{rate(run.goodput_per_s)}/s"
    if run.unanswered:
        yield "unanswered", f"{run.unanswered:,}"
    for kind, reasons in (("refused", run.refused), ("failed", run.failed)):
        for reason, number in reasons.items():
            yield f"{kind}: {clean(reason)}", f"{number:,}"
    if run.sender is not None:
        lag = run.sender
        yield "sender lag p50, p99, max", ", ".join(map(duration_ms, (lag.lag_p50_ms, lag.lag_p99_ms, lag.lag_max_ms)))
        yield "most under way", f"{lag.peak:,}"


def rate(per_s: float) -> str:
    """So many a second, without the unit."""
    return count(per_s) if per_s else "0"


def _share(share: float) -> str:
    if math.isnan(share):
        return NONE
    return "100 %" if share == 1 else f"{math.floor(share * 10_000) / 100:.2f} %"
