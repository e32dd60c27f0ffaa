"""From callers' arrays to the model's answers, one batch at a time: what a stage is, and the stages without a GPU.

A stage collects the rows of a batch, runs the model and brings the answers to the host. On a GPU it does so for
several batches at once (``onecard.runtime.staging_cuda``); the engine sees no difference.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from onecard.backends.base import Tensors
from onecard.errors import EngineClosedError
from onecard.runtime.entries import Entry, Source, capacities, make_entries
from onecard.runtime.ingest import Ingest
from onecard.runtime.slots import Array, Buffer, Padding, Slab, as_tensor, lay_out, part, put
from onecard.spec import Bucket, Spec

_SMALL_BYTES = 256 << 10  # of an array: beside copying more than that, finding out where to does not matter


class Model(Protocol):
    """What a stage must know of what it runs."""

    spec: Spec
    device: str

    def run(self, inputs: Tensors, size: Bucket) -> Tensors:
        """Answer inputs that are on the device at exactly ``size``; on a GPU on the current stream."""
        ...


class StageTimings(NamedTuple):
    """Where the time of one flight went, in seconds; 0.0 for what was not measured or does not exist.

    Args:
        gather_s: collecting rows, host clock.
        copy_in_s: host to device, the device's clock.
        compute_s: conversion of raw inputs and the model.
        copy_out_s: device to host.
    """

    gather_s: float = 0.0
    copy_in_s: float = 0.0
    compute_s: float = 0.0
    copy_out_s: float = 0.0


class Flight(Protocol):
    """One batch under way."""

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Host tensors of the whole batch, padding rows included; filled after :meth:`wait`, valid to the release."""
        ...

    @property
    def owned(self) -> bool:
        """True where ``outputs`` are fresh memory that callers may keep, False where the next flight overwrites it."""
        ...

    @property
    def timings(self) -> StageTimings:
        """Complete after :meth:`wait`."""
        ...

    def wait(self) -> None:
        """Return when the answers are on the host; raise what failed on the device.

        Only from then on may the callers' arrays be changed.
        """
        ...

    def release(self) -> None:
        """Give the slot back. Call it exactly once, also after a failure; waits if nobody did."""
        ...


class Stage(Protocol):
    """Where batches of one lane are run."""

    @property
    def synchronous(self) -> bool:
        """True where :meth:`launch` returns with the answers made."""
        ...

    @property
    def depth(self) -> int:
        """Flights that may be under way at once; :meth:`launch` blocks for a slot while they are."""
        ...

    def launch(self, sources: Sequence[Source], rows: int, size: Bucket) -> Flight:
        """Collect rows and run the model on them.

        Args:
            sources: whose rows, in the batch's order.
            rows: of all sources.
            size: what is run, at least as large as the rows in every symbol; one of the stage's sizes or smaller.

        Raises:
            EngineClosedError: the stage is closed.
            Exception: whatever the model raised; no slot is lost by it, and there is no flight to release.
        """
        ...

    def register(self, memory: Any) -> bool:
        """Lock a host array in memory, so that rows in it are copied to the device from where they lie.

        Returns:
            False where that cannot be, or would be of no use; its rows are then collected like all others.
        """
        ...

    def unregister(self, memory: Any) -> None:
        """Forget an array that was registered; waits until no copy from it is under way."""
        ...

    def close(self) -> None:
        """Wait for what is under way and release the memory; flights that were not released keep their answers."""
        ...


class HostFlight:
    """A flight whose answers were there when it was made.

    Args:
        outputs: the answers.
        owned: whether the callers may keep them.
        timings: where the time went.
    """

    def __init__(self, outputs: dict[str, Tensor], owned: bool, timings: StageTimings) -> None:
        self.outputs = outputs
        self.owned = owned
        self.timings = timings

    def wait(self) -> None:
        return

    def release(self) -> None:
        self.outputs = {}


