"""NVIDIA's management library: the facts of a card without starting CUDA, and which card torch means.

NVML numbers cards by bus, CUDA by speed and ``CUDA_VISIBLE_DEVICES``, so that ``cuda:0`` and NVML's 0 may be
different cards. Nothing here raises where there is no driver, no card or no such sensor: the answer is None.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

Handle = Any
"""An NVML device handle: opaque, and valid until the process ends."""


class CardFacts(NamedTuple):
    """What NVML says of one card: compute capability as ``9.0``, memory in bytes, driver as ``580.65.06``."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


@functools.cache
def library() -> Any | None:
    """The started pynvml module, or None where there is no NVIDIA driver.

    It is never shut down: NVML counts its starts, and the handles must live as long as the process.
    """
    try:
        with warnings.catch_warnings():
            # A distribution named pynvml, long deprecated, warns on import; ours is nvidia-ml-py.
            warnings.simplefilter("ignore", FutureWarning)
            import pynvml
        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml


def ask(function: Callable[..., Any], *args: Any) -> Any | None:
    """The answer of one NVML call, or None where the card or the driver does not support it."""
    try:
        return function(*args)
    except Exception:  # NVMLError, or AttributeError and ctypes errors where the driver is older than the binding
        return None


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None if there is no driver."""
    nvml = library()
    answer = ask(nvml.nvmlSystemGetDriverVersion) if nvml else None
    return _text(answer) if answer is not None else None


def count() -> int:
    """Cards that the driver sees, whatever ``CUDA_VISIBLE_DEVICES`` says."""
    nvml = library()
    return int(ask(nvml.nvmlDeviceGetCount) or 0) if nvml else 0


def facts(index: int) -> CardFacts | None:
    """The facts of ``cuda:index``, found without starting CUDA.

    Returns:
        None where there is no such card, or where only CUDA can tell which one it is or how large: cards
        of several kinds that CUDA orders by speed, and partitions of a card (MIG).
    """
    nvml = library()
    handle = handle_by_order(index) if nvml else None
    if nvml is None or handle is None:
        return None
    mig = ask(nvml.nvmlDeviceGetMigMode, handle)
    if mig is not None and mig[0]:
        return None
    name = ask(nvml.nvmlDeviceGetName, handle)
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    if name is None or capability is None or memory is None:
        return None
    return CardFacts(_text(name), "{}.{}".format(*capability), int(memory.total), driver_version() or "unknown")


def handle_by_order(index: int) -> Handle | None:
    """The handle of ``cuda:index`` from ``CUDA_VISIBLE_DEVICES`` alone, or None where the order is not certain."""
    nvml = library()
    if nvml is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = [entry.strip() for entry in visible.split(",")] if visible is not None else None
    if entries is not None:
        if index >= len(entries):
            return None
        entry = entries[index]
        if entry.startswith(("GPU-", "MIG-")):
            return handle_by_uuid(entry)
        if not entry.isdigit():
            return None
        index = int(entry)
    if not _order_is_by_bus(nvml):
        return None
    return ask(nvml.nvmlDeviceGetHandleByIndex, index)


def handle_by_uuid(uuid: str) -> Handle | None:
    """The handle of a card, or of the card that holds a partition, by its UUID.

    Args:
        uuid: ``GPU-...`` (also shortened, as CUDA allows) or ``MIG-...``, or without a prefix as torch gives it.
    """
    nvml = library()
    if nvml is None:
        return None
    candidates = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    for candidate in candidates:
        handle = ask(nvml.nvmlDeviceGetHandleByUUID, candidate)
        if handle is None and candidate.startswith("GPU-"):
            handle = _handle_by_short_uuid(nvml, candidate)
        if handle is not None:
            # Only the whole card has sensors; a partition leads to it.
            parent = ask(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
            return handle if parent is None else parent
    return None


def partition_by_order(index: int) -> Handle | None:
    """The handle of the partition (MIG) that ``cuda:index`` is, or None for a whole card.

    Only ``CUDA_VISIBLE_DEVICES`` is asked: a process that is to use a partition mostly has it named there.
    """
    entries = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return partition_by_uuid(entries[index]) if index < len(entries) and entries[index].startswith("MIG-") else None


def partition_by_uuid(uuid: str) -> Handle | None:
    """The handle of a partition (MIG) by its UUID, with ``MIG-`` before it or not; None for a whole card.

    A partition tells of its memory and its processes; for all other sensors see :func:`handle_by_uuid`.
    """
    nvml = library()
    if nvml is None or uuid.startswith("GPU-"):
        return None
    handle = ask(nvml.nvmlDeviceGetHandleByUUID, uuid if uuid.startswith("MIG-") else f"MIG-{uuid}")
    is_part = handle is not None and ask(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle) is not None
    return handle if is_part else None


def _handle_by_short_uuid(nvml: Any, prefix: str) -> Handle | None:
    handles = [ask(nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count())]
    fits = [h for h in handles if h is not None and _text(ask(nvml.nvmlDeviceGetUUID, h) or "").startswith(prefix)]
    return fits[0] if len(fits) == 1 else None


def _order_is_by_bus(nvml: Any) -> bool:
    """True where CUDA's order must be NVML's: asked for, or cards that are all of one kind."""
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return True
    handles = [ask(nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count())]
    return len({_text(ask(nvml.nvmlDeviceGetName, handle) or "") for handle in handles}) <= 1


def _text(value: Any) -> str:
    """NVML's strings, which old bindings give as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
