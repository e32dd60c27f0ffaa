"""What staging asks of a card: streams, events and memory. Copies and computation are ordinary torch calls.

A protocol, so that the order of everything can be tested without a card, by one that runs each stream as late, as early
and as strangely as its events allow.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream's work; recorded again, it is another point. The methods are ``torch.cuda.Event``'s."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        """Block this thread, and no other, until the work before the point is done."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later point; both must be reached."""
        ...


class Stream(Protocol):
    """Work that the card does in the order in which it was given; the methods are ``torch.cuda.Stream``'s."""

    def wait_event(self, event: Any) -> None:
        """Work given from now on waits for the point at which the event was recorded last."""
        ...

    def synchronize(self) -> None:
        """Block until all work is done."""
        ...


class Card(Protocol):
    """A device with streams."""

    def stream(self) -> Stream: ...

    def event(self, *, timed: bool) -> Event: ...

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Torch calls in this context are work of the stream, and what they allocate is memory of it."""
        ...

    def empty(self, nbytes: int, stream: Any) -> Tensor:
        """Memory of the device, uint8 [nbytes], that is first used by a stream."""
        ...

    def empty_pinned(self, nbytes: int) -> Tensor:
        """Host memory, uint8 [nbytes], that the card copies from and to by itself."""
        ...

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the card can copy from a host tensor by itself."""
        ...

    def register(self, tensor: Tensor, *, read_only: bool) -> bool:
        """Make ordinary host memory such; False where it cannot be."""
        ...

    def unregister(self, tensor: Tensor) -> None: ...


class Holders:
    """Who shares memory that CUDA registers once for the whole process: the first registers it, the last ends that.

    A stage that closes must not take the memory from under the copies of another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[int, int], int] = {}

    def join(self, place: tuple[int, int], register: Callable[[], bool]) -> bool:
        """Hold memory, registering it if nobody does yet.

        Args:
            place: its address and bytes.
            register: called if nobody holds it; False if it failed.

        Returns:
            Whether it is registered.
        """
        with self._lock:
            count = self._counts.get(place, 0)
            if not count and not register():
                return False
            self._counts[place] = count + 1
            return True

    def leave(self, place: tuple[int, int], unregister: Callable[[], None]) -> None:
        """Hold it no longer; ``unregister`` is called if nobody does any more."""
        with self._lock:
            count = self._counts.pop(place, 0)
            if count > 1:
                self._counts[place] = count - 1
            elif count:
                unregister()


_holders = Holders()


class CudaCard:
    """An NVIDIA GPU through ``torch.cuda``.

    Args:
        device: ``cuda:N``.
        spin: threads that wait for the card keep a core busy, which tells them some 20 us earlier.
    """

    def __init__(self, device: str, *, spin: bool = False) -> None:
        self._device = torch.device(device)
        self._blocking = not spin

    def stream(self) -> Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def event(self, *, timed: bool) -> Event:
        return torch.cuda.Event(enable_timing=timed, blocking=self._blocking)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def empty(self, nbytes: int, stream: Any) -> Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def empty_pinned(self, nbytes: int) -> Tensor:
        with torch.cuda.device(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def register(self, tensor: Tensor, *, read_only: bool) -> bool:
        flags = _REGISTER_PORTABLE | (_REGISTER_READ_ONLY if read_only else 0)

        def register() -> bool:
            with torch.cuda.device(self._device):
                failed = int(_cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, flags)) != 0
                if failed:
                    self._forget_error()
            return not failed

        return _holders.join((tensor.data_ptr(), tensor.nbytes), register)

    def unregister(self, tensor: Tensor) -> None:
        def unregister() -> None:
            with torch.cuda.device(self._device):
                if int(_cudart().cudaHostUnregister(tensor.data_ptr())) != 0:
                    self._forget_error()

        _holders.leave((tensor.data_ptr(), tensor.nbytes), unregister)

    def _forget_error(self) -> None:
        """The runtime keeps a failed call's code, and the next kernel launch would be blamed for it."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)


_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: CUDA Runtime API, "Memory Management"
_REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly


def _cudart() -> Any:
    """The CUDA runtime that torch itself uses; its functions give back error codes."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
