"""Staging on a GPU: a ring of pinned slots and three streams, so that copies hide behind the computation.

While batch i computes, batch i+1 is copied in and batch i-1 is copied out. Events alone join the streams; a launch
waits for nothing but a free slot. What keeps memory safe, in one place:

- A slot is used again only after its flight was waited for, so neither its host nor its device buffers are in use.
- The device's answers are held by the flight until they are copied out: freed before, the allocator could give their
  memory to the next batch.
- A caller's memory that the card reads by itself is held by the flight as long.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onecard.backends.base import Tensors
from onecard.errors import EngineClosedError
from onecard.runtime.card import Card, CudaCard, Event, Stream
from onecard.runtime.entries import Entry, Source, capacities, make_entries, raw_name
from onecard.runtime.ingest import Ingest
from onecard.runtime.roads import Load, load_rows
from onecard.runtime.slots import Padding, Slab, as_tensor, lay_out, part
from onecard.runtime.staging import Model, StageTimings
from onecard.spec import Bucket, TensorSpec


@dataclass(frozen=True)
class CudaOptions:
    """How a GPU is fed.

    Args:
        depth: slots: batches under way at once. Three fill the three streams; one is copy, compute, copy in turn.
        timings: measure copies and computation by events, which costs some microseconds a batch.
        spin: wait for the card with a busy core (see :class:`CudaCard`).
    """

    depth: int = 3
    timings: bool = True
    spin: bool = False


class CudaStage:
    """A model on a GPU.

    Args:
        model: what is run; its answers are fresh tensors on the device.
        sizes: all that will be launched, or those that no other exceeds in any symbol.
        ingests: raw forms that callers may send.
        options: depth and measuring.
        card: where; by default the model's device.
    """

    synchronous = False

    def __init__(
        self,
        model: Model,
        sizes: Sequence[Bucket],
        ingests: Sequence[Ingest] = (),
        options: CudaOptions | None = None,
        card: Card | None = None,
    ) -> None:
        options = options or CudaOptions()
        self.depth = options.depth
        self._model = model
        self._card = card or CudaCard(model.device, spin=options.spin)
        self._entries = make_entries(model.spec, ingests)
        self._streams = _Streams(self._card.stream(), self._card.stream(), self._card.stream())
        bounds = capacities(self._entries, sizes)
        answers = max(sum(_known_bytes(t, size) for t in model.spec.outputs) for size in sizes)
        with torch.inference_mode(False):
            slots = [
                _Slot(self._card, self._streams.copy_in, bounds, answers, options.timings) for _ in range(self.depth)
            ]
        self._ring = _Ring(slots)
        self._order = threading.Lock()  # a batch's work is given to the streams as a whole
        self._closed = False
        self._registered: dict[int, tuple[Any, Tensor]] = {}

    def launch(self, sources: Sequence[Source], rows: int, size: Bucket) -> CudaFlight:
        slot = self._ring.take()
        try:
            with torch.no_grad():
                return self._launch(slot, sources, rows, size)
        except BaseException:
            # What was given to the streams may still use the slot and the callers' memory.
            with contextlib.suppress(Exception):
                self._settle()
            self._ring.give(slot)
            raise

    def register(self, memory: Any) -> bool:
        if not isinstance(memory, Tensor) and not (memory.flags.c_contiguous and memory.flags.aligned):
            return False
        tensor = as_tensor(memory)
        if not tensor.nbytes or not tensor.is_contiguous():
            return False
        if tensor.data_ptr() in self._registered:
            return self._registered[tensor.data_ptr()][1].nbytes == tensor.nbytes
        read_only = not isinstance(memory, Tensor) and not memory.flags.writeable
        if not self._card.register(tensor, read_only=read_only):
            return False
        self._registered[tensor.data_ptr()] = memory, tensor  # held: freed while registered, the card would go astray
        return True

    def unregister(self, memory: Any) -> None:
        _, tensor = self._registered.pop(as_tensor(memory).data_ptr(), (None, None))
        if tensor is not None:
            self._settle()
            self._card.unregister(tensor)

    def close(self) -> None:
        slots = self._ring.close()
        with self._order:
            self._closed = True
        with contextlib.suppress(Exception):  # a card that is broken says so to those who wait for answers
            self._settle()
        for _, tensor in self._registered.values():
            self._card.unregister(tensor)
        self._registered.clear()
        del slots  # only now: before, the card could be reading them

    def _launch(self, slot: _Slot, sources: Sequence[Source], rows: int, size: Bucket) -> CudaFlight:
        began = time.perf_counter()
        loads = [
            load_rows(entry, sources, size, (slot.host, slot.host_padding[entry.name]), self._card.is_pinned)
            for entry in self._entries
        ]
        gather_s = time.perf_counter() - began
        with self._order:
            if self._closed:  # while the rows were collected: what was registered is not any more
                raise EngineClosedError("this stage is closed.")
            self._copy_in(slot, loads, rows, size)
            answers = self._compute(slot, loads, size)
            outputs = self._copy_out(slot, answers)
        held = [list(sources), loads, answers]
        return CudaFlight(slot, outputs, held, gather_s, self._settle, self._ring)

    def _copy_in(self, slot: _Slot, loads: Sequence[Load], rows: int, size: Bucket) -> None:
        stream, events = self._streams.copy_in, slot.events
        with self._card.on(stream):
            events.begin(events.copying_in, stream)
            for entry, load in zip(self._entries, loads, strict=True):
                view = slot.device.view(entry.name, entry.dtype, entry.shape(size)).tensor
                padding = slot.device_padding[entry.name]
                for stretch in load.stretches:  # claimed before written: a failure in between leaves nothing unknown
                    padding.claim(view, stretch.row, stretch.rows, stretch.extents)
                padding.finish(view, rows if entry.batched else 1)
                for move in load.moves:
                    slot.device.bytes(move.buffer, move.start, move.stop).copy_(move.host, non_blocking=True)
            events.copied_in.record(stream)

    def _compute(self, slot: _Slot, loads: Sequence[Load], size: Bucket) -> Tensors:
        stream, events = self._streams.compute, slot.events
        stream.wait_event(events.copied_in)
        with self._card.on(stream):
            events.begin(events.computing, stream)
            inputs: Tensors = {}
            for entry, load in zip(self._entries, loads, strict=True):
                view = slot.device.view(entry.name, entry.dtype, entry.shape(size)).tensor
                _convert(slot.device, entry, load, view)
                inputs[entry.name] = entry.given(view)
            answers = self._model.run(inputs, size)
            # Copied as they lie in memory, which only contiguous ones can be without a detour.
            answers = {name: answer.contiguous() for name, answer in answers.items()}
            events.computed.record(stream)
        return answers

    def _copy_out(self, slot: _Slot, answers: Tensors) -> dict[str, Tensor]:
        stream, events = self._streams.copy_out, slot.events
        outputs = slot.answers_like(answers)
        stream.wait_event(events.computed)
        with self._card.on(stream):
            events.begin(events.copying_out, stream)
            for name, answer in answers.items():
                outputs[name].copy_(answer, non_blocking=True)
            events.done.record(stream)
        return outputs

    def _settle(self) -> None:
        """Return when nothing that was launched is under way; raise the first failure then, and not before."""
        failures: list[Exception] = []
        for stream in self._streams:
            try:
                stream.synchronize()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


class CudaFlight:
    """A batch on the card; made by :meth:`CudaStage.launch`.

    Args:
        slot: whose buffers it uses.
        outputs: views of the slot's pinned memory.
        held: what must live until the card is done.
        gather_s: seconds.
        settle: waits for the whole card, in a failure.
        ring: takes the slot back.
    """

    owned = False

    def __init__(
        self,
        slot: _Slot,
        outputs: dict[str, Tensor],
        held: list[Any],
        gather_s: float,
        settle: Callable[[], None],
        ring: _Ring,
    ) -> None:
        self.outputs = outputs
        self.timings = StageTimings(gather_s=gather_s)
        self._slot: _Slot | None = slot
        self._held = held
        self._settle = settle
        self._ring = ring
        self._arrived = False
        self._failure: Exception | None = None

    def wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._arrived or self._slot is None:
            return
        try:
            self._slot.events.done.synchronize()
        except Exception as error:
            self._failure = error
            raise
        self._arrived = True
        self._held = []
        self.timings = self._slot.events.timings(self.timings.gather_s)

    def release(self) -> None:
        slot, self._slot = self._slot, None
        if slot is None:
            return
        if not self._arrived:
            with contextlib.suppress(Exception):  # told to those who wait
                self._settle()
        self._held = []
        self.outputs = {}
        self._ring.give(slot)


class _Streams(NamedTuple):
    copy_in: Stream
    compute: Stream
    copy_out: Stream


class _Events:
    """The points of one slot's flight; the first of each pair only where times are measured."""

    def __init__(self, card: Card, timed: bool) -> None:
        self.copied_in, self.computed, self.done = (card.event(timed=timed) for _ in range(3))
        begins = [card.event(timed=True) if timed else None for _ in range(3)]
        self.copying_in, self.computing, self.copying_out = begins

    def begin(self, event: Event | None, stream: Stream) -> None:
        if event is not None:
            event.record(stream)

    def timings(self, gather_s: float) -> StageTimings:
        if self.copying_in is None or self.computing is None or self.copying_out is None:
            return StageTimings(gather_s=gather_s)
        return StageTimings(
            gather_s,
            self.copying_in.elapsed_time(self.copied_in) / 1e3,
            self.computing.elapsed_time(self.computed) / 1e3,
            self.copying_out.elapsed_time(self.done) / 1e3,
        )


