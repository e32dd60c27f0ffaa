"""The system under test: an engine that answers LoadGen's queries from rows in memory, without LoadGen waiting for it.

It knows nothing of LoadGen's package: queries come as numbers, and answers go out as bytes.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onecard.errors import DataError, EngineError, UsageError
from onecard.runtime.engine import Engine
from onecard.runtime.future import Answer
from onecard.runtime.slots import as_array
from onecard.spec import Spec
from onecard.verify.data import Dataset

Bytes = npt.NDArray[np.uint8]
Complete = Callable[[Sequence[int], Bytes], None]
"""Takes the numbers of some queries' samples and their answers, [samples, bytes of an answer]."""

_BULK_ROWS = 32  # of a request, where many samples come at once and the bundle was not tuned
_BULK_REQUESTS = 4  # under way for each lane: one that runs, one that is next, and time to make two more


@dataclass(frozen=True)
class AnswerField:
    """One output within the bytes of an answer.

    Args:
        name: of the output.
        dtype: of its elements, as torch calls it.
        shape: for one sample, without the rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class SystemUnderTest:
    """Answers queries of samples with an engine.

    Args:
        engine: what is measured.
        rows: the samples; LoadGen's index is the row.
        complete: called for each request that was answered, on a thread of the engine. The bytes live until it returns.
        fail: told of the first thing that went wrong; nothing is completed for it, so the run cannot end by itself.
        in_bulk: requests of many samples are made on a thread of their own, only so many ahead of the engine: for
            Offline, whose one query holds all samples.

    Attributes:
        fields: what the bytes of an answer hold, once there was one.

    Raises:
        UsageError: the model cannot answer a single row.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Dataset,
        complete: Complete,
        fail: Callable[[BaseException], None],
        in_bulk: bool = False,
    ) -> None:
        self.fields: tuple[AnswerField, ...] = ()
        self.issued = 0
        self.answered = 0
        self._engine = engine
        self._rows = rows.inputs
        self._inputs = _sendable(rows)
        self._complete = complete
        self._fail = fail
        self._most_rows = rows_per_request(engine.spec)
        self._bulk_rows = min(self._most_rows, engine.options.policy.max_rows or _BULK_ROWS)
        self._counting = threading.Lock()
        self._room = threading.Semaphore(_BULK_REQUESTS * engine.options.lanes)
        self._bulk: queue.SimpleQueue[tuple[Sequence[int], Sequence[int]] | None] = queue.SimpleQueue()
        self._feeder = threading.Thread(target=self._feed, name="mlperf-feeder", daemon=True) if in_bulk else None
        if self._feeder is not None:
            self._feeder.start()

    def issue(self, ids: Sequence[int], indices: Sequence[int]) -> None:
        """Take a query and return at once.

        Args:
            ids: LoadGen's numbers for the answers.
            indices: the samples' rows.
        """
        self.issued += len(ids)
        if self._feeder is not None:
            self._bulk.put((ids, indices))
            return
        for low in range(0, len(ids), self._most_rows):
            part = slice(low, low + self._most_rows)
            self._send(ids[part], indices[part], None)

    def close(self) -> None:
        """End the thread that feeds the engine; all queries must have been answered."""
        if self._feeder is not None:
            self._bulk.put(None)
            self._feeder.join()

    def _feed(self) -> None:
        while (query := self._bulk.get()) is not None:
            ids, indices = query
            for low in range(0, len(ids), self._bulk_rows):
                part = slice(low, low + self._bulk_rows)
                self._room.acquire()
                self._send(ids[part], indices[part], self._room)

    def _send(self, ids: Sequence[int], indices: Sequence[int], room: threading.Semaphore | None) -> None:
        """One request; ``room`` is given back with its answer. Nothing may be raised into LoadGen's C++."""
        try:
            answer = self._engine.submit(self._take(indices))
        except Exception as error:
            if room is not None:
                room.release()
            self._fail(error)
            return
        answer.add_done_callback(functools.partial(self._done, ids, room))

    def _take(self, indices: Sequence[int]) -> dict[str, Any]:
        """The rows of some samples: one as a view, several collected by torch, which has several threads for it."""
        if len(indices) == 1:
            row = indices[0]
            return {name: array[row : row + 1] for name, array in self._inputs.items()}
        index = torch.tensor(list(indices))
        return {name: tensor.index_select(0, index) for name, tensor in self._rows.items()}

    def _done(self, ids: Sequence[int], room: threading.Semaphore | None, answer: Any) -> None:
        """On a thread of the engine."""
        if room is not None:
            room.release()
        try:
            self._complete(ids, self._bytes_of(answer, len(ids)))
        except Exception as error:
            self._fail(error)
            return
        with self._counting:
            self.answered += len(ids)

    def _bytes_of(self, answer: Answer, rows: int) -> Bytes:
        """All outputs of each row, one behind the other: [rows, bytes]."""
        outputs = answer.result()
        arrays = {name: np.ascontiguousarray(as_array(value)) for name, value in outputs.items()}
        if any(array.ndim == 0 or len(array) != rows for array in arrays.values()):
            shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in arrays.items())
            raise EngineError(f"the answer to {rows} rows is {shapes}, expected {rows} rows in every output.")
        fields = tuple(
            AnswerField(name, str(value.dtype).removeprefix("torch."), arrays[name].shape[1:])
            for name, value in outputs.items()
        )
        self.fields = self.fields or fields
        if fields != self.fields:
            raise EngineError(f"answers differ in form: {self.fields} and {fields}.")
        parts = [array.reshape(rows, -1).view(np.uint8) for array in arrays.values()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def rows_per_request(spec: Spec) -> int:
    """How many rows a request may have at most.

    Raises:
        UsageError: the model cannot answer a single row.
    """
    batch = spec.batch_symbol
    if batch is None:
        first = spec.inputs[0].shape[0] if spec.inputs[0].shape else 0
        if isinstance(first, str) or first != 1:
            raise UsageError(
                f"a sample is one row, which this model does not take ({spec}).",
                "Make the bundle with a symbol as the first dimension: 'image: float32[B,3,224,224], B=1..8'.",
            )
        return 1
    if 1 not in spec.symbols[batch]:
        raise UsageError(
            f"a sample is one row, but this model takes {batch}={spec.symbols[batch]}.", f"Let {batch} begin at 1."
        )
    return spec.symbols[batch].high


def _sendable(rows: Dataset) -> Mapping[str, Any]:
    """NumPy arrays, which the engine handles with the least ado; tensors if one of them is of a dtype NumPy has not."""
    if rows.rows < 1:
        raise DataError("the data is empty.", "Give one row or more.")
    try:
        return {name: tensor.numpy() for name, tensor in rows.inputs.items()}
    except TypeError:  # bfloat16
        return rows.inputs
