"""Writing a bundle: aside first, then renamed into place, so that there is always a whole one or none."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from onecard.bundle.manifest import MANIFEST
from onecard.errors import StorageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes the bundle when the block ends well and vanishes when it does not.

    Args:
        out: the bundle's folder, absolute; an older bundle there is replaced at the very end. Where it is a link,
            the folder that it leads to.

    Raises:
        StorageError: the folder cannot be written, the disk is full, or something else lies there.
    """
    out = _followed(out)
    check_writable(out)
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explained_storage(out):
        try:
            aside.mkdir(parents=True)
            yield aside
            _sync(aside)
            _replace(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def check_writable(out: Path) -> None:
    """Find out before hours of work whether a bundle could be written there.

    Raises:
        StorageError: the folder above cannot be written, or something that is no bundle is in the way.
    """
    out = _followed(out)
    with explained_storage(out):
        if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise StorageError(f"{out} exists and is no onecard bundle.", "Choose another with -o, or remove it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.probe")
        probe.mkdir()
        probe.rmdir()


def _followed(out: Path) -> Path:
    """The folder itself: to exchange a link would leave the old bundle where others look for it."""
    return Path(os.path.realpath(out))


def _replace(aside: Path, out: Path) -> None:
    """Put the new bundle in the place of an older one: exchanged at once where the system can, else by renaming."""
    if not out.exists():
        aside.rename(out)
        return
    if _exchange(aside, out):  # what lies aside now is the old one, and is cleaned up with it
        return
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.old")
    out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step with Linux' renameat2(2); False where there is no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _sync(folder: Path) -> None:
    """Ask the disk to have every file before the rename makes them the bundle."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def explained_storage(what: Path, cure: str = "Free some space or choose another folder with -o.") -> Iterator[None]:
    """Say in one sentence what the disk refused, whichever library was writing.

    Args:
        what: the folder that was to be written.
        cure: what the user can do.

    Raises:
        StorageError: in place of an OSError, or of a SafetensorError that stands for one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(_explain(error, what), cure) from error


def _explain(error: OSError | SafetensorError, out: Path) -> str:
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC or "No space left" in str(error):
        return f"the disk is full: {out} was not written."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{out.parent} cannot be written ({os.strerror(number or 0)}): {out.name} was not made."
    return f"{out} was not written: {error}."
