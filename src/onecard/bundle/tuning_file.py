"""Reading the tuning that a bundle carries."""

from __future__ import annotations

from pathlib import Path

from onecard.bundle.files import damaged
from onecard.bundle.manifest import Manifest, read_manifest
from onecard.errors import BundleError
from onecard.tuning import MAX_TUNING_BYTES, Tuning, tuning_from_bytes

TUNING = "tuning.json"


def read_tuning(folder: Path, manifest: Manifest | None = None) -> Tuning | None:
    """What ``onecard tune`` found, from ``tuning.json``.

    Args:
        folder: of the bundle.
        manifest: of the bundle, if it was read already.

    Returns:
        None if the bundle was never tuned.

    Raises:
        BundleError: no bundle, or the tuning is damaged.
    """
    manifest = manifest or read_manifest(folder)
    entry = manifest.files.get(TUNING)
    if entry is None:
        return None
    path = folder.absolute() / TUNING
    if entry.size > MAX_TUNING_BYTES:
        raise BundleError(f"{path} has more than {MAX_TUNING_BYTES >> 20} MiB, which no tuning needs.", _CURE)
    broken = damaged(folder.absolute(), [(TUNING, entry)])
    if broken:
        raise BundleError(f"{path} {broken[TUNING]}.", _CURE)
    return tuning_from_bytes(path.read_bytes(), str(path))


_CURE = "Tune the bundle again: onecard tune."