class CpuStage:
    """A model on the CPU: rows are collected only where they do not lie together already.

    One caller's rows that are the whole batch are handed to the model where they are. The model must not write to
    its inputs; a read-only array is copied nevertheless, since torch cannot keep a model from writing to it.

    Args:
        model: what is run.
        sizes: all that will be launched, or those that no other exceeds in any symbol.
        ingests: raw forms that callers may send.
    """

    synchronous = True
    depth = 1

    def __init__(self, model: Model, sizes: Sequence[Bucket], ingests: Sequence[Ingest] = ()) -> None:
        self._model = model
        self._entries = make_entries(model.spec, ingests)
        bounds = capacities(self._entries, sizes)
        offsets, nbytes = lay_out({entry.name: bounds[entry.name] for entry in self._entries})
        with torch.inference_mode(False):
            # Untouched pages cost nothing: a stage whose callers always fill the batch never has this memory.
            self._slab: Slab | None = Slab(torch.empty(nbytes, dtype=torch.uint8), offsets, bounds)
        self._padding = {entry.name: Padding(dirty_bytes=bounds[entry.name]) for entry in self._entries}
        self._lock = threading.Lock()

    def launch(self, sources: Sequence[Source], rows: int, size: Bucket) -> HostFlight:
        with self._lock, torch.no_grad():
            if self._slab is None:
                raise EngineClosedError("this stage is closed.")
            began = time.perf_counter()
            inputs = self._as_they_lie(sources, size) or self._gathered(self._slab, sources, rows, size)
            gathered = time.perf_counter()
            answers = self._model.run(inputs, size)
            computed = time.perf_counter()
            outputs = own(answers, inputs.values())
            timings = StageTimings(gather_s=gathered - began, compute_s=computed - gathered)
            return HostFlight(outputs, True, timings)

    def register(self, memory: Any) -> bool:
        return False

    def unregister(self, memory: Any) -> None:
        return

    def close(self) -> None:
        with self._lock:
            self._slab = None

    def _as_they_lie(self, sources: Sequence[Source], size: Bucket) -> Tensors:
        """The one caller's own rows, if they are just what the model takes; else nothing."""
        if len(sources) != 1:
            return {}
        inputs: Tensors = {}
        for entry in self._entries:
            array = entry.rows(sources[0])
            if entry.is_raw(array) or tuple(array.shape) != entry.shape(size):
                return {}
            if isinstance(array, Tensor):
                if not array.is_contiguous():
                    return {}
            elif not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
                return {}
            inputs[entry.name] = entry.given(as_tensor(array))
        return inputs

    def _gathered(self, slab: Slab, sources: Sequence[Source], rows: int, size: Bucket) -> Tensors:
        inputs: Tensors = {}
        for entry in self._entries:
            buffer = slab.view(entry.name, entry.dtype, entry.shape(size))
            padding = self._padding[entry.name]
            arrays = [entry.rows(source) for source in sources]
            if not _stacked(entry, arrays, buffer, padding):
                row = 0
                for array in arrays:
                    count, extents = array.shape[0], entry.extents(array)
                    padding.claim(buffer.tensor, row, count, extents)
                    if entry.is_raw(array):
                        entry.convert(as_tensor(array), buffer.tensor[part(row, count, extents)])
                    else:
                        put(buffer, row, array)
                    row += count
            padding.finish(buffer.tensor, rows if entry.batched else 1)
            inputs[entry.name] = entry.given(buffer.tensor)
        return inputs


def _stacked(entry: Entry, arrays: Sequence[Array], buffer: Buffer, padding: Padding) -> bool:
    """Copy small arrays that fill all their rows one behind the other, as most are; False, and nothing done, else."""
    whole = buffer.array
    if whole is None:
        return False
    full = whole.shape[1:]
    rows = 0
    for array in arrays:
        if isinstance(array, Tensor) or array.shape[1:] != full or array.nbytes > _SMALL_BYTES or entry.is_raw(array):
            return False
        rows += array.shape[0]
    padding.claim(buffer.tensor, 0, rows, full)
    row = 0
    for array in arrays:
        end = row + array.shape[0]
        whole[row:end] = array
        row = end
    return True


def own(answers: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Answers that share no memory with the inputs, nor one row with another.

    A model may return an input as it came, or a view of it; both would change with the next batch.
    """
    taken = [_span(tensor) for tensor in inputs]
    owned: dict[str, Tensor] = {}
    for name, answer in answers.items():
        low, high = _span(answer)
        if any(low < end and start < high for start, end in taken):
            owned[name] = answer.clone()
        elif answer.is_contiguous():
            owned[name] = answer
        elif any(stride == 0 and count > 1 for stride, count in zip(answer.stride(), answer.shape, strict=True)):
            owned[name] = answer.contiguous()
        else:
            owned[name] = answer
    return owned


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the storage that a tensor is a view of."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
