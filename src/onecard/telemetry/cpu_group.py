"""The control groups that this process is in: what they grant, and how often they stopped it (versions 1 and 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onecard import host

_S_PER_UNIT = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
"""Lines of ``cpu.stat``: of version 2 in microseconds, of version 1 in nanoseconds."""

_MEMORY_FILES = (("memory.max", "memory.current", 2), ("memory.limit_in_bytes", "memory.usage_in_bytes", 1))


def group_cpus(root: Path = host.ROOT) -> dict[str, Any]:
    """``cgroup_cpus`` and, where the kernel counts it, ``cgroup_throttled_s``: of the group that was stopped most."""
    cores = host.cpu_quota(root)
    stopped_s = [
        int(value) * _S_PER_UNIT[name]
        for version in (2, 1)
        for text in host.read_group("cpu", "cpu.stat", version, root)
        for name, _, value in (line.partition(" ") for line in text.splitlines())
        if name in _S_PER_UNIT and value.isdigit()
    ]
    return ({} if cores is None else {"cgroup_cpus": cores}) | (
        {"cgroup_throttled_s": max(stopped_s)} if stopped_s else {}
    )


def group_memory(machine_bytes: int, root: Path = host.ROOT) -> dict[str, Any]:
    """The tightest memory limit of the groups and what is used of it; empty where none is below the machine's memory.

    Args:
        machine_bytes: main memory of the machine; version 1 writes "no limit" as a huge number.
        root: where ``proc`` and ``sys`` are.
    """
    pairs = [
        (int(limit), int(used))
        for limit_name, used_name, version in _MEMORY_FILES
        for limit, used in zip(
            host.read_group("memory", limit_name, version, root),
            host.read_group("memory", used_name, version, root),
            strict=False,
        )
        if limit.isdigit() and used.isdigit() and int(limit) < machine_bytes
    ]
    if not pairs:
        return {}
    limit_bytes, used_bytes = min(pairs)
    return {"cgroup_memory_limit_bytes": limit_bytes, "cgroup_memory_used_bytes": used_bytes}
