"""The setting with the most rows a second under each p99 limit: candidates, bisection, and a run that confirms.

Time and measuring are given from outside, so that the search itself can be tried without either.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from onecard.errors import DeviceMemoryError
from onecard.runtime.open_loop import Load, LoadResult
from onecard.runtime.rate_search import Candidate, candidates, highest_rate
from onecard.tuning import LoadPoint, Setting

LEAST_REQUESTS = 500
"""Of one step; fewer say little about a p99."""
LEAST_STEP_S = 1.0
LEAST_STEP_LIMITS = 10
"""A step is at least so many limits long: what waits grows by the time that the engine is behind, so that a rate a
tenth above what it can do is noticed."""
CONFIRM_STEPS = 2
"""The confirming run is at least so many times as long as a step must be."""

_CONFIRMATIONS = 4
_STEP_BACK = 0.9  # of the rate, for the next confirmation after one that missed
_TYPICAL_STEPS = 6  # of one limit on one number of lanes, for the estimate of the time left

Measure = Callable[[Candidate, Load], tuple[LoadResult, float]]
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class SearchOptions:
    """What is searched for.

    Args:
        limits_ms: of a request's p99.
        rows: of every request.
        until: of the clock: no step is begun that could not end, and be confirmed, by then.
    """

    limits_ms: tuple[float, ...]
    rows: int
    until: float


class Held(NamedTuple):
    """A rate that a candidate kept."""

    candidate: Candidate
    rate: float


class _TimeOver(Exception):
    """There is no time for another step."""


class SettingSearch:
    """The search over all limits.

    Args:
        points: the curve.
        options: see :class:`SearchOptions`.
        measure: runs a load against an engine with a candidate's setting; gives the result and the mean batch.
        tell: what is going on, and about how many seconds are left.
        clock: seconds.

    Attributes:
        out_of_time: limits at which the time was over before the search was.
        too_large: numbers of lanes that an engine could not be opened with.
        sender_bound: limits that were missed last because the sender itself was late: more may be possible.
    """

    def __init__(
        self,
        points: Sequence[LoadPoint],
        options: SearchOptions,
        measure: Measure,
        tell: Tell = lambda what, left_s: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._points = points
        self._options = options
        self._measure = measure
        self._tell = tell
        self._clock = clock
        self._limits = tuple(sorted({*options.limits_ms}))
        self._held: dict[float, Held] = {}
        self._seed = 0
        self._turns_left = 0
        self.out_of_time: set[float] = set()
        self.too_large: set[int] = set()
        self.sender_bound: set[float] = set()

    def run(self) -> list[Setting]:
        """Search, then confirm.

        Returns:
            One setting for each limit, the tightest first; one that failed says why.
        """
        lanes = sorted({p.lanes for p in self._points if not p.failed})
        self._turns_left = len(lanes) * len(self._limits)
        for count in lanes:  # an engine is opened for each, so that is the outer loop
            try:
                self._search_lanes(count)
            except DeviceMemoryError:
                self.too_large.add(count)
            self._turns_left = len(self._limits) * (len(lanes) - lanes.index(count) - 1)
        # The engine with the most lanes is still open.
        order = sorted(self._limits, key=lambda ms: -self._held[ms].candidate.lanes if ms in self._held else 0)
        settings = {limit_ms: self._settle(limit_ms) for limit_ms in order}
        return [settings[limit_ms] for limit_ms in self._limits]

    def _search_lanes(self, lanes: int) -> None:
        """Search under every limit, the tightest first."""
        tighter: Held | None = None
        for limit_ms in self._limits:
            known = [held for held in (tighter, self._held.get(limit_ms)) if held is not None]
            if known:  # what keeps a tighter limit keeps this one
                self._held[limit_ms] = max(known, key=lambda held: held.rate)
            found = candidates(self._points, limit_ms, self._options.rows)
            self._search(limit_ms, [candidate for candidate in found if candidate.lanes == lanes])
            tighter = self._held.get(limit_ms)
            self._turns_left -= 1

    def _search(self, limit_ms: float, tries: Sequence[Candidate]) -> None:
        """Look for a candidate that keeps a higher rate than what is known so far."""
        now = self._clock()
        reserve_s = sum(self._confirm_s(held.rate, ms) for ms, held in self._held.items() if ms != limit_ms)
        stop = now + max(0.0, self._options.until - now - reserve_s) / self._turns_left
        hopeless_ms = math.inf
        for candidate in tries:
            least_ms = candidate.service_ms + candidate.max_delay_ms
            if least_ms >= hopeless_ms:
                continue
            held = self._held.get(limit_ms)
            try:
                holds = functools.partial(self._holds, candidate, limit_ms, stop)
                if not highest_rate(holds, candidate.ceiling, held.rate if held else 0.0) and held is None:
                    hopeless_ms = least_ms  # it kept no rate at all: nor will one that needs longer for each request
            except _TimeOver:
                self.out_of_time.add(limit_ms)
                return

    def _holds(self, candidate: Candidate, limit_ms: float, stop: float, rate: float) -> bool:
        """Try a rate; twice if it misses, or one hiccup of the machine would rule it out for good."""
        for _ in range(2):
            load = self._load(rate, _step_s(limit_ms), limit_ms / 1e3)
            if self._clock() + load.planned_s + self._confirm_s(rate, limit_ms) > stop:
                raise _TimeOver
            self._tell(f"p99 <= {limit_ms:g} ms: {_name(candidate)} at {rate:.4g} rows/s", self._left_s())
            result, _ = self._measure(candidate, load)
            if result.keeps(load.limit_s):
                self._held[limit_ms] = Held(candidate, rate)
                return True
            self.sender_bound.discard(limit_ms)
            if result.late_s > load.limit_s / 2:
                self.sender_bound.add(limit_ms)
        return False

    def _settle(self, limit_ms: float) -> Setting:
        """Confirm what was found, at a lower rate if it must be."""
        held = self._held.get(limit_ms)
        if held is None:
            return Setting(limit_ms, failed=self._why_none(limit_ms))
        candidate, rate = held
        for _ in range(_CONFIRMATIONS):
            self._tell(f"confirming p99 <= {limit_ms:g} ms: {_name(candidate)} at {rate:.4g} rows/s", self._left_s())
            result, batch_mean = self._measure(candidate, self._load(rate, CONFIRM_STEPS * _step_s(limit_ms)))
            setting = _setting(limit_ms, candidate, result, batch_mean)
            if result.keeps(limit_ms / 1e3):
                return setting
            rate = _STEP_BACK * min(rate, result.rows_per_s or rate)
        return setting

    def _why_none(self, limit_ms: float) -> str:
        quickest_ms = min((p.service_ms for p in self._points if not p.failed), default=math.nan)
        if not candidates(self._points, limit_ms, self._options.rows):
            return f"no batch is that quick: the quickest takes {quickest_ms:.3g} ms"
        if limit_ms in self.out_of_time:
            return "the time was over before a rate was found that keeps it (--time-limit)"
        if self.too_large:
            return "no engine with so many lanes fits in the device's memory"
        return f"no rate kept it; the quickest batch alone takes {quickest_ms:.3g} ms"

    def _load(self, rate: float, seconds: float, limit_s: float = math.inf) -> Load:
        self._seed += 1
        return Load(rate, self._options.rows, self._requests(rate, seconds), self._seed, limit_s)

    def _requests(self, rate: float, seconds: float) -> int:
        return max(LEAST_REQUESTS, math.ceil(rate / self._options.rows * seconds))

    def _confirm_s(self, rate: float, limit_ms: float) -> float:
        return self._planned_s(rate, CONFIRM_STEPS * _step_s(limit_ms))

    def _planned_s(self, rate: float, seconds: float) -> float:
        return self._requests(rate, seconds) * self._options.rows / rate

    def _left_s(self) -> float:
        """A guess, never more than the time limit leaves."""
        rates = [held.rate for held in self._held.values()] or [0.5 * max(p.rows_per_s for p in self._points)]
        steps = self._turns_left / len(self._limits) * _TYPICAL_STEPS + CONFIRM_STEPS
        step_s = sum(self._planned_s(min(rates), _step_s(limit_ms)) for limit_ms in self._limits)
        return max(0.0, min(step_s * steps, self._options.until - self._clock()))


def _step_s(limit_ms: float) -> float:
    """How long a step lasts at least."""
    return max(LEAST_STEP_S, LEAST_STEP_LIMITS * limit_ms / 1e3)


def _setting(limit_ms: float, candidate: Candidate, result: LoadResult, batch_mean: float) -> Setting:
    """What a confirming run gave."""
    p50_ms, p99_ms = (result.quantile_ms(q) for q in (0.5, 0.99))
    failed = ""
    if result.error:
        failed = f"requests of its confirming run failed: {result.error}"
    elif not result.keeps(limit_ms / 1e3):
        failed = f"its confirming run had a p99 of {p99_ms:.3g} ms"
    return Setting(
        limit_ms,
        candidate.batch,
        candidate.max_delay_ms,
        candidate.lanes,
        result.rows_per_s,
        _finite(p50_ms),
        _finite(p99_ms),
        len(result.latencies_s),
        batch_mean,
        failed,
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _name(candidate: Candidate) -> str:
    delay = f", delay {candidate.max_delay_ms:g} ms" if candidate.max_delay_ms else ""
    lanes = f", {candidate.lanes} lanes" if candidate.lanes > 1 else ""
    return f"batch {candidate.batch}{delay}{lanes}"