class _Slot:
    """Pinned buffers, device buffers and events of one batch under way.

    Args:
        card: where.
        stream: that writes the device buffers first.
        bounds: bytes of every buffer at its largest.
        answer_bytes: of a batch's answers at their largest, as far as the spec tells; more is taken when needed.
        timed: whether times are measured.
    """

    def __init__(self, card: Card, stream: Stream, bounds: dict[str, int], answer_bytes: int, timed: bool) -> None:
        offsets, nbytes = lay_out(bounds)
        self._card = card
        self.host = Slab(card.empty_pinned(nbytes), offsets, bounds)
        self.device = Slab(card.empty(nbytes, stream), offsets, bounds)
        self.host_padding = {name: Padding(dirty_bytes=bound) for name, bound in bounds.items()}
        self.device_padding = {name: Padding(dirty_bytes=bound) for name, bound in bounds.items()}
        self.events = _Events(card, timed)
        self._answers = card.empty_pinned(answer_bytes)

    def answers_like(self, answers: Tensors) -> dict[str, Tensor]:
        """Host memory for answers of these dtypes and shapes."""
        bounds = {name: answer.nbytes for name, answer in answers.items()}
        offsets, nbytes = lay_out(bounds)
        if nbytes > self._answers.numel():
            with torch.inference_mode(False):
                self._answers = self._card.empty_pinned(nbytes)
        slab = Slab(self._answers, offsets, bounds)
        return {name: slab.view(name, answer.dtype, tuple(answer.shape)).tensor for name, answer in answers.items()}


