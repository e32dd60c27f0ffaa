"""Histograms with fixed bounds: counted where requests are answered, copied, merged and subtracted where they are read.

A bucket counts the values up to its bound, the bound included, as Prometheus' ``le`` does. There is one bucket more
than there are bounds: the last counts what is above all of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import msgspec

from onecard.errors import DataError

_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # of a decade, so that the limits that people choose are bounds
_SHORTEST_S, _LONGEST_S = 50e-6, 60.0


def _log_spaced(low: float, high: float, steps: Sequence[float]) -> tuple[float, ...]:
    """All products of a step and a power of ten from ``low`` to ``high``, and ``high`` itself."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    bounds = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return (*(bound for bound in bounds if low <= bound < high), high)


SECONDS = _log_spaced(_SHORTEST_S, _LONGEST_S, _STEPS)
"""Bounds of durations: 50 µs to 60 s, each at most 1.7 times the one before."""

ROWS = tuple(float(1 << power) for power in range(13))
"""Bounds of batch sizes: the powers of two up to 4096."""

DIFFERENCES = _log_spaced(1e-7, 1.0, (1.0, 3.0))
"""Bounds of relative differences between two answers."""


class Distribution(msgspec.Struct, frozen=True):
    """A histogram as it was at one moment.

    Args:
        bounds: of the buckets, ascending.
        counts: of each bucket by itself, and of what lies above the last bound: one more than ``bounds``.
        sum: of all values.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """NaN where there is no value."""
        count = self.count
        return self.sum / count if count else math.nan

    def plus(self, other: Distribution) -> Distribution:
        """Both together; one without bounds adds nothing.

        Raises:
            DataError: their bounds differ.
        """
        if not (self.bounds and other.bounds):
            return self if self.bounds else other
        self._expect_same_bounds(other)
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.sum + other.sum)

    def minus(self, earlier: Distribution) -> Distribution:
        """What came since an earlier copy; all of it, if the histogram began anew in between.

        Raises:
            DataError: their bounds differ.
        """
        if not earlier.bounds:
            return self
        self._expect_same_bounds(earlier)
        counts = tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True))
        if min(counts) < 0:
            return self
        return Distribution(self.bounds, counts, self.sum - earlier.sum)

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` of all lies, interpolated inside its bucket as Prometheus does.

        Returns:
            NaN where there is no value; the last bound, if the quantile lies above it.
        """
        rank = q * self.count
        if not self.count:
            return math.nan
        seen, low = 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and seen + count >= rank:
                return low + (bound - low) * (rank - seen) / count
            seen += count
            low = bound
        return self.bounds[-1]

    def _expect_same_bounds(self, other: Distribution) -> None:
        if self.bounds != other.bounds:
            raise DataError(
                f"histograms with {len(self.bounds)} and {len(other.bounds)} bounds, or with different ones, cannot be "
                "put together.",
                "Let all processes be of one version of onecard.",
            )


class Histogram:
    """Counts values; one thread at a time may write, any may copy.

    Observing costs about a quarter of a microsecond: a search in a tuple and two additions, and no lock. A copy taken
    while another thread writes may lack that last value in its sum.

    Args:
        bounds: of the buckets, ascending.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_many(self, values: Iterable[float]) -> None:
        """Count each of some values, such as the waits of a batch's requests."""
        bounds, counts, total = self._bounds, self._counts, 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._sum += total

    def copy(self) -> Distribution:
        """As it is now."""
        return Distribution(self._bounds, tuple(self._counts), self._sum)
