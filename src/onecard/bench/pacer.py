"""An alarm for an event loop that is punctual to some ten microseconds; the loop's own timers count milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_MONOTONIC = 1
_CLOEXEC_NONBLOCK = 0o2004000
_SOON_NS = 1  # a timer set to zero would be off


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Alarm(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


@functools.cache
def _library() -> Any:
    """The C library, if its kernel has timers that are files (Linux)."""
    return ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


class Pacer:
    """One alarm.

    Args:
        loop: that waits for it.
        ring: called when it is time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        library = _library()
        self._file = library.timerfd_create(_MONOTONIC, _CLOEXEC_NONBLOCK) if library is not None else -1
        if self._file >= 0:
            loop.add_reader(self._file, self._rung)

    def set(self, at: float) -> None:
        """Ring once at a time of ``time.perf_counter``, or at once if it is over; forgets what was set before."""
        wait_s = max(0.0, at - time.perf_counter())
        if self._file < 0:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(wait_s, self._ring)
            return
        seconds, rest = divmod(max(_SOON_NS, int(wait_s * 1e9)), 1_000_000_000)
        alarm = _Alarm(_Time(0, 0), _Time(seconds, rest))
        _library().timerfd_settime(self._file, 0, ctypes.byref(alarm), None)

    def close(self) -> None:
        """Never ring again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _rung(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set anew just now
            os.read(self._file, 8)
            self._ring()
