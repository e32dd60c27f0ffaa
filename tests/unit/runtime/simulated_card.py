"""A card in host memory that runs its streams as late, as early and as strangely as their events allow.

Torch calls made on a stream are recorded and not run; what they allocate holds garbage until then. Recorded work runs
in a random order that keeps each stream's own and the events', a little at a time, and only as much as a waiting host
needs. Memory of a stream that is given up is overwritten by that stream at once, as an allocator would let it be. So an
event that is missing, a buffer used too early or an answer given up too soon shows as wrong numbers.
"""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

GARBAGE = 0x7B  # as float32 1.3e36, as int64 8.9e18: no right answer


@dataclass(eq=False)
class Point:
    """One recording of an event."""

    done: bool = False
    at: int = 0


@dataclass(eq=False)
class SimulatedStream:
    """Work in order: calls, points to reach (``True``) and points to wait for (``False``)."""

    card: SimulatedCard
    weight: float
    work: list[Callable[[], Any] | tuple[bool, Point]] = field(default_factory=list)

    def wait_event(self, event: SimulatedEvent) -> None:
        with self.card.lock:
            if event.point is not None and self.card.streams.index(self) not in self.card.deaf:
                self.work.append((False, event.point))

    def synchronize(self) -> None:
        point = Point()
        with self.card.lock:
            self.work.append((True, point))
        self.card.reach(point)

    def ready(self) -> bool:
        return bool(self.work) and (callable(self.work[0]) or self.work[0][0] or self.work[0][1].done)


@dataclass(eq=False)
class SimulatedEvent:
    card: SimulatedCard
    timed: bool
    point: Point | None = None

    def record(self, stream: SimulatedStream) -> None:
        with self.card.lock:
            self.point = Point()
            stream.work.append((True, self.point))
        self.card.stir()

    def synchronize(self) -> None:
        if self.point is not None:
            self.card.reach(self.point)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        assert self.timed and end.timed and self.point and end.point
        assert self.card.deaf or (self.point.done and end.point.done)
        return float(end.point.at - self.point.at)


class SimulatedCard:
    """See the module.

    Args:
        seed: equal seeds run equal calls in equal order.
        deaf: the streams, in the order in which they were made, that do not wait for events, to see it noticed.
    """

    def __init__(self, seed: int = 0, *, deaf: Collection[int] = ()) -> None:
        self.random = random.Random(seed)
        self.haste = self.random.choice([0.0, 0.0, 0.3, 0.9])  # 0 runs only what somebody waits for
        self.deaf = deaf
        self.lock = threading.RLock()
        self.streams: list[SimulatedStream] = []
        self.copies: list[int] = []  # bytes of every copy that was asked for
        self.errors: list[Exception] = []
        self._pinned: list[tuple[int, int]] = []
        self._living: dict[int, int] = {}  # storage to the views of it that somebody holds
        self._owner: dict[int, tuple[SimulatedStream, Tensor]] = {}
        self._clock = 0

    def stream(self) -> SimulatedStream:
        self.streams.append(SimulatedStream(self, self.random.choice([0.01, 1.0, 100.0])))
        return self.streams[-1]

    def event(self, *, timed: bool) -> SimulatedEvent:
        return SimulatedEvent(self, timed)

    def on(self, stream: SimulatedStream) -> contextlib.AbstractContextManager[Any]:
        return _Recording(self, stream)

    def empty(self, nbytes: int, stream: SimulatedStream) -> Tensor:
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def empty_pinned(self, nbytes: int) -> Tensor:
        memory = torch.full((nbytes,), GARBAGE, dtype=torch.uint8)
        self.pin(memory)
        return memory

    def pin(self, memory: Tensor) -> Tensor:
        self._pinned.append((memory.data_ptr(), memory.data_ptr() + memory.nbytes))
        return memory

    def is_pinned(self, tensor: Tensor) -> bool:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(low <= begin and end <= high for low, high in self._pinned)

    def register(self, tensor: Tensor, *, read_only: bool) -> bool:
        self.pin(tensor)
        return True

    def unregister(self, tensor: Tensor) -> None:
        assert not any(stream.work for stream in self.streams), "unregistered while the card may read it"
        self._pinned.remove((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))

    def stir(self) -> None:
        """Run some of what may run."""
        with self.lock:
            while self.random.random() < self.haste and self._step():
                pass

    def reach(self, point: Point) -> None:
        """Run until a point is reached; raise what went wrong on the way."""
        with self.lock:
            while not point.done:
                assert self._step(), "waits for work that waits for itself"
            if self.errors:
                raise self.errors.pop(0)

    def born(self, tensor: Tensor, stream: SimulatedStream | None) -> None:
        """Follow a tensor on the card: when the last view of its memory is gone, ``stream`` may use that again."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key == 0 or (stream is None and key not in self._living):
            return
        if stream is not None:
            self._living[key] = 0
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._owner[key] = stream, whole
        self._living[key] += 1
        weakref.finalize(tensor, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        with self.lock:
            self._living[key] -= 1
            if self._living[key] == 0:
                del self._living[key]
                stream, whole = self._owner.pop(key)
                stream.work.append(lambda: whole.fill_(GARBAGE))

    def _step(self) -> bool:
        ready = [stream for stream in self.streams if stream.ready()]
        if not ready:
            return False
        stream = self.random.choices(ready, [s.weight for s in ready])[0]
        what = stream.work.pop(0)
        self._clock += 1
        if not callable(what):
            if what[0]:
                what[1].done, what[1].at = True, self._clock
            return True
        try:
            with _disable_current_modes(), torch.inference_mode():  # a host that waits may be recording
                what()
        except Exception as error:
            self.errors.append(error)
        return True


class _Recording(TorchDispatchMode):
    """Torch calls of this thread become work of a stream."""

    def __init__(self, card: SimulatedCard, stream: SimulatedStream) -> None:
        super().__init__()
        self._card = card
        self._stream = stream

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if call is torch.ops.aten._local_scalar_dense.default:
            self._stream.synchronize()  # a number is read back
            return call(*args, **kwargs)
        # The recorded call has tensors of its own over the same memory: those of the caller may come and go.
        held_args, held_kwargs = tree_map_only(Tensor, lambda t: t.detach(), (args, kwargs))
        written = list(_written(call, args, kwargs))
        if written:
            if call is torch.ops.aten.copy_.default:
                self._card.copies.append(args[0].nbytes)
            self._record(lambda: call(*held_args, **held_kwargs))
            return written[0] if len(written) == 1 else tuple(written)
        result = call(*args, **kwargs)
        if any(returned.alias_info is not None for returned in call._schema.returns):
            tree_map_only(Tensor, lambda t: self._card.born(t, None), result)
            return result
        flat: list[Tensor] = []
        tree_map_only(Tensor, flat.append, result)
        kept = [tensor.detach() for tensor in flat]
        for tensor in flat:
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(GARBAGE)
            self._card.born(tensor, self._stream)
        self._record(lambda: _again(call, held_args, held_kwargs, kept))
        return result

    def _record(self, work: Callable[[], Any]) -> None:
        with self._card.lock:
            self._stream.work.append(work)
        self._card.stir()


def _again(call: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> None:
    flat: list[Tensor] = []
    tree_map_only(Tensor, flat.append, call(*args, **kwargs))
    for target, value in zip(targets, flat, strict=True):
        target.copy_(value)


def _written(call: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for position, argument in enumerate(call._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs[argument.name]
