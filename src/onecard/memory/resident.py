"""The resident set of this process: what it is now, and the highest it gets while something runs."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path
from types import TracebackType

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): the peak becomes what is resident now
_PERIOD_S = 0.001


def resident_bytes() -> int:
    """What this process holds of main memory now, libraries included."""
    return _line("VmRSS:") or int(psutil.Process().memory_info().rss)


def return_free_memory() -> None:
    """Give what was freed back to the system, where the C library can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakWatch:
    """The highest resident set between entering and leaving.

    Linux keeps it exactly, if the process may reset it; elsewhere a thread looks every millisecond.

    Attributes:
        peak_bytes: the highest, once left.
        how: ``clear_refs`` or ``sampled``.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.how = ""
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="onecard-resident", daemon=True)

    def __enter__(self) -> PeakWatch:
        try:
            _CLEAR.write_text(_RESET_PEAK)
            self.how = "clear_refs"
        except OSError:
            self.how = "sampled"
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.how == "sampled":
            self._done.set()
            self._sampler.join()
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
        else:
            self.peak_bytes = _line("VmHWM:")

    def _sample(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def _line(key: str) -> int:
    """A line of the process's status in bytes; 0 where there is none."""
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
    return 0
