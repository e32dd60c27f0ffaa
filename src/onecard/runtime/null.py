"""A model that computes nothing, or what a function says: for an engine's own cost and its behaviour."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onecard.runtime.work import Lengths
from onecard.spec import Bucket, Spec

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class NullModel:
    """A :class:`onecard.runtime.served.Served` on the CPU without weights.

    Args:
        spec: with outputs whose dimensions are fixed or symbols of the inputs.
        batches: the batch sizes that it is "built" for; batches are padded up to them. Empty: any size runs as it is.
        compute: from a batch's inputs to its answers; by default the answers are zeros.
        delay_s: how long a batch takes: one figure, or one that depends on the size.
    """

    device = "cpu"

    def __init__(
        self,
        spec: Spec,
        batches: Sequence[int] = (),
        compute: Compute | None = None,
        delay_s: float | Callable[[Bucket], float] = 0.0,
    ) -> None:
        self.spec = spec
        self.ruled_out: dict[str, str] = {}
        self._batches = tuple(sorted(batches))
        self._compute = compute
        self._delay = delay_s
        self._batch = spec.batch_symbol
        self._others = tuple(name for name in spec.symbols if name != self._batch)
        self._dtypes = {t.name: getattr(torch, t.dtype) for t in spec.outputs}

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        delay_s = self._delay(size) if callable(self._delay) else self._delay
        if delay_s:
            time.sleep(delay_s)
        if self._compute is not None:
            return self._compute(inputs)
        return {t.name: torch.zeros(t.concrete(size), dtype=self._dtypes[t.name]) for t in self.spec.outputs}

    def variant(self, size: Bucket) -> str:
        return "null"

    def sizes(self) -> list[Bucket]:
        largest = self.spec.largest()
        batches = self._batches[::-1] or (largest.get(self._batch or "", 1),)
        return [{**largest, **({self._batch: b} if self._batch else {})} for b in batches]

    def seconds(self) -> dict[tuple[int, ...], float]:
        if callable(self._delay):
            return {tuple(size.values()): self._delay(size) for size in self.sizes()}
        return {tuple(size.values()): self._delay for size in self.sizes() if self._delay}

    def lengths_of(self, lengths: Lengths) -> Lengths:
        return lengths

    def joins(self, a: Lengths, b: Lengths) -> bool:
        return a == b

    def max_rows(self, lengths: Lengths) -> int:
        if self._batch is None:
            return 1
        return self._batches[-1] if self._batches else self.spec.symbols[self._batch].high

    def fit(self, rows: int, lengths: Lengths) -> Bucket:
        size = dict(zip(self._others, lengths, strict=True))
        if self._batch is not None:
            size[self._batch] = next((b for b in self._batches if b >= rows), rows)
        return {name: size[name] for name in self.spec.symbols}

    def steps(self, lengths: Lengths) -> tuple[int, ...]:
        return self._batches

    def close(self) -> None:
        """Nothing is held."""
