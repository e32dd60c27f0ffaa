"""One search of a job at a time: a lock on its folder, which ends with the process whatever ends that."""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path

from onecard.cache.use import is_file_of, lock
from onecard.errors import UsageError

_ATTEMPTS, _PAUSE_S = 3, 0.05  # 'onecard cache' holds a lock for a moment, to look or to remove
_FINISHED: weakref.WeakValueDictionary[Path, JobLock] = weakref.WeakValueDictionary()


class JobLock:
    """An advisory lock on a job's folder, held until it is released or collected.

    Args:
        path: the lock's file, beside the folder. It is written to by every search, so that its time is the last one's,
            and stays until ``onecard cache`` removes both.

    Raises:
        UsageError: another search holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if (finished := _FINISHED.pop(path, None)) is not None:  # perhaps kept alive by a traceback in a notebook
            finished.release()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = self._open()
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)

    def _open(self) -> int:
        """The file, locked; a new one where it was removed between opening and locking."""
        holder = ""
        for _ in range(_ATTEMPTS):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)  # workers do not inherit it
            handle = os.open(self._path, flags, 0o600)
            self._close = weakref.finalize(self, os.close, handle)
            taken = lock(handle)
            if taken is not False and is_file_of(handle, self._path):
                return handle
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
            self._close()
            if taken is False:
                time.sleep(_PAUSE_S)
        raise UsageError(
            f"another search of this job is running (process {holder or 'unknown'}):",
            "wait for it, or use another ONECARD_CACHE.",
        )

    def finish(self) -> None:
        """Keep others out, for the folder is still read, but let this process search the job again."""
        _FINISHED[self._path] = self

    def release(self) -> None:
        """Let others in."""
        self._close()
