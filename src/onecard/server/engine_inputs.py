"""The inputs of one front's requests: views of the segment that it wrote them into, each checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from onecard.errors import UsageError
from onecard.ipc.segment import Segment
from onecard.ipc.tensors import RUNNING, Tensor
from onecard.runtime.slots import Array
from onecard.spec import DTYPES

_CARRIERS = {name: np.dtype(np.int16 if name == "bfloat16" else name) for name in DTYPES}
_MOST_SHAPES = 4096  # remembered; a client that sends ever new shapes must not fill the memory
_MOST_DIMENSIONS = 32  # of NumPy before version 2
_MARK_BYTES = 4


class Requests:
    """The segment that a front writes its requests into.

    Args:
        segment: it is not closed here.
    """

    def __init__(self, segment: Segment) -> None:
        self.array = segment.array
        self._nbytes = segment.nbytes
        self._marks = segment.array[: segment.nbytes // _MARK_BYTES * _MARK_BYTES].view("<u4")
        self._layouts: dict[tuple[str, tuple[int, ...]], tuple[np.dtype[Any], int]] = {}

    def view(self, tensor: Tensor, as_tensor: bool) -> Array:
        """An input where it lies.

        Args:
            tensor: as the front says.
            as_tensor: give a tensor even if NumPy has its type.

        Raises:
            UsageError: there is no such array in the segment.
        """
        layout = self._layouts.get((tensor.dtype, tensor.shape)) or self._layout(tensor)
        dtype, nbytes = layout
        offset = tensor.offset
        if not 0 <= offset <= self._nbytes - nbytes or offset % dtype.itemsize:
            raise UsageError(
                f"input '{tensor.name}' is {nbytes} bytes at {offset}, expected a multiple of {dtype.itemsize} "
                f"and an end within the segment's {self._nbytes} bytes."
            )
        array: np.ndarray[Any, Any] = np.ndarray(tensor.shape, dtype, self.array, offset)
        if not as_tensor:
            return array
        carrier = torch.from_numpy(array)
        return carrier.view(torch.bfloat16) if tensor.dtype == "bfloat16" else carrier

    def check_mark(self, offset: int) -> None:
        """Refuse a mark that does not lie in the segment.

        Raises:
            UsageError: it does not.
        """
        if not 0 <= offset <= self._nbytes - _MARK_BYTES or offset % _MARK_BYTES:
            raise UsageError(f"a mark at {offset}, expected a multiple of {_MARK_BYTES} below {self._nbytes}.")

    def mark(self, offset: int) -> None:
        """Say that a request runs."""
        self._marks[offset // _MARK_BYTES] = RUNNING

    def _layout(self, tensor: Tensor) -> tuple[np.dtype[Any], int]:
        dtype = _CARRIERS.get(tensor.dtype)
        if dtype is None:
            raise UsageError(f"input '{tensor.name}' has dtype '{tensor.dtype[:32]}', expected {', '.join(DTYPES)}.")
        if min(tensor.shape, default=0) < 0 or len(tensor.shape) > _MOST_DIMENSIONS:
            raise UsageError(f"input '{tensor.name}' has the shape {list(tensor.shape)[:_MOST_DIMENSIONS]}.")
        if len(self._layouts) >= _MOST_SHAPES:
            self._layouts.clear()
        layout = dtype, math.prod(tensor.shape) * dtype.itemsize
        if layout[1] <= self._nbytes:
            self._layouts[tensor.dtype, tensor.shape] = layout
        return layout
