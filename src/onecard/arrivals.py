"""When requests come that do not wait for one another: a Poisson process."""

from __future__ import annotations

import random


def poisson_times(per_s: float, count: int, seed: int = 0) -> list[float]:
    """Arrival times in seconds from the start, ascending.

    Args:
        per_s: how many come each second, on average.
        count: how many come in all.
        seed: equal seeds give equal times.
    """
    chance = random.Random(seed)
    due = 0.0
    times = []
    for _ in range(count):
        due += chance.expovariate(per_s)
        times.append(due)
    return times
