"""Putting files into a bundle that is there: all the others are linked beside it, and the two folders exchanged."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Container, Mapping
from pathlib import Path

import msgspec

from onecard.bundle.files import describe
from onecard.bundle.manifest import MANIFEST, Manifest, encode_manifest, read_manifest
from onecard.bundle.write import new_bundle
from onecard.errors import BundleError


def amend(folder: Path, changes: Mapping[str, bytes], expected: Manifest) -> None:
    """Add or replace files at the top of a bundle. Afterwards there is the new bundle, or after a failure the old one.

    The digests of all other files stay as they are in the manifest: damage that was there is still found.

    Args:
        folder: of the bundle.
        changes: file names with their content; no folders, and not the manifest.
        expected: the manifest of the bundle that the changes were made for.

    Raises:
        BundleError: no bundle, or another than was expected.
        StorageError: it cannot be written, or the disk is full.
    """
    for name in changes:
        if name == MANIFEST or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"'{name}' is no file that a bundle can be amended with")
    out = folder.resolve()
    manifest = read_manifest(out)
    if manifest.sha256 != expected.sha256:
        raise BundleError(f"{out} was replaced meanwhile; nothing was written into it.", "Run the command again.")
    with new_bundle(out) as aside:
        _link_tree(out, aside, leave_out={MANIFEST, *changes})
        files = dict(manifest.files)
        for name, content in changes.items():
            (aside / name).write_bytes(content)
            files[name] = describe(aside / name)
        amended = msgspec.structs.replace(manifest, files=dict(sorted(files.items())))
        (aside / MANIFEST).write_bytes(encode_manifest(amended))


def _link_tree(source: Path, target: Path, leave_out: Container[str] = ()) -> None:
    """The same files under another folder, without a copy where the file system can."""
    for entry in os.scandir(source):
        place = target / entry.name
        if entry.name in leave_out:
            continue
        if entry.is_dir(follow_symlinks=False):
            place.mkdir()
            _link_tree(Path(entry.path), place)
        else:
            _link(entry.path, place)
    # A folder that only its owner may read stays so; one that nobody may write could not be cleaned up.
    target.chmod(stat.S_IMODE(source.stat().st_mode) | stat.S_IRWXU)


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # another file system below, or one without links
        shutil.copy2(source, target, follow_symlinks=False)
