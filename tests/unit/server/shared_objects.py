"""Shared-memory objects as a client makes them, and regions that stand for registered ones where none are needed."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from onecard.server.oip_types import Region, Where

FOLDER = Path("/dev/shm")
needs_shared_memory = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs /dev/shm")


def unique_prefix() -> str:
    return f"onecard-test-{os.getpid()}-{uuid.uuid4().hex[:8]}-"


@contextlib.contextmanager
def shared_object(prefix: str, nbytes: int, name: str = "x") -> Iterator[shared_memory.SharedMemory]:
    """An object; its ``name`` is what a client registers as its key."""
    memory = shared_memory.SharedMemory(prefix + name, create=True, size=nbytes)
    try:
        yield memory
    finally:
        memory.close()
        with contextlib.suppress(FileNotFoundError):
            memory.unlink()


class OneMemory:
    """Every region is this memory, from its beginning."""

    def __init__(self, memory: bytearray, where: Where = "host") -> None:
        self.memory = memory
        self.where = where
        self.asked: list[Region] = []

    def locate(self, region: Region) -> Where:
        self.asked.append(region)
        return self.where

    def read(self, region: Region) -> memoryview:
        assert self.where == "host"
        return memoryview(bytes(self.memory[region.offset : region.offset + region.byte_size]))

    def write(self, region: Region, data: memoryview) -> None:
        assert self.where == "host"
        self.memory[region.offset : region.offset + len(data)] = data
