"""Digests of files, checked against the manifest before anything else reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path

from onecard.bundle.manifest import FileEntry

_CHUNK = 1 << 20


def describe(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def unlisted(folder: Path, files: Container[str], roots: Iterable[str]) -> dict[str, str]:
    """Files under some folders of a bundle that the manifest does not know, which an engine might pick up."""
    found = (path for root in roots for path in (folder / root).rglob("*") if path.is_file() or path.is_symlink())
    names = (path.relative_to(folder).as_posix() for path in found)
    return {name: "is not listed in onecard.json" for name in names if name not in files}


def damaged(folder: Path, files: Iterable[tuple[str, FileEntry]]) -> dict[str, str]:
    """Files that are not what the manifest says, with what is wrong.

    The size is looked at first, so that a file that grew is never read past its recorded size.
    """
    found: dict[str, str] = {}
    for name, entry in files:
        path = folder / name
        if path.is_symlink() or any(p.is_symlink() for p in path.parents if p.is_relative_to(folder) and p != folder):
            found[name] = "is a symbolic link, which a bundle may not hold"
        elif not path.is_file():
            found[name] = "is missing"
        elif path.stat().st_size != entry.size:
            found[name] = f"has {path.stat().st_size} bytes, expected {entry.size}"
        elif describe(path).sha256 != entry.sha256:
            found[name] = "has been changed: its digest does not match"
    return found
