"""What this process may use of the machine: instruction sets, cores, main memory, a folder for caches.

Limits are read from /proc and the control groups, because inside a container the machine's own totals are not ours.
Their functions take the root of the file system, so that another machine's files can be read too.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

ROOT = Path("/")
KERNEL_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""The instruction sets that decide which kernels an engine picks, under the kernel's names."""

_MODEL_KEYS = ("model name", "Model", "Hardware")
"""Lines of /proc/cpuinfo that name the processor: on x86, on a Raspberry Pi, on older ARM kernels."""


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name, or the architecture's if the kernel does not tell."""
    lines = _cpuinfo(root)
    found = (lines[key] for key in _MODEL_KEYS if lines.get(key))
    return next(found, "") or platform.processor() or platform.machine() or "unknown"


def cpu_flags(root: Path = ROOT) -> tuple[str, ...]:
    """Those of :data:`KERNEL_FLAGS` that the processor has; empty where /proc/cpuinfo cannot be read."""
    lines = _cpuinfo(root)
    present = set((lines.get("flags") or lines.get("Features") or "").split())
    return tuple(flag for flag in KERNEL_FLAGS if flag in present)


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: the smaller of its affinity and its control group's quota.

    A quota of 1.5 cores counts as 1, since a second thread would be put to sleep for half of the time.
    """
    quota = cpu_quota(root)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def usable_memory(root: Path = ROOT) -> int:
    """Bytes of main memory that this process may use: the smaller of the machine's and its control group's."""
    total = int(psutil.virtual_memory().total)
    limits = [
        int(text)
        for name, version in (("memory.max", 2), ("memory.limit_in_bytes", 1))
        for text in read_group("memory", name, version, root)
        if text.isdigit()
    ]
    return min([total, *limits])


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the control groups grant, or None if they do not limit it."""
    pairs = [text.split() for text in read_group("cpu", "cpu.max", 2, root)]
    quotas = read_group("cpu", "cpu.cfs_quota_us", 1, root)
    periods = read_group("cpu", "cpu.cfs_period_us", 1, root)
    pairs += [[quota, period] for quota, period in zip(quotas, periods, strict=False)]
    cores = [
        int(pair[0]) / int(pair[1])
        for pair in pairs
        if len(pair) > 1 and pair[0].isdigit() and pair[1].isdigit() and int(pair[1])  # "max" and -1 are no limit
    ]
    return min(cores, default=None)


def cache_folder() -> Path:
    """Where onecard may keep what it can make again: ``ONECARD_CACHE``, or else the user's cache folder."""
    chosen = os.environ.get("ONECARD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onecard"


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first value of every key: the processors of one machine hardly differ in what is asked for here."""
    result: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            result.setdefault(key.strip(), value.strip())
    return result


def read_group(controller: str, name: str, version: int, root: Path) -> list[str]:
    """The file ``name`` of this process's control group and of all groups above it, where there is one.

    A limit anywhere above holds too. Within a container the path in /proc may be the host's; the mount then
    shows the container's own group as its root, which the walk upward reaches.
    """
    mount, path = root / "sys/fs/cgroup", ""
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if version == 1 and controller in controllers.split(","):
            mount, path = _version_1_mount(mount, controllers, controller), group
        elif version == 2 and hierarchy == "0":  # noqa: PLR2004 - the version
            path = group
            mount = mount / "unified" if (mount / "unified").is_dir() else mount
    parts = Path(path.lstrip("/")).parts
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [text for folder in folders if (text := _read(folder / name).strip())]


def _version_1_mount(mount: Path, controllers: str, controller: str) -> Path:
    joined = mount / controllers
    return joined if joined.is_dir() else mount / controller


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
