"""What changes in a folder of bundles: which are new, replaced or gone. It looks when asked, and opens no bundle.

A subfolder ``NAME.onecard`` or ``NAME`` with an ``onecard.json`` is a model. It counts when it is whole (every file
that ``onecard.json`` lists is there, of its size) and nothing of it changed for a while, so a copy under way is not
taken for a bundle. onecard itself writes bundles under names that begin with a dot, and then renames them.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

import msgspec

from onecard.errors import UsageError
from onecard.server.repository import MANIFEST, SUFFIX, is_name

Kind: TypeAlias = Literal["added", "changed", "removed", "broken"]

_MAX_MANIFEST_BYTES = 16 << 20
_MISSING = (errno.ENOENT, errno.ENOTDIR)
_LOGGER = logging.getLogger("onecard.server.watch")


@dataclass(frozen=True)
class Change:
    """What happened to a model.

    Args:
        kind: ``added``; ``changed``: another bundle lies there, or the same one anew; ``broken``: it cannot be used as
            it is, which is told once, and what was there before may go on; ``removed``: after any of these.
        name: of the model.
        path: of its bundle, with symbolic links followed; for ``removed``, where it was.
        reason: why it is broken.
    """

    kind: Kind
    name: str
    path: Path
    reason: str = ""


@dataclass(frozen=True)
class _Sight:
    """What was seen of a model: where, a mark that differs whenever anything of it does, and what is wrong with it."""

    path: Path
    mark: Hashable
    problem: str = ""


@dataclass
class _Track:
    """What is known of a model: its latest sight and since when it is so, the last whole one, and what was told."""

    sight: _Sight | None
    since: float
    served: _Sight | None = None
    told: Change | None = None


class _File(msgspec.Struct, frozen=True):
    size: int


class _Listing(msgspec.Struct, frozen=True):
    """What matters here of ``onecard.json``."""

    files: dict[str, _File]


class _BrokenError(Exception):
    """A bundle that cannot be used, with the reason."""


class FolderWatch:
    """Looks at a folder of bundles. It blocks for a ``stat`` of each file of each bundle: call it off the loop.

    Args:
        folder: it may be a symbolic link; links inside it that lead out of it are refused.
        settle_s: how long a bundle must be unchanged before it is told of.
        clock: seconds, never going back.

    Raises:
        UsageError: there is no such folder, or it cannot be read.
    """

    def __init__(self, folder: Path, settle_s: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder.absolute()
        self._settle_s = settle_s
        self._clock = clock
        self._tracks: dict[str, _Track] = {}
        self._listings: dict[tuple[int, ...], dict[str, int]] = {}  # by the manifest's stat: read when it changed
        self._warned: set[str] = set()
        self._is_lost = False
        try:
            os.scandir(self._folder).close()
        except OSError as error:
            raise UsageError(
                f"the folder of models {folder} cannot be read: {error.strerror}.", "Name one with bundles in it."
            ) from error

    def changes(self, at_once: bool = False) -> list[Change]:
        """What is different from what was told before, by name.

        While the whole folder cannot be read (a disk that is not mounted), nothing is told: models are not removed by
        that.

        Args:
            at_once: tell what there is now, without waiting until it settles: when a server starts.
        """
        now = self._clock()
        try:
            found = self._look()
        except OSError as error:
            if not self._is_lost:
                _LOGGER.warning("%s cannot be read: %s. Its models go on as they are.", self._folder, error.strerror)
            self._is_lost = True
            return []
        self._is_lost = False
        told = []
        for name in sorted({*found, *self._tracks}):
            track = self._tracks.setdefault(name, _Track(None, now))
            sight = found.get(name)
            if track.sight != sight:
                track.sight, track.since = sight, now
            if at_once or now - track.since >= self._settle_s:
                told += _settled(name, track)
                if track.sight is None:
                    del self._tracks[name]
        return told

    def _look(self) -> dict[str, _Sight]:
        """All models that can be seen now, by name."""
        root = Path(os.path.realpath(self._folder, strict=True))
        with os.scandir(root) as entries:
            listed = [entry.name for entry in entries if not entry.name.startswith(".")]
        rivals: dict[str, dict[str, _Sight]] = {}  # by the model's name, then by the entry's
        listings: dict[tuple[int, ...], dict[str, int]] = {}
        for entry in sorted(listed, key=lambda each: (not each.endswith(SUFFIX), each)):
            sight = self._sight(root, entry, listings)
            if sight is not None and self._is_name(entry):
                rivals.setdefault(entry.removesuffix(SUFFIX), {})[entry] = sight
        self._listings = listings
        self._warned &= set(listed)
        return {name: self._choose(name, sights) for name, sights in rivals.items()}

    def _is_name(self, entry: str) -> bool:
        """Whether a model may be called so; what is no name is said once."""
        if is_name(entry.removesuffix(SUFFIX)):
            return True
        self._warn(
            entry, "%r is passed over: a model's name has letters, digits, '.', '_' and '-', at most 128.", entry
        )
        return False

    def _choose(self, name: str, sights: Mapping[str, _Sight]) -> _Sight:
        """One of NAME.onecard and NAME: the one that is told of already, else the first."""
        track = self._tracks.get(name)
        known = track.served.path if track is not None and track.served is not None else None
        chosen = next((entry for entry, sight in sights.items() if sight.path == known), next(iter(sights)))
        for entry in sights:
            if entry != chosen:
                self._warn(entry, "%r is passed over: %r is called '%s' as well.", entry, chosen, name)
        return sights[chosen]

    def _warn(self, entry: str, message: str, *details: object) -> None:
        if entry not in self._warned:
            self._warned.add(entry)
            _LOGGER.warning(message, *details)

    def _sight(self, root: Path, entry: str, listings: dict[tuple[int, ...], dict[str, int]]) -> _Sight | None:
        """A model, whole or broken; None for what is none and does not claim to be one."""
        path = root / entry
        name = entry.removesuffix(SUFFIX)
        claims = entry.endswith(SUFFIX) or (name in self._tracks and self._tracks[name].served is not None)
        mark: list[Hashable] = []
        try:
            link = path.lstat()
            mark.append(_identity(link))
            if stat.S_ISLNK(link.st_mode):
                path = Path(os.path.realpath(path, strict=True))
                if path == root or not path.is_relative_to(root):
                    claims = claims or (path / MANIFEST).exists()
                    raise _BrokenError("it is a symbolic link that leads out of the folder of models, which is refused")
            if not path.is_dir():
                return None
            mark.append(_identity(path.stat()))
            manifest = (path / MANIFEST).lstat()
            claims = True
            mark.append(_stamp(manifest))
            stamps, problem = _stamps(path, self._listing(path, manifest, listings))
            mark += stamps
        except (_BrokenError, OSError) as error:
            if isinstance(error, OSError):
                claims = claims or (error.errno not in _MISSING and is_name(name))
                error = _BrokenError(_explained(error, path))
            return _Sight(path, tuple(mark), str(error)) if claims else None
        return _Sight(path, tuple(mark), problem)

    def _listing(
        self, path: Path, manifest: os.stat_result, listings: dict[tuple[int, ...], dict[str, int]]
    ) -> dict[str, int]:
        """Sizes of a bundle's files by name, read anew when the manifest changed."""
        if not stat.S_ISREG(manifest.st_mode):
            raise _BrokenError(f"its {MANIFEST} is not a regular file")
        key = (manifest.st_dev, *_stamp(manifest))
        listings[key] = self._listings[key] if key in self._listings else _read_listing(path / MANIFEST)
        return listings[key]


