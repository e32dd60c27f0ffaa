"""Bundles whose ranks do not depend on how busy the machine was when they were made."""

from __future__ import annotations

from pathlib import Path

import msgspec

from onecard.bundle.manifest import MANIFEST, encode_manifest, read_manifest


def rank_first(bundle: Path, recipe: str) -> Path:
    """Let a variant that a bundle holds serve all its sizes, the original being next; returns the bundle."""
    manifest = read_manifest(bundle)
    ranks = tuple(
        msgspec.structs.replace(rank, variants=(recipe, *(name for name in rank.variants if name != recipe)))
        for rank in manifest.ranks
    )
    manifest = msgspec.structs.replace(manifest, ranks=ranks, chosen=recipe)
    (bundle / MANIFEST).write_bytes(encode_manifest(manifest))
    return bundle
