"""The largest batch under a limit, from what a few batches take: straight lines between them. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping


def largest_under(points: Mapping[int, int], limit_bytes: int, low: int, high: int) -> int:
    """The largest batch whose need is under a limit if the need is linear between and beyond the known batches.

    Args:
        points: batch to the bytes it needs; at least one. With one alone the need is taken to grow in proportion.
        limit_bytes: what there is.
        low: the smallest batch to answer.
        high: the largest.

    Returns:
        A batch from ``low`` to ``high``, or ``low - 1`` if even ``low`` is over the limit.
    """
    if need_at(points, high) <= limit_bytes:
        return high
    if need_at(points, low) > limit_bytes:
        return low - 1
    fits, fails = low, high
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if need_at(points, middle) <= limit_bytes:
            fits = middle
        else:
            fails = middle
    return fits


def need_at(points: Mapping[int, int], batch: int) -> float:
    """What a batch needs, on the line through its two neighbours, or through the nearest two known ones."""
    known = sorted(points)
    if batch in points:
        return float(points[batch])
    if len(known) == 1:
        return points[known[0]] * batch / known[0]
    right = next((index for index, other in enumerate(known) if other > batch), len(known) - 1)
    right = max(1, right)
    first, second = known[right - 1], known[right]
    slope = max(0.0, (points[second] - points[first]) / (second - first))  # noise must not turn growth around
    return math.ceil(points[second] + slope * (batch - second))
