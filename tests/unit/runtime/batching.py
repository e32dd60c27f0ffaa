"""Models for the scheduler's tests: sizes that are exact arithmetic, and a queue that is checked by brute force."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping

from onecard.runtime.batcher import Batcher
from onecard.runtime.cost import Costs
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.work import Batch, Lengths, Work


class Buckets:
    """Static sizes: rows and one length are padded up to the next of a few."""

    def __init__(self, rows: Iterable[int], lengths: Iterable[int] = ()) -> None:
        self.rows = tuple(rows)
        self.lengths = tuple(lengths)

    def lengths_of(self, lengths: Lengths) -> Lengths:
        return tuple(self.lengths[bisect_left(self.lengths, n)] for n in lengths)

    def joins(self, a: Lengths, b: Lengths) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True))

    def max_rows(self, lengths: Lengths) -> int:
        return self.rows[-1]

    def fit(self, rows: int, lengths: Lengths) -> dict[str, int]:
        size = {"B": self.rows[bisect_left(self.rows, rows)]}
        return size | ({"S": self.lengths_of(lengths)[0]} if lengths else {})

    def steps(self, lengths: Lengths) -> tuple[int, ...]:
        return self.rows


class Free:
    """Dynamic sizes: any rows up to a bound, any length, and only equal lengths share a batch."""

    def __init__(self, most: int, has_lengths: bool = False) -> None:
        self.most = most
        self.rows = tuple(range(1, most + 1))
        self.lengths = tuple(range(1, 65)) if has_lengths else ()

    def lengths_of(self, lengths: Lengths) -> Lengths:
        return lengths

    def joins(self, a: Lengths, b: Lengths) -> bool:
        return a == b

    def max_rows(self, lengths: Lengths) -> int:
        return self.most

    def fit(self, rows: int, lengths: Lengths) -> dict[str, int]:
        return {"B": rows} | ({"S": lengths[0]} if lengths else {})

    def steps(self, lengths: Lengths) -> tuple[int, ...]:
        return ()


def symbols(sizes: Buckets | Free) -> tuple[str, ...]:
    return ("B", "S") if sizes.lengths else ("B",)


def batcher(
    sizes: Buckets | Free, measured: Iterable[tuple[Mapping[str, int], float]] = (), **policy: object
) -> Batcher:
    return Batcher(sizes, Costs(symbols(sizes), "B", measured), BatchPolicy(**policy))  # type: ignore[arg-type]


def linear(sizes: Buckets | Free, fixed_s: float, row_s: float) -> list[tuple[dict[str, int], float]]:
    """Measurements of a model that takes ``fixed_s + rows * length * row_s``."""
    lengths = [{"S": length} for length in sizes.lengths] or [{}]
    return [
        ({"B": rows} | other, fixed_s + rows * other.get("S", 1) * row_s) for rows in sizes.rows for other in lengths
    ]


def rows_of(batch: Batch | None) -> list[tuple[Work, int, int]]:
    """What is in a batch, in plain tuples."""
    assert batch is not None
    return [tuple(each) for each in batch.slices]  # type: ignore[misc]


def check(batch: Batch, sizes: Buckets | Free, policy: BatchPolicy) -> None:
    """A batch keeps to all bounds, and says of itself what is true."""
    assert batch.rows == sum(rows for _, _, rows in batch.slices) > 0
    assert all(rows > 0 and start >= 0 and start + rows <= work.rows for work, start, rows in batch.slices)
    longest = tuple(map(max, zip(*(work.lengths for work, _, _ in batch.slices), strict=True)))
    assert batch.lengths == longest
    kinds = [sizes.lengths_of(work.lengths) for work, _, _ in batch.slices]
    lengths = next(kind for kind in kinds if all(sizes.joins(other, kind) for other in kinds))
    assert batch.size == sizes.fit(batch.rows, lengths)
    assert batch.rows <= sizes.max_rows(lengths)
    assert policy.max_rows is None or batch.rows <= policy.max_rows
    tokens = batch.rows * math.prod(lengths)
    assert policy.max_tokens is None or tokens <= policy.max_tokens or batch.rows == 1