class _Ring:
    """The slots that no flight uses."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self._free = deque(slots)
        self._changed = threading.Condition()
        self._closed = False

    def take(self) -> _Slot:
        """A slot, when there is one.

        Raises:
            EngineClosedError: the ring is closed, or was while this waited.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                raise EngineClosedError("this stage is closed.")
            return self._free.popleft()

    def give(self, slot: _Slot) -> None:
        with self._changed:
            if not self._closed:
                self._free.append(slot)
                self._changed.notify()

    def close(self) -> list[_Slot]:
        """Refuse all from now on; the slots that were free."""
        with self._changed:
            self._closed = True
            slots = list(self._free)
            self._free.clear()
            self._changed.notify_all()
            return slots


def _convert(device: Slab, entry: Entry, load: Load, view: Tensor) -> None:
    """Raw rows of an input into their places, on the current stream."""
    for stretch in load.stretches:
        if stretch.raw is None or entry.raw_dtype is None:
            continue
        start, shape = stretch.raw
        nbytes = torch.Size(shape).numel() * entry.raw_dtype.itemsize
        raw = device.bytes(raw_name(entry), start, start + nbytes).view(entry.raw_dtype).view(shape)
        entry.convert(raw, view[part(stretch.row, stretch.rows, stretch.extents)])


def _known_bytes(tensor: TensorSpec, size: Bucket) -> int:
    """Of an output at a size, room for its alignment included; 0 where the spec does not tell its shape."""
    if any(isinstance(dim, str) and dim not in size for dim in tensor.shape):
        return 0
    _, nbytes = lay_out({tensor.name: torch.Size(tensor.concrete(size)).numel() * _itemsize(tensor)})
    return nbytes


def _itemsize(tensor: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype.itemsize
