"""Removing from the cache: each entry is renamed aside first, so that no half of one is ever taken for a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from onecard.cache.contents import LEFTOVER, REMOVED, Entry, mark_of, moment
from onecard.cache.use import is_file_of, lock
from onecard.errors import InterruptedSearch

_OPEN = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)


class Wish(msgspec.Struct, frozen=True):
    """What is to go; what holds for any of these goes, and leftovers always do.

    Args:
        unused_s: what was not used for so long.
        keep_bytes: the least recently used, until no more than so much is left.
        everything: all of it.
    """

    unused_s: float | None = None
    keep_bytes: int | None = None
    everything: bool = False


class Failure(msgspec.Struct, frozen=True):
    """What could not be removed, and why."""

    path: str
    why: str


class Pruned(msgspec.Struct, frozen=True):
    """What a removal came to.

    Args:
        folder: the cache's.
        dry_run: whether nothing was done in truth.
        removed: what went, or would have gone.
        in_use: what would have gone, but is worked with.
        failed: what would have gone, but could not.
        freed_bytes: of what went.
        left_bytes: of what stays.
    """

    folder: str
    dry_run: bool
    removed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    failed: tuple[Failure, ...]
    freed_bytes: int
    left_bytes: int


def choose(entries: Sequence[Entry], wish: Wish, now: datetime) -> list[Entry]:
    """Those that should go, whether or not they can; what cannot makes no room.

    Args:
        entries: all there are, the least recently used first.
        wish: what is to go.
        now: what the age is counted from.
    """
    found = []
    left = sum(entry.bytes for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.kind != LEFTOVER):
        old = wish.unused_s is not None and (now - entry.last_used).total_seconds() > wish.unused_s
        much = wish.keep_bytes is not None and left > wish.keep_bytes
        if entry.kind == LEFTOVER or wish.everything or old or much:
            found.append(entry)
            left -= 0 if entry.in_use or entry.denied else entry.bytes
    return found


def prune(root: Path, entries: Sequence[Entry], wish: Wish, *, dry_run: bool = False) -> Pruned:
    """Remove what is wished to go, and is not in use at this moment.

    Args:
        root: the cache folder.
        entries: what is there, from :func:`onecard.cache.contents.read_contents`.
        wish: what is to go.
        dry_run: only say what would.

    Returns:
        What went, and what did not.

    Raises:
        InterruptedSearch: Ctrl-C; what is half removed is a leftover, which goes the next time.
    """
    removed: list[Entry] = []
    in_use: list[Entry] = []
    failed: list[Failure] = []
    chosen = choose(entries, wish, datetime.now(timezone.utc))
    try:
        for entry in chosen:
            if entry.denied:
                failed.append(Failure(entry.denied, "permission denied"))
                continue
            try:
                goes = not entry.in_use and (dry_run or _remove(entry))
                (removed if goes else in_use).append(entry)
            except FileNotFoundError:  # another removal was faster
                removed.append(entry)
            except OSError as error:
                failed.append(Failure(str(error.filename or entry.path), error.strerror or str(error)))
    except KeyboardInterrupt:
        raise InterruptedSearch(
            f"stopped: {len(removed)} of {len(chosen)} were removed.", "Run the same command again to go on."
        ) from None
    freed = sum(entry.bytes for entry in removed)
    left = sum(entry.bytes for entry in entries) - freed
    return Pruned(str(root.absolute()), dry_run, tuple(removed), tuple(in_use), tuple(failed), freed, left)


def _remove(entry: Entry) -> bool:
    """Remove an entry; False if somebody has begun to use it."""
    path, mark = Path(entry.path), mark_of(entry.kind, Path(entry.path))
    if entry.kind == LEFTOVER and not path.is_dir():
        return _remove_lock(path)
    with contextlib.ExitStack() as held:
        if mark is not None and not _take(mark, entry.last_used, held):
            return False
        aside = path
        if entry.kind != LEFTOVER:
            aside = path.with_name(f"{REMOVED}{path.name}-{uuid.uuid4().hex[:8]}")
            with contextlib.suppress(FileNotFoundError):  # another removal was faster
                path.rename(aside)
        if entry.kind == "search" and mark is not None:
            mark.unlink()
    while aside.exists():
        with contextlib.suppress(FileNotFoundError):  # another one removes the same leftover
            shutil.rmtree(aside)
    return True


def _take(mark: Path, last_used: datetime, held: contextlib.ExitStack) -> bool:
    """Hold an entry's lock until the stack is closed; False if it is held, or was used since it was looked at."""
    try:
        handle = os.open(mark, _OPEN)
        since = True
    except FileNotFoundError:
        handle = os.open(mark, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        since = False
    held.callback(os.close, handle)
    if lock(handle) is False or not is_file_of(handle, mark):
        return False
    return not since or moment(os.fstat(handle).st_mtime) <= last_used


def _remove_lock(path: Path) -> bool:
    """Remove the lock of a search that is not there."""
    with contextlib.ExitStack() as held, contextlib.suppress(FileNotFoundError):
        handle = os.open(path, _OPEN)
        held.callback(os.close, handle)
        if lock(handle) is False or path.with_suffix("").exists():
            return False
        path.unlink()
    return True
