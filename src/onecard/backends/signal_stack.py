"""The stack that signal handlers run on, kept as it was while an engine is made that replaces it.

OpenVINO's CPU plugin gives the thread that makes it an alternate stack for signals (sigaltstack(2)), and when it
goes it puts the former one back. Two that do not go in the reverse order of their making leave a stack behind that
is unmapped: the next signal with a handler, a Ctrl-C or a SIGTERM, ends the process with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """When the block ends, this thread's alternate signal stack is what it was before; on Linux only.

    A plugin that was made within then finds another stack than its own when it goes, and leaves it alone.
    """
    if sys.platform != "linux":
        yield
        return
    change = ctypes.CDLL(None).sigaltstack
    before = _Stack()
    change(None, ctypes.byref(before))
    try:
        yield
    finally:
        change(ctypes.byref(before), None)
