"""The most load under an objective: a geometric ramp, then bisection; decisions, no clock."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from onecard.bench.result import Knee, KneePoint, RunResult

Measure = Callable[[float, int], Awaitable[RunResult | None]]
"""Runs at a rate, with a seed; None when it is told to stop."""
TOLERANCE = 0.03
_STEP = 2.0
_MOST_STEPS = 24
_MOST_DOWN = 2.0**10  # below the first rate
_CLEARLY = 2.0  # so far from the limit, one run is enough
_RUNS = 3  # of which two decide


class _Stopped(Exception):
    """The search is to end with what it has."""


async def find_knee(
    measure: Measure,
    start_qps: float,
    limit_ms: float,
    tolerance: float = TOLERANCE,
    observe: Callable[[KneePoint, float, float], None] = lambda point, low, high: None,
) -> Knee:
    """Find the highest rate that is kept.

    A rate whose percentile is near its limit is run again with other arrival times, and a third time if the two
    disagree: two decide. So one unlucky run does not end the search far from where it should.

    Args:
        measure: tries a rate.
        start_qps: where to begin.
        limit_ms: of the objective.
        tolerance: the rate that is kept and the next that is not are to be so near to one another.
        observe: told of each run, and between which rates the knee lies by then.
    """
    search = _Search(measure, limit_ms, observe)
    complete = False
    try:
        await search.ramp(start_qps)
        while search.low and search.high < math.inf and search.high > search.low * (1 + tolerance):
            await search.try_rate(math.sqrt(search.low * search.high))
        complete = search.high < math.inf and search.low > 0
    except _Stopped:
        pass
    return Knee(search.low, search.high, tuple(search.points), complete, search.note(complete))


class _Search:
    """Between which rates the knee lies.

    Args:
        measure: tries a rate.
        limit_ms: of the objective.
        observe: told of each run.
    """

    def __init__(self, measure: Measure, limit_ms: float, observe: Callable[[KneePoint, float, float], None]) -> None:
        self._measure = measure
        self._limit_ms = limit_ms
        self._observe = observe
        self.points: list[KneePoint] = []
        self.low, self.high = 0.0, math.inf

    async def ramp(self, start_qps: float) -> None:
        """Double the rate until it is not kept, or halve it until it is."""
        rate = start_qps
        for _ in range(_MOST_STEPS):
            if await self.try_rate(rate):
                if self.high < math.inf:
                    return
                rate *= _STEP
            else:
                rate /= _STEP
                if self.low or rate < start_qps / _MOST_DOWN:
                    return

    async def try_rate(self, qps: float) -> bool:
        """Whether a rate is kept; narrows the bounds."""
        votes = 0
        for number in range(_RUNS):
            point = await self._run(qps)
            votes += 1 if point.kept else -1
            if (number == 0 and self._is_clear(point)) or abs(votes) > 1:
                break
        if votes > 0:
            self.low = max(self.low, qps)
        else:
            self.high = min(self.high, qps)
        return votes > 0

    async def _run(self, qps: float) -> KneePoint:
        result = await self._measure(qps, len(self.points))
        if result is None:
            raise _Stopped
        reason = result.shortfall
        point = KneePoint(qps, not reason, reason, result)
        self.points.append(point)
        self._observe(point, self.low, self.high)
        return point

    def _is_clear(self, point: KneePoint) -> bool:
        """Whether another run could hardly say otherwise."""
        if point.kept:
            return point.result.objective_ms * _CLEARLY < self._limit_ms
        return point.result.objective_ms > _CLEARLY * self._limit_ms

    def note(self, complete: bool) -> str:
        """What limits the finding."""
        bound = next((p for p in reversed(self.points) if p.qps == self.high and p.result.sender), None)
        if bound is not None and bound.result.sender is not None and bound.result.sender.bound:
            return "above the knee the load generator itself was late: the target may do more. Use a second machine."
        if complete or not self.points:
            return ""
        if not self.low:
            return f"no rate down to {min(p.qps for p in self.points):.3g} a second was kept."
        if self.high == math.inf:
            return "every rate that was tried was kept: the knee is higher."
        return "stopped before the search was done."
