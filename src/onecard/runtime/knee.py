"""The knee of a curve: the batch size from which on larger batches gain little. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from onecard.tuning import LoadPoint

LEAST_GROWTH = 0.10
"""A doubling of the batch that gains less throughput than this share is not worth its latency."""


def knee(points: Iterable[LoadPoint]) -> LoadPoint | None:
    """The smallest batch from which no larger one gains 10 % per doubling.

    That is: for every larger batch ``b`` of as many lanes, ``(rate(b) / rate(knee)) ** (1 / log2(b / knee)) < 1.1``.
    Every larger batch is looked at, so that one slow size (an odd kernel, a hiccup) does not end the curve early.
    Each number of lanes has a knee of its own; that of fewer lanes stands unless more lanes give 10 % more.

    Args:
        points: a curve; points that failed are passed over.

    Returns:
        One of the points; None if there is none.
    """
    by_lanes: dict[int, list[LoadPoint]] = {}
    for point in points:
        if not point.failed and point.rows_per_s > 0:
            by_lanes.setdefault(point.lanes, []).append(point)
    best: LoadPoint | None = None
    for lanes in sorted(by_lanes):
        found = _knee_of_lanes(sorted(by_lanes[lanes], key=lambda p: p.batch))
        if best is None or found.rows_per_s >= best.rows_per_s * (1 + LEAST_GROWTH):
            best = found
    return best


def _knee_of_lanes(points: Sequence[LoadPoint]) -> LoadPoint:
    for index, point in enumerate(points):
        if all(growth_per_doubling(point, larger) < LEAST_GROWTH for larger in points[index + 1 :]):
            return point
    return points[-1]


def growth_per_doubling(small: LoadPoint, large: LoadPoint) -> float:
    """By which share throughput grows for every doubling of the batch between two points."""
    doublings = math.log2(large.batch / small.batch)
    return float((large.rows_per_s / small.rows_per_s) ** (1 / doublings)) - 1
