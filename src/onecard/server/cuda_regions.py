"""CUDA shared memory in the engine: memory of the card that another process made, seen as tensors without a copy.

Sources: Triton's "Shared-Memory Extension"; CUDA Driver API, "Memory Management" (``cuIpcOpenMemHandle``,
``cuMemGetAddressRange``). The driver and not the runtime, since it alone tells how large the memory really is, and
beyond that a kernel's access ends the whole process's work with the card.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from onecard.errors import UsageError
from onecard.server.http_types import LOGGER

OpenMemory = Callable[[bytes, int, int], Tensor]
"""From a handle, a card's number and a size to uint8 [size]: the memory itself, given back with its last view."""

HANDLE_BYTES = 64
"""Of a handle: ``CU_IPC_HANDLE_SIZE``."""
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class CudaRegions:
    """Regions by name, of one front. Methods may be called from several threads.

    Args:
        open_memory: opens a handle.
    """

    def __init__(self, open_memory: OpenMemory | None = None) -> None:
        self._open = open_memory or IpcMemory()
        self._lock = threading.Lock()
        self._regions: dict[str, Tensor] = {}

    def register(self, name: str, handle: bytes, device: int, byte_size: int) -> None:
        """Open memory under a name.

        Args:
            name: of the region.
            handle: 64 bytes, a ``cudaIpcMemHandle_t``.
            device: the card's number.
            byte_size: of the region.

        Raises:
            UsageError: the name is taken, there is no such card, or the handle does not open so many bytes.
        """
        with self._lock:
            if name in self._regions:
                raise UsageError(f"the shared memory region '{name}' is registered already.", "Unregister it first.")
            self._regions[name] = self._open(handle, device, byte_size)

    def unregister(self, name: str) -> None:
        """Forget a region, if there is one; its memory is given back when no tensor lies in it any more."""
        with self._lock:
            self._regions.pop(name, None)

    def close(self) -> None:
        """Forget every region."""
        with self._lock:
            self._regions.clear()

    def tensor(self, name: str, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor that lies in a region: what is written to it, the client finds there.

        Args:
            name: of the region.
            offset: in bytes, from the region's beginning.
            dtype: of the tensor.
            shape: of the tensor, contiguous.

        Raises:
            UsageError: no such region, a place that is not within it, or not aligned to the dtype.
        """
        byte_size = math.prod(shape) * dtype.itemsize
        with self._lock:
            region = self._regions.get(name)
        if region is None:
            raise UsageError(f"unable to find CUDA shared memory region '{name}': it is not registered.")
        if min(shape, default=0) < 0 or offset < 0 or offset + byte_size > region.nbytes:
            raise UsageError(
                f"CUDA shared memory '{name}' has {region.nbytes} bytes: {byte_size} bytes at offset {offset} are not "
                "within it."
            )
        if offset % dtype.itemsize or region.data_ptr() % dtype.itemsize:
            raise UsageError(
                f"the offset {offset} in CUDA shared memory '{name}' does not suit {dtype}, expected a multiple of "
                f"{dtype.itemsize}."
            )
        return region[offset : offset + byte_size].view(dtype).view(tuple(shape))

    def write(self, name: str, offset: int, byte_size: int, data: Tensor) -> None:
        """Copy an output, which is computed already, to its place, and wait until it is there.

        Args:
            name: of the region.
            offset: in bytes, from the region's beginning.
            byte_size: of the place.
            data: the output, on the host or the card.

        Raises:
            UsageError: no such region, a place that is not within it, or one that is too small.
        """
        if data.nbytes > byte_size:
            raise UsageError(f"the output has {data.nbytes} bytes, but its 'shared_memory_byte_size' is {byte_size}.")
        self.tensor(name, offset, torch.uint8, (byte_size,))
        place = self.tensor(name, offset, data.dtype, data.shape)
        place.copy_(data)
        if place.is_cuda:
            torch.cuda.current_stream(place.device).synchronize()


class Driver:
    """The calls of the CUDA driver that this needs.

    Args:
        library: ``libcuda``; its functions give back error codes.
        on_card: a context in which a card's CUDA context is current in this thread.
    """

    def __init__(self, library: Any, on_card: Callable[[int], contextlib.AbstractContextManager[Any]]) -> None:
        self._library = library
        self._on_card = on_card

    def open(self, handle: bytes, device: int) -> tuple[int, int]:
        """Map memory: a pointer to its first byte, and the bytes there are from it on. UsageError if it cannot be."""
        pointer, start, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
        with self._on_card(device):
            code = self._library.cuIpcOpenMemHandle_v2(
                ctypes.byref(pointer), _IpcHandle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
            )
            if code:
                raise UsageError(f"the CUDA IPC handle cannot be opened on card {device}: CUDA error {code}.")
            code = self._library.cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(size), pointer)
        if code:
            self.close(pointer.value, device)
            raise UsageError(f"the size of the CUDA shared memory cannot be had: CUDA error {code}.")
        return pointer.value, start.value + size.value - pointer.value

    def close(self, pointer: int, device: int) -> None:
        """Give mapped memory back, once what was launched is done with it."""
        with self._on_card(device):
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize(device)
            code = self._library.cuIpcCloseMemHandle(ctypes.c_uint64(pointer))
        if code:
            LOGGER.warning("CUDA shared memory could not be closed: CUDA error %d.", code)


class IpcMemory:
    """Opens handles; an instance is an :data:`OpenMemory`.

    Args:
        driver: gives the driver.
        see: makes a tensor of an object with ``__cuda_array_interface__``, and keeps the object as long as a view of
            the tensor is there.
    """

    def __init__(
        self, driver: Callable[[int], Driver] | None = None, see: Callable[[Any], Tensor] | None = None
    ) -> None:
        self._driver = driver or find_driver
        self._see = see or torch.as_tensor

    def __call__(self, handle: bytes, device: int, byte_size: int) -> Tensor:
        if len(handle) != HANDLE_BYTES or byte_size < 1:
            raise UsageError(
                f"a CUDA IPC handle has {len(handle)} bytes and is for {byte_size}, expected {HANDLE_BYTES} bytes and "
                "at least 1."
            )
        driver = self._driver(device)
        pointer, there = driver.open(handle, device)
        mapped = _Mapped(pointer, byte_size)
        weakref.finalize(mapped, driver.close, pointer, device).atexit = False  # the process's end closes it as well
        if there < byte_size:
            raise UsageError(f"the CUDA shared memory has {there} bytes, but the region is to have {byte_size}.")
        return self._see(mapped)


class _Mapped:
    """Bytes at an address of the card, for whoever makes a tensor of them."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        shape = {"shape": (nbytes,), "strides": None, "typestr": "|u1"}
        self.__cuda_array_interface__ = {**shape, "data": (pointer, False), "version": 2}


class _IpcHandle(ctypes.Structure):
    """``CUipcMemHandle``."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


def find_driver(device: int) -> Driver:
    """The driver of a card.

    Args:
        device: the card's number.

    Raises:
        UsageError: there is no such card here.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "CUDA shared memory needs an NVIDIA card, and there is none here.", "Use system shared memory."
        )
    if device not in range(torch.cuda.device_count()):
        raise UsageError(f"there is no card {device}: this server sees {torch.cuda.device_count()}.")
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UsageError(f"CUDA shared memory needs the NVIDIA driver: {error}.") from None
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.c_void_p, _IpcHandle, ctypes.c_uint]
    library.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    library.cuMemGetAddressRange_v2.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    return Driver(library, _on_card)


@contextlib.contextmanager
def _on_card(device: int) -> Iterator[None]:
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # the first call in a thread that needs the card's context binds it
        yield
