"""Shared memory of two processes: an anonymous file of a fixed size, mapped by both; its descriptor is its name.

Nothing of it lies in a file system, and the kernel takes it back when the last process that holds it is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onecard.errors import EngineError, StorageError, UsageError

# From linux/memfd.h and linux/fcntl.h. Pythons that were built against a glibc before 2.27 (conda's were) lack these
# names and os.memfd_create, while the glibc that they run on has the function.
MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1, 2, 4
FIXED_SIZE = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW

Buffer: TypeAlias = memoryview | npt.NDArray[np.generic]


class Segment:
    """Memory that another process can map too. Once closed it is empty: no bytes, and no descriptor (-1).

    Args:
        fd: of the anonymous file; the segment closes it.
        mapping: of all of it.
    """

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.memory = memoryview(mapping)  # writable, format B
        self.array = np.frombuffer(self.memory, np.uint8)  # [nbytes]
        self.nbytes = len(self.memory)
        self._address = _address(self.array)
        self._close_descriptor = weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls, name: str, nbytes: int) -> Segment:
        """Make a segment of zeros. Memory is only used up as it is written.

        Args:
            name: shown in ``/proc/PID/maps``; need not be the only one of its kind.
            nbytes: its size for as long as it is.

        Raises:
            UsageError: the size is not positive, or this is not Linux.
            StorageError: the system does not give so much.
        """
        _require_linux()
        if nbytes < 1:
            raise UsageError(f"A shared-memory segment has at least 1 byte, not {nbytes}.")
        try:
            fd = _memfd_create(name)
            try:
                os.ftruncate(fd, nbytes)
                _seal(fd)
                return cls(fd, mmap.mmap(fd, nbytes))
            except BaseException:
                os.close(fd)
                raise
        except (OSError, OverflowError) as error:
            raise StorageError(
                f"No shared memory of {nbytes:,} bytes for {name!r}: {error}.",
                "Ask for a smaller segment, free memory, or raise the process's limits (ulimit -n, -v).",
            ) from error

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Segment:
        """Map another process's segment.

        Its size must be sealed: were the other side able to shorten it, reading behind its new end would kill us.

        Args:
            fd: its descriptor, which belongs to the segment from now on, and is closed if this fails.
            nbytes: its size, as the other side says.

        Raises:
            UsageError: this is not Linux.
            EngineError: it is not such a segment.
        """
        try:
            _require_linux()
            _check_sealed(fd, nbytes)
            return cls(fd, mmap.mmap(fd, nbytes))
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError | ValueError):
                raise EngineError(f"The peer's shared memory of {nbytes:,} bytes cannot be mapped: {error}.") from error
            raise

    def offset_of(self, buffer: Buffer) -> int | None:
        """Where a buffer lies, in bytes from the segment's beginning.

        Returns:
            None if the buffer does not lie wholly inside, is not C-contiguous, or has no bytes.
        """
        array = np.asarray(buffer)
        offset = _address(array) - self._address
        inside = offset >= 0 and offset + array.nbytes <= self.nbytes
        return offset if inside and array.nbytes and array.flags.c_contiguous else None

    def view(self, offset: int, nbytes: int) -> memoryview:
        """A part of the memory.

        Raises:
            ValueError: it does not lie wholly inside.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes from {offset} on do not lie in a segment of {self.nbytes}")
        return self.memory[offset : offset + nbytes]

    def close(self) -> None:
        """Let go of the memory. It stays mapped until the last view of it is gone, and views stay as they are."""
        self.memory = memoryview(b"")
        self.array = np.frombuffer(self.memory, np.uint8)
        self.nbytes = 0
        self.fd = -1
        self._close_descriptor()


def _address(array: npt.NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise UsageError(
            f"Shared memory between the server's processes needs Linux, and this is {sys.platform}.",
            "Run the server on Linux.",
        )


def _memfd_create(name: str) -> int:
    create = ctypes.CDLL(None, use_errno=True).memfd_create
    fd = int(create(os.fsencode(name), MFD_CLOEXEC | MFD_ALLOW_SEALING))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _seal(fd: int) -> None:
    from fcntl import fcntl  # not on Windows

    fcntl(fd, F_ADD_SEALS, FIXED_SIZE)


def _check_sealed(fd: int, nbytes: int) -> None:
    from fcntl import fcntl

    size = os.fstat(fd).st_size
    if size != nbytes or nbytes < 1:
        raise EngineError(f"The peer's shared memory has {size:,} bytes, and it said {nbytes:,}.")
    if fcntl(fd, F_GET_SEALS) & FIXED_SIZE != FIXED_SIZE:
        raise EngineError("The peer's shared memory could still change its size; it has to be sealed.")
