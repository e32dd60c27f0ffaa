"""The memory that an engine holds, as the allocators report it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class MemoryUse(NamedTuple):
    """Bytes, at one moment; all but ``queued_bytes`` are of the whole process, and 0 without a GPU.

    Args:
        allocated_bytes: device memory that tensors occupy (``torch.cuda.memory_allocated``).
        reserved_bytes: what the allocator took from the driver for them (``memory_reserved``), graph pools included.
        peak_allocated_bytes: the most that was allocated at once.
        peak_reserved_bytes: likewise reserved.
        pinned_bytes: host memory locked for copies, staging slots included.
        queued_bytes: inputs of the requests that wait.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    pinned_bytes: int
    queued_bytes: int


def memory_use(device: str, queued_bytes: int) -> MemoryUse:
    """What is held now.

    Args:
        device: ``cpu`` or ``cuda:N``.
        queued_bytes: of waiting requests.
    """
    if device == "cpu":
        return MemoryUse(0, 0, 0, 0, 0, queued_bytes)
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    return MemoryUse(
        torch.cuda.memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        int(pinned),
        queued_bytes,
    )