def _stamps(path: Path, files: Mapping[str, int]) -> tuple[list[Hashable], str]:
    """Stamps of all files of a bundle, also when some are wrong (others may be growing), and the first problem."""
    stamps: list[Hashable] = []
    problem = ""
    for name, size in files.items():
        try:
            found = (path / name).lstat()
        except OSError as error:
            stamps.append(None)
            problem = problem or _explained(error, path)
            continue
        stamps.append(_stamp(found))
        if not stat.S_ISREG(found.st_mode):
            problem = problem or f"{name} is not a regular file"
        elif found.st_size != size:
            problem = problem or f"{name} has {found.st_size} bytes, expected {size}"
    return stamps, problem


def _settled(name: str, track: _Track) -> list[Change]:
    """What there is to tell of a model that did not change for a while."""
    sight, served, told = track.sight, track.served, track.told
    if sight is None:
        return [] if told is None else [Change("removed", name, told.path)]
    if sight.problem:
        change = Change("broken", name, sight.path, sight.problem)
        if change == told:
            return []
    else:
        change = Change("added" if served is None else "changed", name, sight.path)
        if sight == served:  # it was broken, and is again what it was
            track.told = change
            return []
        track.served = sight
    track.told = change
    return [change]


def _read_listing(path: Path) -> dict[str, int]:
    """Sizes of the files that a manifest lists, by name.

    Raises:
        _BrokenError: it is too large, no manifest, or names a file outside of the bundle.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(data) > _MAX_MANIFEST_BYTES:
        raise _BrokenError(f"its {MANIFEST} has more than {_MAX_MANIFEST_BYTES >> 20} MiB, which no bundle needs")
    try:
        files = msgspec.json.decode(data, type=_Listing).files
    except msgspec.MsgspecError as error:
        raise _BrokenError(f"its {MANIFEST} does not follow the format: {error}") from error
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in name:
            raise _BrokenError(f"its {MANIFEST} names the file {name!r} outside of the bundle")
    return {name: file.size for name, file in files.items()}


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Of a folder: not its times, which change with whatever is written beside the bundle's own files."""
    return (found.st_dev, found.st_ino)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _explained(error: OSError, path: Path) -> str:
    """An error of the file system, for a bundle at a path."""
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    name = place.relative_to(path).as_posix() if place.is_relative_to(path) and place != path else "it"
    if error.errno in _MISSING:
        return f"{name} is missing, or not copied yet" if name != "it" else "it is a symbolic link that leads nowhere"
    return f"{name} cannot be read: {error.strerror}"
