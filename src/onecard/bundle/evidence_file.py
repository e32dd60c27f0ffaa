"""Reading the evidence that a bundle carries."""

from __future__ import annotations

from pathlib import Path

import msgspec

from onecard.bundle.files import damaged
from onecard.bundle.manifest import EVIDENCE, read_manifest
from onecard.errors import BundleError
from onecard.evidence import Evidence


def read_evidence(folder: Path) -> Evidence:
    """All that the search found, from ``evidence.json``.

    Raises:
        BundleError: no bundle, or the evidence is missing or damaged.
    """
    manifest = read_manifest(folder)
    entry = manifest.files.get(EVIDENCE)
    if entry is None:
        raise BundleError(f"{folder} carries no {EVIDENCE}.", "Make the bundle anew.")
    broken = damaged(folder.absolute(), [(EVIDENCE, entry)])
    if broken:
        raise BundleError(f"{folder / EVIDENCE} {broken[EVIDENCE]}.", "Copy the bundle again or make it anew.")
    try:
        return msgspec.json.decode((folder / EVIDENCE).read_bytes(), type=Evidence)
    except msgspec.MsgspecError as error:
        raise BundleError(
            f"{folder / EVIDENCE} does not follow the format: {error}.", "Make the bundle anew."
        ) from error
