"""Classes of lengths that share batches: how many rows, at which size, in which time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from onecard.runtime.cost import Costs, Key
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.work import Lengths

_ROUNDING = 1e-6  # of a sum of seconds, in rows
_MOST_KINDS = 1024  # remembered; a model with free picture sizes may meet more


class Sizes(Protocol):
    """What the batcher must know of the model."""

    def lengths_of(self, lengths: Lengths) -> Lengths:
        """The class of these lengths: those of its bucket where sizes are static, else the same."""
        ...

    def joins(self, a: Lengths, b: Lengths) -> bool:
        """Whether rows of class ``a`` may ride in a batch of class ``b``; true if they are the same."""
        ...

    def max_rows(self, lengths: Lengths) -> int:
        """The most rows of one batch of this class; 1 where there is no batch symbol."""
        ...

    def fit(self, rows: int, lengths: Lengths) -> dict[str, int]:
        """The size that such a batch is run at, padding included; never smaller for more rows."""
        ...

    def steps(self, lengths: Lengths) -> tuple[int, ...]:
        """Row counts at which the size grows, ascending; ``()`` if any count runs as it is."""
        ...


class Kind:
    """One class of lengths.

    Attributes:
        lengths: of the class.
        limit: most rows of a batch, from the model, the policy, and what did not fit in memory.
        steps: the model's row counts at which the size grows.
        cuts: row counts a batch may be cut to, ascending: the steps and the policy's preferred counts.
        uncut: so many rows are never cut.
        stamp: how many sizes had run out of memory when ``limit`` was found.
    """

    __slots__ = ("_costs", "_fits", "_seconds", "_sizes", "_version", "cuts", "lengths", "limit", "stamp", "steps",
                 "uncut")  # fmt: skip

    def __init__(self, lengths: Lengths, sizes: Sizes, costs: Costs) -> None:
        self.lengths = lengths
        self.steps = sizes.steps(lengths)
        self.limit = 1
        self.cuts: tuple[int, ...] = ()
        self.uncut = 0
        self.stamp = -1
        self._sizes = sizes
        self._costs = costs
        self._fits: dict[int, tuple[dict[str, int], Key]] = {}
        self._version = -1
        self._seconds: dict[int, float] = {}

    def fit(self, rows: int) -> tuple[dict[str, int], Key]:
        """The size that so many rows are run at, and its key; not to be changed."""
        found = self._fits.get(rows)
        if found is None:
            size = self._sizes.fit(rows, self.lengths)
            found = self._fits[rows] = size, self._costs.key(size)
        return found

    def seconds(self, rows: int) -> float:
        """What a batch of so many rows is predicted to take."""
        if self._version != self._costs.version:
            self._version = self._costs.version
            self._seconds.clear()
        found = self._seconds.get(rows)
        if found is None:
            found = self._seconds[rows] = self._costs.seconds(self.fit(rows)[1])
        return found

    def end_s(self, ahead_s: float, rows: int) -> float:
        """When a request is predicted to be answered, from when its device is free.

        It ends with the batch that it ends in. If that is not the next one, it will be full by then.

        Args:
            ahead_s: device seconds of what goes before it, or along with it.
            rows: of the request.

        Returns:
            Seconds; no more than what is ahead takes if the run of these lengths would be a guess.
        """
        if not self._costs.has_lengths(self.fit(1)[1]):
            return ahead_s
        batches = (ahead_s / self.row_s() + rows) / self.limit
        if batches <= 1:
            return self.seconds(min(self.limit, math.ceil(batches * self.limit - _ROUNDING)))
        return math.ceil(batches - _ROUNDING) * self.seconds(self.limit)

    def least_s(self) -> float:
        """What the smallest batch is predicted to take; 0 if that would be a guess."""
        return self.seconds(1) if self._costs.has_lengths(self.fit(1)[1]) else 0.0

    def row_s(self) -> float:
        """Predicted seconds of one row in a full batch."""
        return self.seconds(self.limit) / self.limit

    def takes(self, other: Kind) -> bool:
        """Whether rows of another class may ride in a batch of this one."""
        return other is self or self._sizes.joins(other.lengths, self.lengths)


class Kinds:
    """All classes met so far, and the sizes that ran out of memory.

    Args:
        sizes: the model's.
        costs: predicted seconds.
        policy: its bounds on a batch.

    Attributes:
        stamp: how many sizes ran out of memory; a class with another stamp must be refreshed.
    """

    def __init__(self, sizes: Sizes, costs: Costs, policy: BatchPolicy) -> None:
        self._sizes = sizes
        self._costs = costs
        self._policy = policy
        self._by_lengths: dict[Lengths, Kind] = {}
        self._too_large: list[Key] = []
        self.stamp = 0

    def of(self, lengths: Lengths) -> Kind:
        """The class of a request's lengths."""
        kind = self._by_lengths.get(lengths)
        if kind is None:
            return self._new(lengths)
        if kind.stamp != self.stamp:
            self.refresh(kind)
        return kind

    def refresh(self, kind: Kind) -> None:
        """Bring a class's limit up to date."""
        policy = self._policy
        limit = self._sizes.max_rows(kind.lengths)
        if policy.max_rows is not None:
            limit = min(limit, policy.max_rows)
        if policy.max_tokens is not None:
            limit = min(limit, policy.max_tokens // max(1, math.prod(kind.lengths)))
        kind.limit = self._most_that_fit(kind, max(1, limit))
        kind.cuts = tuple(sorted({rows for rows in (*kind.steps, *policy.preferred) if rows <= kind.limit}))
        kind.uncut = kind.cuts[0] if kind.cuts else kind.limit
        kind.stamp = self.stamp

    def _most_that_fit(self, kind: Kind, limit: int) -> int:
        """The most rows of a size that did not run out of memory; 1 even if it did."""
        if not self._too_large:
            return limit
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            key = kind.fit(middle)[1]
            if any(_covers(key, failed) for failed in self._too_large):
                high = middle - 1
            else:
                low = middle
        return low

    def shrink(self, size: Mapping[str, int]) -> bool:
        """Never again run a size, nor one that is at least as large in every symbol.

        Where any row count runs as it is, the next is half as large: a row less each time would fail for long.

        Args:
            size: what ran out of memory.

        Returns:
            False if the class has no smaller size; then nothing changes.
        """
        key = self._costs.key(size)
        rows, lengths = self._costs.split(key)
        kind = self.of(self._sizes.lengths_of(lengths))
        bar = rows if kind.steps else rows // 2 + 1
        failed = self._costs.with_rows(key, bar)
        if _covers(kind.fit(1)[1], failed):
            return False
        self._too_large = [other for other in self._too_large if not _covers(other, failed)] + [failed]
        self.stamp += 1
        return True

    def _new(self, lengths: Lengths) -> Kind:
        if len(self._by_lengths) >= _MOST_KINDS:
            self._by_lengths.clear()  # works that wait keep theirs
        name = self._sizes.lengths_of(lengths)
        kind = self._by_lengths.get(name)
        if kind is None:
            kind = self._by_lengths[name] = Kind(name, self._sizes, self._costs)
        self._by_lengths[lengths] = kind
        self.refresh(kind)
        return kind


def _covers(size: Key, other: Key) -> bool:
    """Whether a size is at least as large as another in every symbol."""
    return all(a >= b for a, b in zip(size, other, strict=True))
