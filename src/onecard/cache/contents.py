"""What is in the cache: searches, states of trainings, plans under way, bytecode, and what a removal left behind.

Only names that onecard gives are looked at, for the folder may hold other things too; no link in it is followed but one
in the place of a kind's folder, through which onecard itself writes.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import psutil

from onecard.cache.use import MARK, is_held
from onecard.errors import StorageError

LEFTOVER = "leftover"
REMOVED = ".removed-"
"""What is being removed is called so first; what is still called so later is a leftover."""

_KINDS: dict[str, tuple[str, str]] = {
    "search": ("searches", r"[0-9a-f]{24}"),
    "training": ("training", r"[0-9a-f]{32}|prune-[0-9a-f]{16}"),
    "plan": ("plans", r"[0-9]+-[a-z0-9_]+"),
    "bytecode": ("", r"pycache(-torch-.+)?"),
}
"""Kind to its folder in the cache, and the names that its entries have there."""

_LATEST = 250_000_000_000.0  # in the year 9892
_UNSURE_S = 3600.0  # how long no file may have changed while somebody works


class Entry(msgspec.Struct, frozen=True):
    """One thing that is kept, and that is removed as a whole.

    Args:
        kind: ``search``, ``training``, ``plan``, ``bytecode`` or ``leftover``.
        path: its folder; of a leftover perhaps a file.
        name: the model's, of a search.
        bytes: of all its files.
        last_used: when it was last worked with; in UTC.
        in_use: whether it is worked with now.
        denied: what of it this user may not remove, or empty.
    """

    kind: str
    path: str
    name: str
    bytes: int
    last_used: datetime
    in_use: bool = False
    denied: str = ""


class Kind(msgspec.Struct, frozen=True):
    """The entries of one kind, or of all: how many, how many of them are in use, bytes, first and last of last uses."""

    kind: str
    count: int
    in_use: int
    bytes: int
    oldest: datetime | None
    newest: datetime | None


def mark_of(kind: str, path: Path) -> Path | None:
    """The file whose lock says that an entry is in use, and whose time tells when it last was; None for a kind without.

    Args:
        kind: of the entry.
        path: its folder.
    """
    if kind == "search":
        return path.with_name(f"{path.name}.lock")
    return path / MARK if kind in ("training", "plan") else None


def read_contents(root: Path) -> list[Entry]:
    """All entries, the least recently used first; a folder that does not exist holds none.

    Args:
        root: the cache folder.

    Raises:
        StorageError: a folder cannot be read.
    """
    found = [entry for kind in _KINDS for entry in _entries(root, kind)]
    works = any(entry.in_use and entry.kind in ("search", "plan") for entry in found)  # with workers, who read it
    found = [msgspec.structs.replace(e, in_use=True) if works and e.kind == "bytecode" else e for e in found]
    return sorted(found, key=lambda entry: (entry.last_used, entry.path))


def summarise(name: str, entries: Iterable[Entry]) -> Kind:
    """Entries as one row."""
    rows = list(entries)
    times = [entry.last_used for entry in rows]
    in_use = sum(entry.in_use for entry in rows)
    size = sum(entry.bytes for entry in rows)
    return Kind(name, len(rows), in_use, size, min(times, default=None), max(times, default=None))


def by_kind(entries: Iterable[Entry]) -> list[Kind]:
    """A row for each kind that there is."""
    rows = list(entries)
    found = (summarise(name, [e for e in rows if e.kind == name]) for name in (*_KINDS, LEFTOVER))
    return [row for row in found if row.count]


def moment(seconds: float) -> datetime:
    """A file's time, which may be any number, as a date that there is."""
    return datetime.fromtimestamp(min(max(seconds, 0.0), _LATEST), timezone.utc)


def is_working_in(kind: str, path: Path, last_used: float) -> bool:
    """Whether somebody works with an entry now; without locks, whether it was used a moment ago.

    Raises:
        OSError: the lock may not be looked at.
    """
    mark = mark_of(kind, path)
    if mark is None:
        return False
    if kind == "plan" and not mark.exists():  # of a onecard that made no mark, or made this very moment
        return bool(psutil.pid_exists(int(path.name.partition("-")[0])))
    held = is_held(mark)
    return time.time() - last_used < _UNSURE_S if held is None else held


def _entries(root: Path, kind: str) -> Iterator[Entry]:
    for path in _listed(root / _KINDS[kind][0], optional=bool(_KINDS[kind][0])):
        found = _kind_of(kind, path)
        if found and (entry := _entry(found, path)) is not None:
            yield entry


def _kind_of(kind: str, path: Path) -> str:
    """What something is in the folder of a kind; empty for what is not onecard's."""
    names = _KINDS[kind][1]
    if path.is_symlink():
        return ""
    if path.is_dir():
        if re.fullmatch(rf"{re.escape(REMOVED)}({names})-[0-9a-f]{{8}}", path.name):
            return LEFTOVER
        return kind if re.fullmatch(names, path.name) and (kind != "bytecode" or _is_private(path)) else ""
    return LEFTOVER if kind == "search" and re.fullmatch(rf"({names})\.lock", path.name) and _is_orphan(path) else ""


def _listed(folder: Path, *, optional: bool) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        if optional and isinstance(error, NotADirectoryError):  # a file of somebody else's
            return []
        raise StorageError(
            f"the cache {folder} cannot be read: {error.strerror}.", "Set ONECARD_CACHE to a folder of yours."
        ) from error


def _entry(kind: str, path: Path) -> Entry | None:
    """One entry; None if it was removed meanwhile."""
    mark = mark_of(kind, path)
    size, newest, denied = _measure(path)
    if mark is not None:
        with contextlib.suppress(OSError):
            newest = max(newest, mark.lstat().st_mtime)
    if newest == 0.0 and not path.exists():
        return None
    in_use = False
    try:
        in_use = is_working_in(kind, path, newest)
    except OSError:
        denied = denied or str(mark)
    return Entry(kind, str(path), _name(path) if kind == "search" else "", size, moment(newest), in_use, denied)


def _measure(path: Path) -> tuple[int, float, str]:
    """Bytes of all files, the newest time of all, and a folder among them that may not be changed."""
    size, newest, denied = 0, 0.0, ""
    waiting = [path]
    while waiting:
        here = waiting.pop()
        try:
            about = here.lstat()
        except FileNotFoundError:  # whoever works there
            continue
        newest = max(newest, about.st_mtime)
        if not stat.S_ISDIR(about.st_mode):
            size += about.st_size
            continue
        if not os.access(here, os.R_OK | os.W_OK | os.X_OK):
            denied = denied or str(here)
        with contextlib.suppress(OSError):
            waiting.extend(Path(child.path) for child in os.scandir(here))
    return size, newest, denied


def _name(path: Path) -> str:
    """The model of a search, as far as its folder tells."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((path / "job.json").read_bytes(), type=_Named).name
    return ""


class _Named(msgspec.Struct):
    name: str


def _is_private(path: Path) -> bool:
    """Bytecode is only ever kept in a folder that is closed to others, and its name is nobody's alone."""
    about = path.lstat()
    return about.st_uid == os.geteuid() and not about.st_mode & 0o077


def _is_orphan(path: Path) -> bool:
    """Whether a lock has no folder, and nobody who is about to make it."""
    if path.with_suffix("").exists():
        return False
    try:
        return is_held(path) is False
    except OSError:
        return False
