"""Use of the cache: locks that end with their process whatever ends that, and marks whose time is the last use."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MARK = ".in-use"
"""The file, in a folder that is worked in, that is locked as long as it is."""

_ATTEMPTS = 5


def lock(handle: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed.

    Args:
        handle: of the file.
        shared: beside others who share it.
        wait: until it is free.

    Returns:
        False if somebody else holds it, None where there are no locks: not every file system has them.
    """
    if os.name == "nt":
        return None
    import fcntl

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_file_of(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at a path: a lock on one that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def is_held(mark: Path) -> bool | None:
    """Whether somebody holds the lock on a file; None where there are no locks.

    Raises:
        OSError: the file cannot be opened; that it is not there is no error.
    """
    shared = mark.name != MARK  # a search's lock is held by one alone, so that many may look at once
    try:
        handle = os.open(mark, (os.O_RDONLY if shared else os.O_RDWR) | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return False
    try:
        taken = lock(handle, shared=shared)
    finally:
        os.close(handle)
    return None if taken is None else not taken


def renew(path: Path) -> None:
    """Say that something is used now; what is not there, or may not be changed, stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(path)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep ``onecard cache`` from removing a folder while the block runs, and let its time tell of this use.

    The folder is made if it is missing, and gone again afterwards if nothing was put there. Where it cannot be
    written nothing is said: whoever writes there next will say it better.

    Args:
        folder: to work in; others may do so at the same time.
    """
    handle = _hold(folder)
    try:
        yield
    finally:
        if handle is not None:
            _leave(folder, handle)


def _hold(folder: Path) -> int | None:
    mark = folder / MARK
    for _ in range(_ATTEMPTS):  # the folder may be removed between any two of these steps
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(mark, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            lock(handle, shared=True, wait=True)
            renew(mark)
            if is_file_of(handle, mark):
                return handle
            os.close(handle)
    return None


def _leave(folder: Path, handle: int) -> None:
    renew(folder / MARK)
    with contextlib.suppress(OSError):
        alone = lock(handle) is True and is_file_of(handle, folder / MARK)
        if alone and os.listdir(folder) == [MARK]:
            shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
