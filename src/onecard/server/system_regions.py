"""Registered system shared memory: objects of ``/dev/shm`` that clients made, read and written, never mapped.

A client may cut its object off at any moment, and a process that has mapped it would die of the next access (SIGBUS).
Reading and writing through the descriptor gives an error instead, and one copy is needed anyway: of what a client can
still change, nothing may be checked and then used.

Source: Triton's "Shared-Memory Extension".
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path

from onecard.errors import StorageError, UsageError
from onecard.server.http_types import HttpError
from onecard.server.oip_types import ProtocolError, Region, quote

MOST_NAME_CHARS = 256
"""Of a region's name."""
_FOLDER = Path("/dev/shm")  # where shm_open has its objects on Linux
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}")
_KEY = re.compile(r"/?([A-Za-z0-9._\-]{1,255})")
_MOST_BYTES = (1 << 63) - 1  # of a file


@dataclass(frozen=True)
class SystemRegion:
    """A part of a shared-memory object, under a name.

    Args:
        name: of the region.
        key: of the object, as the client gave it.
        offset: in bytes, of the region in the object.
        byte_size: of the region.
    """

    name: str
    key: str
    offset: int
    byte_size: int


class OpenRegion:
    """A region and its open object, which is closed when nothing refers to it any more.

    Args:
        region: which part of the object it is.
        descriptor: of the object; it belongs to this from now on.
    """

    def __init__(self, region: SystemRegion, descriptor: int) -> None:
        self.region = region
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    @property
    def descriptor(self) -> int:
        """Of the object; it stays this one's."""
        return self._descriptor

    def check(self, place: Region) -> None:
        """Raise a ProtocolError for a place that exceeds the region."""
        check_bounds(place, self.region.byte_size)

    def read_into(self, place: Region, out: memoryview) -> None:
        """Copy a place.

        Args:
            place: checked.
            out: of as many bytes.

        Raises:
            ProtocolError: the object was cut off since.
        """
        position = self.region.offset + place.offset
        while len(out):
            try:
                count = os.preadv(self._descriptor, [out], position)
            except OSError as error:
                raise ProtocolError(f"shared memory {quote(place.name)} cannot be read: {error.strerror}.") from error
            if not count:
                raise _cut_off(place)
            out, position = out[count:], position + count

    def write(self, place: Region, data: memoryview) -> None:
        """Copy bytes to the beginning of a place.

        Args:
            place: checked.
            data: not more bytes than the place has.

        Raises:
            ProtocolError: the object was cut off since, or sealed.
            StorageError: there is no memory for it.
        """
        position = self.region.offset + place.offset
        if os.fstat(self._descriptor).st_size < position + len(data):
            raise _cut_off(place)  # writing behind its end would make it longer
        try:
            while len(data):
                count = os.pwritev(self._descriptor, [data], position)
                data, position = data[count:], position + count
        except PermissionError as error:
            raise ProtocolError(f"shared memory {quote(place.name)} cannot be written: {error.strerror}.") from error
        except OSError as error:
            raise StorageError(
                f"shared memory {quote(place.name)} cannot be written: {error.strerror}.", f"Make room in {_FOLDER}."
            ) from error


