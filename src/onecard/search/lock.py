"""One search of a job at a time: a lock on its folder, which ends with the process whatever ends that."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from onecard.errors import UsageError

_FINISHED: weakref.WeakValueDictionary[Path, JobLock] = weakref.WeakValueDictionary()


class JobLock:
    """An advisory lock on a job's folder, held until it is released or collected.

    Args:
        path: the lock's file, beside the folder. It stays: to remove it would be a race.

    Raises:
        UsageError: another search holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if (finished := _FINISHED.pop(path, None)) is not None:  # perhaps kept alive by a traceback in a notebook
            finished.release()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)  # workers do not inherit it
        self._close = weakref.finalize(self, os.close, handle)
        try:
            _lock(handle)
        except BlockingIOError:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
            self._close()
            raise UsageError(
                f"another search of this job is running (process {holder or 'unknown'}):",
                "wait for it, or use another ONECARD_CACHE.",
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)

    def finish(self) -> None:
        """Keep others out, for the folder is still read, but let this process search the job again."""
        _FINISHED[self._path] = self

    def release(self) -> None:
        """Let others in."""
        self._close()


def _lock(handle: int) -> None:
    if os.name == "nt":
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return
