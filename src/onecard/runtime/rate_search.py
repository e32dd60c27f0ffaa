"""Which settings to try under a latency limit, and the highest rate that one of them keeps: decisions, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from onecard.tuning import LoadPoint

TOLERANCE = 0.05
"""Rates are told apart to this share: the found one is kept, one that is so much higher is not."""

_MOST_BATCHES = 3  # of one number of lanes
_FIRST_SHARE = 0.8  # of the ceiling; Poisson arrivals rarely leave more than this
_LEAST_SHARE = 1 / 16  # of the ceiling: a setting that keeps no more is of no use
_SHORTEST_DELAY_MS = 0.2  # a thread cannot be woken much more precisely


class Candidate(NamedTuple):
    """A setting to try.

    Args:
        batch: most rows of a batch.
        max_delay_ms: how long a request may wait for others.
        lanes: copies of the model.
        ceiling: rows a second of the curve: more than that no arrival pattern gets.
    """

    batch: int
    max_delay_ms: float
    lanes: int
    ceiling: float

    @property
    def service_ms(self) -> float:
        """Time between two batches of a lane."""
        return 1e3 * self.batch * self.lanes / self.ceiling


def candidates(points: Iterable[LoadPoint], limit_ms: float, rows: int = 1) -> list[Candidate]:
    """The settings worth trying under a limit, the most promising first.

    A batch that by itself takes longer than the limit is none, nor one that a smaller batch outruns. Of the rest, for
    each number of lanes: the three fastest that fit twice (the one that runs when a request comes, and its own), each
    without a delay and with half of what the limit then leaves; and the smallest that fits only once, since not every
    request finds another batch running.

    Args:
        points: the curve.
        limit_ms: of a request's p99.
        rows: of a request; smaller batches would cut it up.
    """
    roomy: list[Candidate] = []
    tight: list[Candidate] = []
    good = [p for p in points if not p.failed and p.rows_per_s > 0 and p.service_ms <= limit_ms]
    for lanes in sorted({p.lanes for p in good}):
        mine = sorted((p for p in good if p.lanes == lanes), key=lambda p: p.batch)
        front = _front([p for p in mine if p.batch >= rows] or mine)
        fits_twice = [p for p in front if 2 * p.service_ms <= limit_ms]
        for point in fits_twice[-_MOST_BATCHES:]:
            delays = _delays(limit_ms - 2 * point.service_ms) if point.batch > rows else (0.0,)
            roomy += [Candidate(point.batch, delay_ms, lanes, point.rows_per_s) for delay_ms in delays]
        tight += [Candidate(p.batch, 0.0, lanes, p.rows_per_s) for p in front if p not in fits_twice][:1]
    return [c for some in (roomy, tight) for c in sorted(some, key=lambda c: (-c.ceiling, c))]


def _front(points: Sequence[LoadPoint]) -> list[LoadPoint]:
    """Those that no smaller batch outruns."""
    front: list[LoadPoint] = []
    for point in points:
        if not front or point.rows_per_s > front[-1].rows_per_s:
            front.append(point)
    return front


def _delays(slack_ms: float) -> tuple[float, ...]:
    delay_ms = math.floor(slack_ms / 2 * 10) / 10
    return (0.0, delay_ms) if delay_ms >= _SHORTEST_DELAY_MS else (0.0,)


def highest_rate(holds: Callable[[float], bool], ceiling: float, beat: float = 0.0) -> float:
    """The highest rate that is kept, by bisection.

    Args:
        holds: tries a rate; whatever it raises ends the search.
        ceiling: a rate that cannot be kept, never tried.
        beat: a rate that another setting keeps. This one is then first tried a tolerance above it, and given up if it
            fails there.

    Returns:
        A rate that was kept, while one a tolerance above it was not (or is the ceiling); 0.0 if none was, or none
        that beats ``beat``.
    """
    low, high = 0.0, ceiling
    rate = beat * (1 + TOLERANCE) if beat else ceiling * _FIRST_SHARE
    if rate >= ceiling:
        return 0.0
    while True:
        if holds(rate):
            low = rate
        elif beat and not low:
            return 0.0
        else:
            high = rate
        if high <= low * (1 + TOLERANCE) or high <= ceiling * _LEAST_SHARE:
            return low
        rate = (low + high) / 2
