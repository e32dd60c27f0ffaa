"""The way from main memory to a device: buffers there, copies that run beside computations, and marks between them.

A mark is a moment of the computing or of the copying, which the other can wait for. On a card these are CUDA events on
two streams; on a CPU everything is done when the call returns, and the device's memory is only a number.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from onecard.errors import DeviceMemoryError
from onecard.streaming.residency import text

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every card, not only for the current one

Mark = Any
"""A moment to wait for; None is one that has passed."""


class Link(Protocol):
    """What the runner needs of a device. Its copies run in the order in which they are asked for.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        allocated_bytes: in the buffers that it gave.
        peak_bytes: the most that these ever were.
    """

    device: str
    allocated_bytes: int
    peak_bytes: int

    def allocate(self, nbytes: int) -> Tensor:
        """A buffer on the device.

        Raises:
            DeviceMemoryError: it would take more than the limit, or than there is.
        """
        ...

    def free(self, buffer: Tensor) -> None:
        """The caller drops this buffer now."""
        ...

    def pin(self, buffer: Tensor) -> bool:
        """Lock a buffer of main memory, so that copies from it are fast and run by themselves; False if that fails."""
        ...

    def unpin(self, buffer: Tensor) -> None:
        """Undo :meth:`pin`; no copy from the buffer may be under way."""
        ...

    def copy(self, buffer: Tensor, source: Tensor, after: Mark) -> Mark:
        """Start one copy to the device, not before a moment of the computing, and give the moment when it is done."""
        ...

    def wait(self, copied: Mark) -> None:
        """Let what is computed from now on wait for a copy."""
        ...

    def mark(self) -> Mark:
        """This moment of the computing: after all that was asked for so far."""
        ...

    def finish(self) -> None:
        """Return when all copies and computations are done."""
        ...


class _Ledger:
    """Counts the bytes that were given, and refuses more than the limit."""

    def __init__(self, device: str, limit_bytes: int) -> None:
        self.device = device
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self._limit_bytes = limit_bytes

    def allocate(self, nbytes: int) -> Tensor:
        if self.allocated_bytes + nbytes > self._limit_bytes:
            raise DeviceMemoryError(
                f"{text(nbytes)} more than the {text(self.allocated_bytes)} in use is above the limit of "
                f"{text(self._limit_bytes)} for weights."
            )
        try:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.device} has no {text(nbytes)} left, though the limit is {text(self._limit_bytes)}.",
                "Set a lower limit, or end what else uses the device.",
            ) from error
        self.allocated_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        return buffer

    def free(self, buffer: Tensor) -> None:
        self.allocated_bytes -= buffer.numel()


class HostLink(_Ledger):
    """A CPU in the place of a card: the same scheduling, with plain copies and a limit that is only counted.

    Args:
        limit_bytes: for the buffers that it gives.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__("cpu", limit_bytes)

    def pin(self, buffer: Tensor) -> bool:
        return True

    def unpin(self, buffer: Tensor) -> None:
        """Nothing was locked."""

    def copy(self, buffer: Tensor, source: Tensor, after: Mark) -> Mark:
        buffer.copy_(source)

    def wait(self, copied: Mark) -> None:
        """It is done."""

    def mark(self) -> Mark:
        return None

    def finish(self) -> None:
        """It is done."""


class CudaLink(_Ledger):
    """A card: copies run on a stream of their own, beside whatever stream is current for computing.

    Args:
        device: ``cuda:N``.
        limit_bytes: for the buffers that it gives.
    """

    def __init__(self, device: str, limit_bytes: int) -> None:
        super().__init__(device, limit_bytes)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pin(self, buffer: Tensor) -> bool:
        if not buffer.numel():
            return True
        with torch.cuda.device(self.device):
            # PyTorch's own pinned memory comes in powers of two; this locks exactly these bytes.
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), _PORTABLE)) == 0:
                return True
            with suppress(RuntimeError):
                # The runtime remembers the failure and the next kernel launch reports it: have that one here.
                torch.zeros(1, device=self.device)
        return False

    def unpin(self, buffer: Tensor) -> None:
        if buffer.numel():
            with torch.cuda.device(self.device):
                runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                runtime.cudaHostUnregister(buffer.data_ptr())

    def copy(self, buffer: Tensor, source: Tensor, after: Mark) -> Mark:
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            buffer.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._copies)
        return done

    def wait(self, copied: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def make_link(device: str, limit_bytes: int) -> Link:
    """The link to a device.

    Args:
        device: ``cpu`` or ``cuda:N``.
        limit_bytes: for weights and copy slots.
    """
    return HostLink(limit_bytes) if device == "cpu" else CudaLink(device, limit_bytes)
