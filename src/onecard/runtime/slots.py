"""The memory of a staging slot: where each buffer lies in it, how callers' rows get in, and what is zeroed again.

All sizes share one allocation, so that a slot costs what its largest batch needs and not what all of them do.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onecard.errors import EngineError

ALIGNMENT_BYTES = 256
"""Of every buffer within its allocation: what GPU loads and copies, and AVX-512, are fastest at."""
_PARALLEL_BYTES = 1 << 20  # above it a copy is worth several threads, and torch's 2 us a call no longer matter
_MOST_VIEWS = 1024  # of a dynamic model every size is another view

Array = Tensor | np.ndarray[Any, Any]


class Buffer(NamedTuple):
    """One piece of memory seen twice: as a tensor, and as a NumPy array (bfloat16 as int16) where it is on the host."""

    tensor: Tensor
    array: np.ndarray[Any, Any] | None


class Slab:
    """Named buffers in one allocation.

    Args:
        memory: uint8, one dimension.
        offsets: name to where its buffer begins in ``memory``, in bytes.
        bounds: name to the bytes of it.
    """

    def __init__(self, memory: Tensor, offsets: Mapping[str, int], bounds: Mapping[str, int]) -> None:
        self._memory = memory
        self._offsets = offsets
        self._bounds = bounds
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Buffer] = {}

    def view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Buffer:
        """A buffer as a contiguous tensor that begins where the buffer does."""
        key = name, dtype, shape
        if key not in self._views:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            nbytes = math.prod(shape) * dtype.itemsize
            tensor = self.bytes(name, 0, nbytes).view(dtype).view(shape)
            self._views[key] = Buffer(tensor, as_array(tensor) if tensor.device.type == "cpu" else None)
        return self._views[key]

    def bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Some bytes of a buffer, [stop - start].

        Raises:
            EngineError: the buffer ends before; a batch is larger than all sizes that the stage was made for.
        """
        if stop > self._bounds[name]:
            raise EngineError(f"'{name}' needs {stop} bytes of a staging buffer of {self._bounds[name]}.")
        offset = self._offsets[name]
        return self._memory[offset + start : offset + stop]


def lay_out(nbytes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Place buffers behind each other.

    Args:
        nbytes: what each buffer needs at its largest.

    Returns:
        Where each begins (a multiple of ``ALIGNMENT_BYTES``), and the bytes of all.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, size in nbytes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


class Padding:
    """Which rows of a buffer may hold something else than zeros, so that only those are zeroed again.

    The buffer is seen as [rows, ...] of one shape at a time; another shape over the same memory is taken to find
    everything dirty that was ever written. A row that a batch fills altogether is not zeroed first.

    Args:
        dirty_bytes: from the buffer's beginning, what holds garbage at first.
    """

    def __init__(self, dirty_bytes: int = 0) -> None:
        self._ever_bytes = dirty_bytes
        self._view: Tensor | None = None  # the last, by which the next is known soonest
        self._shape: tuple[int, ...] = ()
        self._itemsize = 0
        self._row_bytes = 0
        self._dirty = np.zeros(0, np.int64)  # per row: how far along the first dimension behind the rows

    def claim(self, view: Tensor, row: int, rows: int, extents: tuple[int, ...]) -> None:
        """Before rows are written: put zeros where the writer will not write.

        Args:
            view: the buffer, [rows, ...].
            row: the first that will be written.
            rows: how many.
            extents: how much of each of the other dimensions will be written, from its beginning.
        """
        self._adopt(view)
        full = self._shape[1:]
        mine = self._dirty[row : row + rows]
        if extents == full:
            mine[:] = _along(full)
        elif extents[1:] == full[1:]:  # token sequences: only what a longer one left behind this one
            longest = int(mine.max(initial=0))
            if longest > extents[0]:
                view[row : row + rows, extents[0] : longest].zero_()
            mine[:] = extents[0]
        else:
            if mine.any():
                view[row : row + rows].zero_()
            mine[:] = _along(full)

    def finish(self, view: Tensor, rows: int) -> None:
        """After all rows are claimed: put zeros in the rows behind them."""
        self._adopt(view)
        behind = np.flatnonzero(self._dirty[rows:])
        if behind.size:
            view[rows + int(behind[0]) : rows + int(behind[-1]) + 1].zero_()
            self._dirty[rows:] = 0

    def _adopt(self, view: Tensor) -> None:
        if view is self._view:
            return
        self._view = view
        shape = tuple(view.shape)
        if shape == self._shape and view.element_size() == self._itemsize:
            return
        used = np.flatnonzero(self._dirty)
        if used.size:
            self._ever_bytes = max(self._ever_bytes, (int(used[-1]) + 1) * self._row_bytes)
        self._shape, self._itemsize = shape, view.element_size()
        self._row_bytes = math.prod(shape[1:]) * self._itemsize
        self._dirty = np.zeros(shape[0], np.int64)
        self._dirty[: -(-self._ever_bytes // max(1, self._row_bytes))] = _along(shape[1:])


def put(buffer: Buffer, row: int, source: Array) -> None:
    """Copy rows of a caller, [rows, ...] of the buffer's dtype, to the rows of a host buffer that begin at ``row``."""
    where = part(row, source.shape[0], tuple(source.shape[1:]))
    if source.nbytes > _PARALLEL_BYTES or buffer.array is None:
        buffer.tensor[where].copy_(as_tensor(source))
    else:
        buffer.array[where] = as_array(source)


def part(row: int, rows: int, extents: Sequence[int]) -> tuple[slice, ...]:
    """The index of some rows of a buffer, up to the extents of what they hold."""
    return (slice(row, row + rows), *(slice(0, extent) for extent in extents))


def as_array(source: Array) -> np.ndarray[Any, Any]:
    """The same memory as a NumPy array; bfloat16, which NumPy has not, as int16."""
    if isinstance(source, np.ndarray):
        return source
    source = source.detach()
    array: np.ndarray[Any, Any] = (source.view(torch.int16) if source.dtype == torch.bfloat16 else source).numpy()
    return array


def as_tensor(source: Array) -> Tensor:
    """The same memory as a tensor, for reading only: a read-only array is taken as it is, without a warning.

    What torch cannot describe (negative strides, elements that are not aligned) is copied.
    """
    if isinstance(source, Tensor):
        return source.detach()
    if not source.flags.aligned or min(source.strides, default=0) < 0:
        source = source.copy()
    if source.flags.writeable:
        return torch.from_numpy(source)
    source = np.ascontiguousarray(source)
    if source.flags.writeable:
        return torch.from_numpy(source)
    if not source.nbytes:
        return torch.from_numpy(source.copy())
    address, _ = source.__array_interface__["data"]
    memory = (ctypes.c_ubyte * source.nbytes).from_address(address)
    memory.keeper = source  # type: ignore[attr-defined]  # the tensor holds it through the array over it
    return torch.from_numpy(np.frombuffer(memoryview(memory), source.dtype).reshape(source.shape))


def flat_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, uint8 [nbytes]."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _along(extents: Sequence[int]) -> int:
    return extents[0] if extents else 1
