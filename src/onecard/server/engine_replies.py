"""The answers to one front: small ones in the message, others in a segment, or waiting for room there."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from onecard.errors import EngineError
from onecard.ipc.arena import Arena, ArenaFullError
from onecard.ipc.messages import Answered, Stages, encode
from onecard.ipc.segment import Segment
from onecard.ipc.tensors import INLINE_BYTES, Tensor
from onecard.runtime.slots import Array, as_array
from onecard.server.engine_outbox import Outbox
from onecard.spec import DTYPES

UNIT_BYTES = 4096
"""The segment is shared out in multiples of it."""

_NAMES = {np.dtype(name): name for name in DTYPES if name != "bfloat16"}


class Output(NamedTuple):
    """One array of an answer; bfloat16 as int16."""

    name: str
    dtype: str
    array: np.ndarray[Any, Any]


class Solved(NamedTuple):
    """A request's answer; see :class:`onecard.ipc.messages.Answered`. What was written to the device is told apart."""

    id: int
    outputs: list[Output]
    queue_s: float
    total_s: float
    rows: int
    version: str
    written: tuple[Tensor, ...] = ()
    stages: Stages | None = None


class Replies:
    """Sends answers, for any thread, and keeps account of the segment.

    Args:
        segment: where those lie that are too large for a message. It is not closed here.
        outbox: of the front.

    Raises:
        EngineError: the segment is too small for anything.
    """

    def __init__(self, segment: Segment, outbox: Outbox) -> None:
        if segment.nbytes < UNIT_BYTES:
            raise EngineError(f"the segment of answers has {segment.nbytes} bytes, expected {UNIT_BYTES} or more.")
        self._memory = segment.array
        self._outbox = outbox
        self._lock = threading.Lock()
        self._arena = Arena(segment.nbytes, UNIT_BYTES)
        self._waiting: deque[Solved] = deque()

    def check(self, solved: Solved) -> None:
        """Refuse an answer that there will never be room for.

        Raises:
            EngineError: it is larger than the segment.
        """
        nbytes = [output.array.nbytes for output in solved.outputs]
        if sum(nbytes) <= INLINE_BYTES:
            return
        needed = sum(-(-n // UNIT_BYTES) for n in nbytes) * UNIT_BYTES
        if needed > self._arena.nbytes:
            raise EngineError(
                f"the answer needs {needed:,} bytes, but all answers together have {self._arena.nbytes:,}.",
                "Give them more with --answer-memory, or send smaller requests.",
            )

    def send(self, solved: Solved) -> None:
        """Put an answer that was checked in the outbox, at once or when there is room for it."""
        if sum([output.array.nbytes for output in solved.outputs]) <= INLINE_BYTES:
            tensors = tuple([Tensor(name, dtype, a.shape, -1, a.tobytes()) for name, dtype, a in solved.outputs])
            self._outbox.put(_encoded(solved, tensors))
            return
        with self._lock:
            offsets = None if self._waiting else self._take(solved)
            if offsets is None:
                self._waiting.append(solved)
                return
        self._place(solved, offsets)

    def free(self, offsets: Sequence[int]) -> None:
        """The front has read these parts; what waited for room is sent.

        Raises:
            EngineError: a part that was not sent.
        """
        ready: list[tuple[Solved, list[int]]] = []
        with self._lock:
            try:
                for offset in offsets:
                    self._arena.free(offset)
            except ValueError as error:
                raise EngineError(f"the front freed what it does not have: {error}.") from error
            while self._waiting and (taken := self._take(self._waiting[0])) is not None:
                ready.append((self._waiting.popleft(), taken))
        for solved, taken in ready:
            self._place(solved, taken)
        self._outbox.flush()

    @property
    def waiting(self) -> int:
        """Answers that wait for room."""
        return len(self._waiting)

    def _take(self, solved: Solved) -> list[int] | None:
        """Under the lock: a part for every output, -1 for an empty one; None, and nothing taken, without room."""
        taken: list[int] = []
        try:
            for output in solved.outputs:
                taken.append(self._arena.take(output.array.nbytes) if output.array.nbytes else -1)
        except ArenaFullError:
            for offset in taken:
                if offset >= 0:
                    self._arena.free(offset)
            return None
        return taken

    def _place(self, solved: Solved, offsets: list[int]) -> None:
        tensors = []
        for (name, dtype, array), offset in zip(solved.outputs, offsets, strict=True):
            if offset >= 0:
                np.copyto(np.ndarray(array.shape, array.dtype, self._memory, offset), array)
            tensors.append(Tensor(name, dtype, array.shape, offset))
        self._outbox.put(_encoded(solved, tuple(tensors)))


def outputs_of(answers: Mapping[str, Array]) -> list[Output]:
    """An engine's answers, NumPy arrays or tensors on the CPU, as they are sent."""
    outputs = []
    for name, answer in answers.items():
        array = as_array(answer)
        rounded = not isinstance(answer, np.ndarray) and answer.dtype == torch.bfloat16
        outputs.append(Output(name, "bfloat16" if rounded else _NAMES[array.dtype], array))
    return outputs


def _encoded(solved: Solved, tensors: tuple[Tensor, ...]) -> bytes:
    id, _, queue_s, total_s, rows, version, written, stages = solved
    return encode(Answered(id, (*tensors, *written), queue_s, total_s, rows, version, stages))
