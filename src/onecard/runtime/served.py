"""What an engine runs: a bundle's variants as one model that says which sizes it runs at.

The scheduler asks a :class:`Served` what may share a batch; staging asks it for the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onecard.bundle.open import Bundle, load_bundle
from onecard.runtime.work import Lengths
from onecard.spec import Bucket, Spec, smallest_fit

if TYPE_CHECKING:
    from torch import Tensor


class Served(Protocol):
    """A model that is loaded and ready; one batch runs at a time.

    Attributes:
        spec: inputs, outputs and symbols.
        device: ``cpu`` or ``cuda:N``.
        ruled_out: better variants that do not run here, with the reason.
    """

    spec: Spec
    device: str
    ruled_out: dict[str, str]

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        """Answer a batch.

        Args:
            inputs: on the device, in the spec's dtypes, of just ``size``.
            size: what :meth:`fit` gave.

        Returns:
            Fresh tensors on the device; on a GPU they may still be under way on the current stream.
        """
        ...

    def variant(self, size: Bucket) -> str:
        """The recipe that runs batches of this size."""
        ...

    def sizes(self) -> list[Bucket]:
        """The sizes to warm up at, the largest first."""
        ...

    def seconds(self) -> dict[tuple[int, ...], float]:
        """What is known of the time a size takes, by the sizes of the spec's symbols in their order."""
        ...

    def lengths_of(self, lengths: Lengths) -> Lengths:
        """The class of lengths that share a batch: a bucket's where padding is part of the variant, else the same."""
        ...

    def joins(self, a: Lengths, b: Lengths) -> bool:
        """Whether rows of class ``a`` may ride in a batch of class ``b``: padding them up was proved right."""
        ...

    def max_rows(self, lengths: Lengths) -> int:
        """The most rows of one batch of a class; 1 where the model has no batch dimension."""
        ...

    def fit(self, rows: int, lengths: Lengths) -> Bucket:
        """The size that so many rows are run at, padding included."""
        ...

    def steps(self, lengths: Lengths) -> tuple[int, ...]:
        """The row counts behind which the size that is run grows, ascending; empty if every count runs as it is."""
        ...

    def close(self) -> None:
        """Release it."""
        ...


class BundleModel:
    """A bundle as an engine sees it: which variant runs which size, and what may be padded.

    Args:
        bundle: opened; it is closed with this.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.spec = bundle.spec
        self.device = bundle.device
        self.ruled_out = dict(bundle.skipped)
        self._batch = self.spec.batch_symbol
        self._others = tuple(name for name in self.spec.symbols if name != self._batch)
        self._buckets = [dict(bucket) for bucket in bundle.manifest.buckets] or [{}]
        self._padded = self._padded_classes()

    @classmethod
    def open(
        cls, path: str | Path, device: str = "auto", *, check_files: bool = True, device_memory: int | None = None
    ) -> BundleModel:
        """Open a bundle for an engine; see :func:`onecard.bundle.open.load_bundle`."""
        return cls(load_bundle(path, device, check_files=check_files, device_memory=device_memory))

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        return self.bundle.route(size)(inputs)

    def variant(self, size: Bucket) -> str:
        return self.bundle.route(size).recipe.id

    def sizes(self) -> list[Bucket]:
        return sorted(self._buckets, key=lambda b: -math.prod(b.values()))

    def seconds(self) -> dict[tuple[int, ...], float]:
        known = {}
        for bucket in self._buckets:
            entry = self.bundle.manifest.variant(self.variant(bucket))
            timing = entry.measurement.timing(bucket) if entry else None
            if timing is not None and timing.samples_ms:
                known[tuple(bucket.values())] = timing.median_ms / 1e3
        return known

    def lengths_of(self, lengths: Lengths) -> Lengths:
        holds = (c for c in self._padded if _within(lengths, c))
        return min(holds, key=math.prod, default=lengths)

    def joins(self, a: Lengths, b: Lengths) -> bool:
        return a == b or (b in self._padded and _within(a, b))

    def max_rows(self, lengths: Lengths) -> int:
        if self._batch is None:
            return 1
        holds = [b for b in self._buckets if _within(lengths, self._lengths(b))]
        largest = max((b[self._batch] for b in holds), default=0)
        if not holds or not self.bundle.route(self._size(largest, lengths)).is_static:
            return self.spec.symbols[self._batch].high
        return largest

    def fit(self, rows: int, lengths: Lengths) -> Bucket:
        size = self._size(rows, lengths)
        bucket = smallest_fit(self._buckets, size)
        return bucket if bucket is not None and self.bundle.route(size).is_static else size

    def steps(self, lengths: Lengths) -> tuple[int, ...]:
        if self._batch is None:
            return ()
        holds = (b for b in self._buckets if _within(lengths, self._lengths(b)))
        return tuple(sorted({b[self._batch] for b in holds if self.bundle.route(b).is_static}))

    def close(self) -> None:
        self.bundle.close()

    def _size(self, rows: int, lengths: Lengths) -> Bucket:
        size = dict(zip(self._others, lengths, strict=True))
        if self._batch is not None:
            size[self._batch] = max(rows, self.spec.symbols[self._batch].low)
        return {name: size[name] for name in self.spec.symbols}

    def _lengths(self, bucket: Bucket) -> Lengths:
        return tuple(bucket[name] for name in self._others)

    def _padded_classes(self) -> frozenset[Lengths]:
        """The lengths of buckets that only static variants serve: the gate proved padding up to them right."""
        classes = {self._lengths(b) for b in self._buckets}
        return frozenset(
            c for c in classes if all(self.bundle.route(b).is_static for b in self._buckets if self._lengths(b) == c)
        )


def _within(lengths: Sequence[int], limit: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(lengths, limit, strict=True))
