"""Which road each caller's rows take to the card: straight from where they lie, or through the slot's pinned buffer.

Rows that the card can read by itself are not touched by the CPU. All others are collected in pinned memory first, rows
that follow each other becoming one copy. Raw rows travel as they are and are converted on the card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from onecard.runtime.entries import Entry, Source, raw_name
from onecard.runtime.ingest import Shape
from onecard.runtime.slots import Array, Padding, Slab, as_array, as_tensor, flat_bytes, put
from onecard.runtime.slots import Buffer as HostBuffer
from onecard.spec import Bucket

DIRECT_BYTES = 32 * 1024
"""Rows of fewer bytes are collected even if they are pinned: starting a copy costs about as much as copying these."""


class Move(NamedTuple):
    """One copy to the device: bytes [start, stop) of a buffer there, from host memory that the card can read."""

    buffer: str
    start: int
    stop: int
    host: Tensor


class Stretch(NamedTuple):
    """Consecutive rows of a model input.

    Args:
        row: the first.
        rows: how many.
        extents: what of the other dimensions they fill.
        raw: where their raw form begins in its buffer, in bytes, and its shape; None if they come as the model
            takes them.
    """

    row: int
    rows: int
    extents: Shape
    raw: tuple[int, Shape] | None


@dataclass(eq=False, slots=True)
class Load:
    """What is to be done for one input of one batch, once the host has done its part.

    Args:
        moves: copies, in any order.
        stretches: the rows that the device's buffer will hold, in order.
    """

    moves: list[Move] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)


def load_rows(
    entry: Entry,
    sources: Sequence[Source],
    size: Bucket,
    slot: tuple[Slab, Padding],
    readable: Callable[[Tensor], bool],
) -> Load:
    """Do the host's part for one input: collect what must be collected.

    Args:
        entry: the input.
        sources: whose rows.
        size: what will be run.
        slot: the slot's pinned buffers, and the state of this input's.
        readable: whether the card can copy from a host tensor by itself.
    """
    load = Load()
    gathered: list[tuple[str, int, int]] = []
    row = 0
    for source in sources:
        array = entry.rows(source)
        raw = entry.is_raw(array)
        count, extents = array.shape[0], entry.extents(array)
        name, shape = (raw_name(entry), entry.raw_shape(size)) if raw else (entry.name, entry.shape(size))
        start = row * math.prod(shape[1:]) * array.itemsize
        whole = tuple(array.shape[1:]) == shape[1:]
        if (host := _direct(array, readable)) is not None and (whole or raw):
            load.moves.append(Move(name, start, start + array.nbytes, host))
        elif raw:  # as densely as they came: if they are smaller than the size, the gap is behind the last of them
            _append(gathered, name, start, start + array.nbytes)
            put(_place(slot[0], entry, start, array), 0, array)
        else:
            buffer = slot[0].view(name, entry.dtype, shape)
            slot[1].claim(buffer.tensor, row, count, extents)
            put(buffer, row, array)
            _append(gathered, name, start, start + count * math.prod(shape[1:]) * array.itemsize)
            extents = shape[1:]  # padded already
        _extend(load.stretches, Stretch(row, count, extents, (start, tuple(array.shape)) if raw else None), whole)
        row += count
    load.moves += [Move(name, start, stop, slot[0].bytes(name, start, stop)) for name, start, stop in gathered]
    return load


def _direct(array: Array, readable: Callable[[Tensor], bool]) -> Tensor | None:
    """The bytes of rows that may go straight to the card, or None."""
    if array.nbytes < DIRECT_BYTES:
        return None
    if not (array.is_contiguous() if isinstance(array, Tensor) else array.flags.c_contiguous):
        return None
    tensor = as_tensor(array)
    return flat_bytes(tensor) if readable(tensor) else None


def _append(runs: list[tuple[str, int, int]], name: str, start: int, stop: int) -> None:
    """One more collected run of bytes, joined to the last if it follows it."""
    if runs and runs[-1][0] == name and runs[-1][2] == start:
        runs[-1] = (name, runs[-1][1], stop)
    else:
        runs.append((name, start, stop))


def _extend(stretches: list[Stretch], new: Stretch, whole: bool) -> None:
    """The same for rows; raw ones are joined where both fill their rows, so that one call converts them."""
    last = stretches[-1] if stretches else None
    if last is None or last.extents != new.extents or (last.raw is None) != (new.raw is None):
        stretches.append(new)
    elif last.raw is None or new.raw is None:
        stretches[-1] = last._replace(rows=last.rows + new.rows)
    elif whole:
        shape = (last.rows + new.rows, *new.raw[1][1:])
        stretches[-1] = last._replace(rows=shape[0], raw=(last.raw[0], shape))
    else:
        stretches.append(new)


def _place(slab: Slab, entry: Entry, start: int, array: Array) -> HostBuffer:
    """Where raw rows are collected, in their own shape."""
    dtype = entry.raw_dtype or entry.dtype
    tensor = slab.bytes(raw_name(entry), start, start + array.nbytes).view(dtype).view(tuple(array.shape))
    return HostBuffer(tensor, as_array(tensor))
