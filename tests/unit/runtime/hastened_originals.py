"""Originals that get processor time although others want it: on a busy machine a test would wait for minutes.

Lifting a process from the lowest priority needs a right that root has; without it tests wait.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import psutil


def originals(pid: int) -> list[psutil.Process]:
    """The processes below one that have an original."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "onecard.runtime.original_process" in process.cmdline():
                found.append(process)
    return found


@contextlib.contextmanager
def hastened() -> Iterator[None]:
    """While the block runs, originals below this process are of ordinary priority."""
    over = threading.Event()

    def lift() -> None:
        while not over.wait(0.1):
            for process in originals(os.getpid()):
                with contextlib.suppress(OSError, psutil.Error):
                    for thread in process.threads():
                        os.sched_setscheduler(thread.id, os.SCHED_OTHER, os.sched_param(0))

    lifting = threading.Thread(target=lift, daemon=True)
    if sys.platform == "linux":
        lifting.start()
    try:
        yield
    finally:
        over.set()
        if lifting.ident is not None:
            lifting.join()
