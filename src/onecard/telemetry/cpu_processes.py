"""Our own processes: which they are, and what share of the machine's processors they take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

_NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")


class ProcessTree:
    """A process and all that it started, directly or not.

    The tree is looked up only now and then, as that reads all processes of the machine: one that was started since is
    seen after ``refresh_s`` at the latest, or at once if another ended.

    Args:
        pid: of the root; this process if None.
        refresh_s: how long a look at the tree holds.
        clock: seconds, never going back.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """

    def __init__(
        self, pid: int | None = None, refresh_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._root = psutil.Process(os.getpid() if pid is None else pid)
        self._refresh_s = refresh_s
        self._clock = clock
        self._looked_s = clock()
        self._members = self._look()

    def pids(self) -> frozenset[int]:
        """Of all that run now."""
        return frozenset(member.pid for member in self._alive())

    def cpu_seconds(self) -> dict[psutil.Process, float]:
        """User and system time of each process since it began."""
        times = {member: _cpu_seconds(member) for member in self._alive()}
        return {member: seconds for member, seconds in times.items() if seconds is not None}

    def _alive(self) -> list[psutil.Process]:
        now = self._clock()
        if now - self._looked_s >= self._refresh_s or not all(member.is_running() for member in self._members):
            self._members, self._looked_s = self._look(), now
        return self._members

    def _look(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:  # the root ended
            return []


class CpuUsage:
    """How busy the machine's processors are, and our processes' share of that, since the reading before.

    Args:
        tree: our processes.
        clock: seconds, never going back.
    """

    def __init__(self, tree: ProcessTree, clock: Callable[[], float] = time.monotonic) -> None:
        self._tree = tree
        self._clock = clock
        self._machine: tuple[float, float] | None = None
        self._ours: tuple[float, dict[psutil.Process, float]] | None = None

    def machine(self) -> dict[str, float]:
        """``utilisation``, 0 to 1 over all cores; empty at first, and while no tick has passed."""
        before, self._machine = self._machine, _busy_and_total_s()
        if before is None or self._machine[1] <= before[1]:
            return {}
        share = (self._machine[0] - before[0]) / (self._machine[1] - before[1])
        return {"utilisation": min(max(share, 0.0), 1.0)}

    def ours(self) -> dict[str, float]:
        """``process_utilisation``, 0 to 1 over all cores; empty at first. Processes new since then do not count."""
        before, self._ours = self._ours, (self._clock(), self._tree.cpu_seconds())
        (now_s, used), cores = self._ours, psutil.cpu_count()
        if before is None or now_s <= before[0] or not cores:
            return {}
        seconds = sum(used[member] - before[1][member] for member in used.keys() & before[1].keys())
        return {"process_utilisation": min(max(seconds / (now_s - before[0]) / cores, 0.0), 1.0)}


def _busy_and_total_s() -> tuple[float, float]:
    """Of all cores since the start. Time of guests is within ``user`` and ``nice`` already."""
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    busy = sum(seconds for name, seconds in times.items() if name not in _NOT_BUSY)
    return busy, busy + idle


def _cpu_seconds(process: psutil.Process) -> float | None:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)
