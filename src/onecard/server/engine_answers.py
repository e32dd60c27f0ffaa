"""What came back from the engine: a request's outputs where they lie, and errors as they were raised there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from onecard import errors
from onecard.errors import EngineError, OnecardError, QueueFullError
from onecard.ipc.messages import Answered, Done, Refused
from onecard.ipc.segment import Segment
from onecard.ipc.tensors import Tensor
from onecard.server.engine_memory import Lease, lend
from onecard.server.oip_types import DATATYPES, Array, Written

_ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, OnecardError)
}


class EngineAnswer:
    """An answer; its arrays stay as they are until it is released, or until nothing refers to them any more.

    Args:
        answered: what the engine said.
        segment: of answers, of the connection that it came over.
        give_back: called with the offset of each part of the segment that may be used again, from any thread.

    Attributes:
        outputs: arrays by name, bfloat16 as int16; :class:`Written` for one that is in the device's memory.
        version: of the model that answered.
        queue_s: how long the request waited.
        total_s: from when the engine had it to its answer.
        rows: of the batch that it was answered with.
        stages: when it was run, if it is traced.

    Raises:
        ValueError: an array that does not lie in the segment, or does not fit its bytes.
        KeyError: a dtype that is not known.
    """

    __slots__ = ("_leases", "outputs", "queue_s", "rows", "stages", "total_s", "version")

    def __init__(self, answered: Answered, segment: Segment, give_back: Callable[[int], None]) -> None:
        self._leases: list[Lease] = []
        self.outputs: dict[str, Any] = {
            tensor.name: Written(tensor.dtype, tensor.shape)
            if tensor.region
            else self._array(tensor, segment, give_back)
            for tensor in answered.outputs
        }
        self.version = answered.version
        self.queue_s = answered.queue_s
        self.total_s = answered.total_s
        self.rows = answered.rows
        self.stages = answered.stages

    def release(self) -> None:
        """Say that the outputs are not read any more, though something may still refer to them."""
        for lease in self._leases:
            lease.release()

    def _array(self, tensor: Tensor, segment: Segment, give_back: Callable[[int], None]) -> Array:
        dtype = DATATYPES[tensor.dtype].numpy
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if tensor.offset < 0:
            if len(tensor.data) != nbytes:
                raise ValueError(f"output '{tensor.name}' has {len(tensor.data)} bytes, expected {nbytes}")
            return np.ndarray(tensor.shape, dtype, tensor.data)
        lease = lend(segment, tensor.offset, nbytes, give_back)
        self._leases.append(lease)
        return np.ndarray(tensor.shape, dtype, lease.data)


def error_of(told: Refused | Done) -> OnecardError:
    """The error that the engine raised, in its own class where that is one of onecard's."""
    kind = _ERRORS.get(told.kind, EngineError)
    if kind is QueueFullError and isinstance(told, Refused):
        return QueueFullError(told.message, told.cure, told.retry_after_s)
    return kind(told.message, told.cure)