class SystemRegions:
    """The regions that clients registered.

    Args:
        prefix: with which the objects' names begin, without the slash; None registers none.
        max_regions: at once.
        max_bytes: of all regions together.

    Raises:
        UsageError: a prefix that cannot be one, or a system without ``/dev/shm``.
    """

    def __init__(self, prefix: str | None, max_regions: int = 256, max_bytes: int = 16 << 30) -> None:
        if prefix is not None and not _PREFIX.fullmatch(prefix):
            raise UsageError(
                f"'{prefix}' cannot be a prefix of shared memory: expected letters, digits, '.', '_' and '-', with a "
                "letter or a digit first, at most 128."
            )
        if prefix is not None and not _FOLDER.is_dir():
            raise UsageError(f"system shared memory needs {_FOLDER}, which this system does not have.")
        self._prefix = prefix
        self._max_regions = max_regions
        self._max_bytes = max_bytes
        self._open: dict[str, OpenRegion] = {}

    @property
    def enabled(self) -> bool:
        return self._prefix is not None

    def register(self, region: SystemRegion) -> None:
        """Open an object, and give a part of it a name.

        Raises:
            ProtocolError: not enabled, a name that is taken, a key without the prefix, an object that does not exist,
                belongs to another user or is too small, or too many regions.
        """
        path = self._path(region.key)
        check_name(region.name)
        if region.name in self._open:
            raise already_registered(region.name)
        if len(self._open) >= self._max_regions:
            raise ProtocolError(f"{self._max_regions} regions of system shared memory are registered, no more can be.")
        if sum(opened.region.byte_size for opened in self._open.values()) + region.byte_size > self._max_bytes:
            raise ProtocolError(f"the regions of system shared memory may have {self._max_bytes} bytes together.")
        if region.byte_size < 1 or region.offset < 0 or region.offset + region.byte_size > _MOST_BYTES:
            raise ProtocolError(
                f"the region {quote(region.name)} has an 'offset' of {region.offset} and a 'byte_size' of "
                f"{region.byte_size}, expected at least 0 and at least 1."
            )
        self._open[region.name] = _open_region(region, path)

    def adopt(self, region: SystemRegion, descriptor: int) -> None:
        """Take over a region that another process of the server opened and checked.

        Args:
            region: which part of the object it is.
            descriptor: of the object; it belongs to the region from now on.
        """
        self._open[region.name] = OpenRegion(region, descriptor)

    def unregister(self, name: str) -> None:
        """Forget a region; one that is not registered is none to forget. Requests under way may still use it."""
        self._open.pop(name, None)

    def unregister_all(self) -> None:
        """Forget every region."""
        self._open.clear()

    def status(self, name: str = "") -> list[SystemRegion]:
        """One region, or with an empty name all of them.

        Raises:
            HttpError: 404, there is no such region.
        """
        if not name:
            return [opened.region for opened in self._open.values()]
        if name not in self._open:
            raise not_registered("system", name)
        return [self._open[name].region]

    def find(self, name: str) -> OpenRegion | None:
        """A region by its name."""
        return self._open.get(name)

    def _path(self, key: str) -> Path:
        if self._prefix is None:
            raise ProtocolError(
                "system shared memory is not enabled on this server.", "Start it with --shared-memory-prefix."
            )
        found = _KEY.fullmatch(key)
        if found is None or not found[1].startswith(self._prefix):
            raise ProtocolError(
                f"the key {quote(key)} is not one of this server's: expected '/{self._prefix}' and then letters, "
                "digits, '.', '_' and '-'."
            )
        return _FOLDER / found[1]


def check_bounds(place: Region, byte_size: int) -> None:
    """Raise a ProtocolError for a place that exceeds a region of that many bytes."""
    if place.offset + place.byte_size > byte_size:
        raise ProtocolError(
            f"shared memory {quote(place.name)} has {byte_size} bytes: {place.byte_size} bytes at offset "
            f"{place.offset} are not within it."
        )


def check_name(name: str) -> None:
    """Raise a ProtocolError for what cannot be a region's name."""
    if not 0 < len(name) <= MOST_NAME_CHARS:
        raise ProtocolError(f"the region's name has {len(name)} characters, expected 1 to {MOST_NAME_CHARS}.")


def already_registered(name: str) -> ProtocolError:
    """The error for a name that is taken, by a region of whichever kind."""
    return ProtocolError(f"the shared memory region {quote(name)} is registered already.", "Unregister it first.")


def not_registered(kind: str, name: str) -> HttpError:
    """The error for the status of a region that there is not."""
    return HttpError(404, f"unable to find {kind} shared memory region {quote(name)}: it is not registered.")


def _open_region(region: SystemRegion, path: Path) -> OpenRegion:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # the last: a lease of another is not waited for
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise ProtocolError(
            f"the shared memory object {quote(region.key)} cannot be opened: {error.strerror}."
        ) from None
    opened = OpenRegion(region, descriptor)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        raise ProtocolError(
            f"the shared memory object {quote(region.key)} is not a plain object of the user that the server runs as."
        )
    if found.st_size < region.offset + region.byte_size:
        raise ProtocolError(
            f"the shared memory object {quote(region.key)} has {found.st_size} bytes, but the region "
            f"{quote(region.name)} is to have {region.byte_size} bytes at offset {region.offset}."
        )
    return opened


def _cut_off(place: Region) -> ProtocolError:
    return ProtocolError(f"the object of shared memory {quote(place.name)} was cut off after it was registered.")
