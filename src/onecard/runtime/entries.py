"""The inputs of a model as a stage meets them: whose rows, in which of two forms, and how large at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onecard.errors import SpecError
from onecard.runtime.ingest import Ingest, Shape, check_ingests, dtype_name
from onecard.runtime.slots import Array
from onecard.spec import Bucket, Spec, TensorSpec

_MOST_SIZES = 1024  # remembered; a dynamic model may meet ever new ones


class Source(NamedTuple):
    """Rows of one caller within a batch.

    Args:
        inputs: input name to host array, as the caller gave it: of the spec's dtype or of an ingest's raw one, of
            any layout, read-only or not. Not to be changed before the flight was waited for.
        start: the first of its rows that is meant.
        rows: how many.
    """

    inputs: dict[str, Tensor | np.ndarray[Any, Any]]
    start: int
    rows: int


@dataclass(frozen=True)
class Entry:
    """One input of the model.

    A stage sees every input as ``[rows, ...]``: of a model without a batch dimension, as one row.

    Args:
        spec: name, dtype and shape.
        dtype: of the model's form.
        batched: whether the first dimension of the spec is the batch.
        ingest: the raw form that callers may send instead, if any.
        raw_dtype: of the raw form.
    """

    spec: TensorSpec
    dtype: torch.dtype
    batched: bool
    ingest: Ingest | None
    raw_dtype: torch.dtype | None
    _shapes: dict[tuple[tuple[str, int], ...], Shape] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def name(self) -> str:
        return self.spec.name

    def shape(self, size: Bucket) -> Shape:
        """Of the model's form at a size, [rows, ...]."""
        key = tuple(size.items())
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= _MOST_SIZES:
                self._shapes.clear()
            concrete = self.spec.concrete(size)
            shape = self._shapes[key] = concrete if self.batched else (1, *concrete)
        return shape

    def raw_shape(self, size: Bucket) -> Shape:
        """Of the raw form at a size, [rows, ...]; of the model's form where there is no other."""
        return self.shape(size) if self.ingest is None else self._raw(self.shape(size))

    def rows(self, source: Source) -> Array:
        """A caller's rows, [rows, ...], in the form in which they came.

        Raises:
            SpecError: the array has fewer; the rows of those who follow would be taken for this caller's.
        """
        array = source.inputs[self.name]
        if not self.batched:
            return array[None]
        rows = array[source.start : source.start + source.rows]
        if rows.shape[0] != source.rows:
            end = source.start + source.rows
            raise SpecError(f"input '{self.name}' has {array.shape[0]} rows, expected {end} at least.")
        return rows

    def is_raw(self, array: Array) -> bool:
        """Whether an array is in the raw form.

        Raises:
            SpecError: it is in neither.
        """
        dtype = array.dtype if isinstance(array, Tensor) else _TORCH.get(array.dtype)
        if dtype == self.dtype:
            return False
        if dtype is None or dtype != self.raw_dtype:
            raise SpecError(f"input '{self.name}' is {dtype_name(array)}, expected {self.spec}.")
        return True

    def extents(self, array: Array) -> Shape:
        """How much of a row of the model's form an array fills, which may be in either form."""
        if self.ingest is None or not self.is_raw(array):
            return tuple(array.shape[1:])
        if self.batched:
            return self.ingest.model_shape(tuple(array.shape))[1:]
        return self.ingest.model_shape(tuple(array.shape[1:]))

    def convert(self, raw: Tensor, out: Tensor) -> None:
        """Make rows of the model's form, [rows, ...] both, on the current stream."""
        if self.ingest is None:
            raise SpecError(f"input '{self.name}' has no raw form.")
        if self.batched:
            self.ingest(raw, out)
        else:
            self.ingest(raw[0], out[0])

    def given(self, rows: Tensor) -> Tensor:
        """What the model is given of a buffer of rows."""
        return rows if self.batched else rows[0]

    def _raw(self, shape: Shape) -> Shape:
        if self.ingest is None:
            return shape
        return self.ingest.raw_shape(shape) if self.batched else (1, *self.ingest.raw_shape(shape[1:]))


def make_entries(spec: Spec, ingests: Sequence[Ingest]) -> list[Entry]:
    """The inputs of a model, in the spec's order.

    Raises:
        SpecError: an ingest that does not fit.
    """
    found = check_ingests(spec, ingests)
    batched = spec.batch_symbol is not None
    entries = []
    for tensor in spec.inputs:
        ingest = found.get(tensor.name)
        raw_dtype = None if ingest is None else getattr(torch, ingest.raw_dtype)
        entries.append(Entry(tensor, getattr(torch, tensor.dtype), batched, ingest, raw_dtype))
    return entries


def capacities(entries: Sequence[Entry], sizes: Sequence[Bucket]) -> dict[str, int]:
    """The most bytes that any size needs, by buffer: of every input, and of every raw form (see :func:`raw_name`)."""
    most: dict[str, int] = {}
    for entry in entries:
        most[entry.name] = max(math.prod(entry.shape(size)) for size in sizes) * entry.dtype.itemsize
        if entry.raw_dtype is not None:
            elements = max(math.prod(entry.raw_shape(size)) for size in sizes)
            most[raw_name(entry)] = elements * entry.raw_dtype.itemsize
    return most


def raw_name(entry: Entry) -> str:
    """The name of the buffer of an input's raw form; no input is called so."""
    return f"{entry.name} (raw)"


_TORCH: dict[Any, torch.dtype] = {
    np.dtype(name): getattr(torch, name)
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
