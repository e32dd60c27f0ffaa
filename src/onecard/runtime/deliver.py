"""From the answers of a batch to the answers of its callers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onecard.runtime.future import BatchTiming, RequestTiming
from onecard.runtime.request import Request
from onecard.runtime.slots import as_array
from onecard.runtime.work import Batch, Slice
from onecard.spec import Spec

_WORTH_SHARING_BYTES = 64 << 10  # smaller parts are copied, so that nobody holds a whole batch for the sake of a row


class Delivery:
    """Cuts batches up for the callers of one model.

    Args:
        spec: of the model; only the outputs matter.
    """

    def __init__(self, spec: Spec) -> None:
        batch = spec.batch_symbol
        others = [name for name in spec.symbols if name != batch]
        self._batched = batch is not None
        self._names = [t.name for t in spec.outputs]
        self._dtypes = {t.name: getattr(torch, t.dtype) for t in spec.outputs}
        self._dimensions = {t.name: len(t.shape) for t in spec.outputs}
        self._cuts = {  # output to (axis, which of the lengths) of every symbol that is padded
            t.name: [(axis, others.index(dim)) for axis, dim in enumerate(t.shape) if dim in others]
            for t in spec.outputs
        }

    def deliver(self, batch: Batch, outputs: Mapping[str, Tensor], owned: bool, timing: BatchTiming) -> None:
        """Give every caller its rows, without padding; a request whose last row came is answered.

        The cutting is NumPy's: each of PyTorch's operators lets go of the interpreter and has to wait for it again,
        which takes up to 5 ms beside a caller that computes in Python.

        Args:
            batch: what was run.
            outputs: the answers of the whole batch, on the host.
            owned: whether the callers may keep this memory. If not, their parts are copied.
            timing: when it was run, which whoever gets an answer is told.
        """
        arrays = {name: as_array(outputs[name]) for name in self._names}
        shares_bytes = 0 if len(batch.slices) == 1 else _WORTH_SHARING_BYTES
        row = 0
        for piece in batch.slices:
            if not piece.work.gone:
                part = {}
                for name, array in arrays.items():
                    cut = array[self._index(name, row, piece)]
                    keeps = owned and cut.nbytes >= shares_bytes and cut.flags.c_contiguous
                    part[name] = cut if keeps else cut.copy()
                self._add(piece, part, batch, timing)
            row += piece.rows

    def _index(self, name: str, row: int, piece: Slice) -> Any:
        """Where a request's rows lie in an output."""
        cuts = self._cuts[name]
        if not cuts:
            return slice(row, row + piece.rows) if self._batched else ...
        index = [slice(None)] * self._dimensions[name]
        if self._batched:
            index[0] = slice(row, row + piece.rows)
        for axis, which in cuts:
            index[axis] = slice(piece.work.lengths[which])
        return tuple(index)

    def _add(self, piece: Slice, part: dict[str, np.ndarray[Any, Any]], batch: Batch, timing: BatchTiming) -> None:
        work = piece.work
        request: Request = work.request
        request.parts[piece.start] = part
        request.back += piece.rows
        if request.back < work.rows:
            return
        whole = request.whole(self._dtypes)
        total_s = time.monotonic() - work.arrived
        work.gone = True
        request.receiver.solve(whole, RequestTiming(request.queue_s, total_s, batch.rows, len(request.parts), timing))
