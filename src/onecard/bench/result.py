"""What a run or a search for the knee found, as data: the figures, and the histogram that they come from."""

from __future__ import annotations

import math

import msgspec

from onecard.bench.slo import percentile_name

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99)
ENOUGH_ANSWERED = 0.999
"""A rate that a target keeps is one at which it answers so large a part of the requests."""
FORMAT = 1


class Second(msgspec.Struct, frozen=True):
    """One second of a run.

    Args:
        second: from the start.
        sent: queries that were due in it.
        answered: answers that came in it.
        failed: refusals and failures in it.
        p50_ms: of the queries that were due in it; NaN if none was answered.
        p99_ms: likewise.
    """

    second: int
    sent: int
    answered: int
    failed: int
    p50_ms: float
    p99_ms: float


class Sender(msgspec.Struct, frozen=True):
    """How punctual the load generator was itself (scenario ``server``).

    Args:
        lag_p50_ms: from when a request was due to when the generator sent it.
        lag_p99_ms: likewise.
        lag_max_ms: likewise.
        waited: requests that found no room: as many were under way as may be.
        peak: most requests under way or waiting at once.
        bound: why the figures are the generator's rather than the target's; empty if they are not.
    """

    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float
    waited: int
    peak: int
    bound: str = ""


class RunResult(msgspec.Struct, frozen=True):
    """The figures of one run. A query is one request, or several in ``multi-stream``.

    Args:
        scenario: of the load.
        open_loop: whether queries came without waiting for answers.
        offered_qps: queries a second that were due; 0 where that depended on the answers.
        span_s: from the start to the last answer, at least the whole schedule.
        queries: that were due.
        answered: of them.
        unanswered: still without an answer when the wait for answers ended. They are among the latencies, with the
            time that they had waited by then, which is the least that it can be.
        refused: by reason: the target said that it is too busy.
        failed: by reason.
        mean_ms: of the latencies.
        percentiles_ms: by name: ``p50`` ... ``p99.99`` and ``max``.
        answered_per_s: queries.
        rows_per_s: of the model.
        goodput_per_s: queries answered within the objective; NaN without one.
        objective: such as ``p99=20ms``, or empty.
        objective_ms: what its percentile was.
        objective_kept: whether it was within the limit; None without one.
        backlog_grows: whether ever more requests were under way.
        given_up: whether the run ended early because the objective was lost.
        interrupted: whether Ctrl-C ended it.
        sender: how punctual the generator was.
        seconds: the run second by second.
        histogram: of the latencies, in nanoseconds: HdrHistogram's compressed V2 format in base64.
        notes: what else to know.
    """

    scenario: str
    open_loop: bool
    offered_qps: float
    span_s: float
    queries: int
    answered: int
    unanswered: int
    refused: dict[str, int]
    failed: dict[str, int]
    mean_ms: float
    percentiles_ms: dict[str, float]
    answered_per_s: float
    rows_per_s: float
    goodput_per_s: float
    objective: str
    objective_ms: float
    objective_kept: bool | None
    backlog_grows: bool
    given_up: bool
    interrupted: bool
    sender: Sender | None
    seconds: tuple[Second, ...]
    histogram: str
    notes: tuple[str, ...] = ()

    @property
    def answered_share(self) -> float:
        return self.answered / self.queries if self.queries else math.nan

    @property
    def shortfall(self) -> str:
        """Why the target does not keep the objective at this load; empty if it does."""
        if self.answered_share < ENOUGH_ANSWERED:
            return f"{1 - self.answered_share:.2%} not answered"
        if self.given_up or self.objective_kept is False:
            return f"{self.objective.partition('=')[0]} above the limit"
        return "the backlog grows" if self.backlog_grows else ""

    def percentile_ms(self, percentile: float) -> float:
        """One of :data:`PERCENTILES`, or 100."""
        return self.percentiles_ms[percentile_name(percentile)]


class KneePoint(msgspec.Struct, frozen=True):
    """One rate of the search for the knee.

    Args:
        qps: offered.
        kept: whether the objective was.
        reason: why not; empty if it was.
        result: of the run, without its seconds.
    """

    qps: float
    kept: bool
    reason: str
    result: RunResult


class Knee(msgspec.Struct, frozen=True):
    """The most load at which the objective is kept.

    Args:
        qps: the highest rate that was kept; 0 if none was.
        above_qps: the lowest rate that was not; inf if the search did not come so far.
        points: every run, in the order in which they were made.
        complete: whether the two are as near to one another as they were to be.
        note: what limits the finding, if anything does.
    """

    qps: float
    above_qps: float
    points: tuple[KneePoint, ...]
    complete: bool
    note: str = ""


class Settings(msgspec.Struct, frozen=True):
    """What was asked for, concretely.

    Args:
        scenario: of the load.
        duration_s: of a run.
        qps: offered, or where the search began.
        requests: at most; 0 for no bound.
        rows: of a request.
        sizes: of every symbol.
        samples: requests of a query.
        concurrency: callers of a closed loop.
        connections: most requests under way.
        warm_up_s: before the figures.
        drain_s: how long answers were waited for.
        seed: of arrivals and inputs.
        data: file of the inputs; empty for random ones.
        arrivals: file of a trace; empty for random times.
        objective: such as ``p99=20ms``.
        find_knee: whether the knee was looked for.
    """

    scenario: str
    duration_s: float
    qps: float
    requests: int
    rows: int
    sizes: dict[str, int]
    samples: int
    concurrency: int
    connections: int
    warm_up_s: float
    drain_s: float
    seed: int
    data: str
    arrivals: str
    objective: str
    find_knee: bool


class BenchResult(msgspec.Struct, frozen=True):
    """Everything about one call of ``onecard bench``.

    Args:
        address: of the target, as it was given.
        target: what the target says of itself.
        settings: what was asked for.
        generator: the machine and versions of the load generator.
        started: date and time.
        command: the command line.
        run: the run's figures, or those at the knee.
        knee: what the search found.
        interrupted: whether Ctrl-C ended it.
        format: of this record.
    """

    address: str
    target: dict[str, str]
    settings: Settings
    generator: dict[str, str]
    started: str
    command: str
    run: RunResult | None
    knee: Knee | None = None
    interrupted: bool = False
    format: int = FORMAT
