"""``onecard.json``: what a bundle holds. Its format is specified in docs/bundle-format.md."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

import msgspec

from onecard.environment import Environment
from onecard.errors import BundleError
from onecard.evidence import Measurement, Rank
from onecard.recipe import Recipe
from onecard.spec import Bucket, Spec
from onecard.verify.cases import Case
from onecard.verify.compare import Threshold

FORMAT_VERSION = 1
MANIFEST = "onecard.json"
GOLDEN = "golden.safetensors"
EVIDENCE = "evidence.json"
REPORT = "report.html"
SOURCE = "source"
VARIANTS = "variants"

MAX_MANIFEST_BYTES = 16 << 20
MAX_JSON_BYTES = 512 << 20
MAX_FILES = 10_000
MAX_FILE_BYTES = 256 << 30

_DIGEST = re.compile(rb'^\{\s*"sha256":\s*"([0-9a-f]{64})"')
_NO_DIGEST = b"0" * 64


class FileEntry(msgspec.Struct, frozen=True):
    """Size and digest of one file."""

    size: int
    sha256: str


class VariantEntry(msgspec.Struct, frozen=True):
    """One variant: its recipe, how far it may be from the golden answers, and what was measured."""

    recipe: Recipe
    threshold: Threshold
    measurement: Measurement
    needs_source: bool

    @property
    def folder(self) -> str:
        return f"{VARIANTS}/{self.recipe.id}"


class Manifest(msgspec.Struct, frozen=True):
    """The whole of ``onecard.json``, without its own digest, which stands before everything else."""

    sha256: str
    format_version: int
    onecard_version: str
    name: str
    spec: Spec
    buckets: tuple[Bucket, ...]
    objective: str
    chosen: str
    ranks: tuple[Rank, ...]
    variants: tuple[VariantEntry, ...]
    environment: Environment
    golden: Case
    files: dict[str, FileEntry]

    def variant(self, recipe_id: str) -> VariantEntry | None:
        return next((v for v in self.variants if v.recipe.id == recipe_id), None)


class _Header(msgspec.Struct, frozen=True):
    """What can be read of a manifest of any version."""

    format_version: int = 0


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``onecard.json``: the digest at its head is that of the file with 64 zeros in its place."""
    blank = msgspec.structs.replace(manifest, sha256=_NO_DIGEST.decode())
    data = msgspec.json.format(msgspec.json.encode(blank), indent=1)
    return data.replace(_NO_DIGEST, hashlib.sha256(data).hexdigest().encode(), 1)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``onecard.json`` itself (not yet the files it lists).

    Raises:
        BundleError: no bundle, too large, damaged, of a newer format, or with paths that leave the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is no onecard bundle: it holds no {MANIFEST}.", "Pass a folder that 'onecard optimize' wrote."
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB, which no bundle needs.", "Do not trust this bundle."
        )
    data = path.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Header).format_version
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path} is damaged: {error}.", "Copy the bundle again or make it anew.") from error
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}; this onecard reads up to {FORMAT_VERSION}.",
            "Upgrade: pip install -U onecard.",
        )
    head = _DIGEST.match(data)
    blank = data[: head.start(1)] + _NO_DIGEST + data[head.end(1) :] if head else b""
    if head is None or hashlib.sha256(blank).hexdigest().encode() != head[1]:
        raise BundleError(f"{path} is damaged: its digest does not match.", "Copy the bundle again or make it anew.")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path} does not follow the format: {error}.", "Make the bundle anew.") from error
    _check_names(manifest, path)
    return manifest


def _check_names(manifest: Manifest, path: Path) -> None:
    if len(manifest.files) > MAX_FILES:
        raise BundleError(
            f"{path} lists {len(manifest.files)} files, more than {MAX_FILES}.", "Do not trust this bundle."
        )
    names = [*manifest.files, *(v.folder for v in manifest.variants)]
    for name in names:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name:
            raise BundleError(f"{path} names the file '{name}' outside of the bundle.", "Do not trust this bundle.")
    for name, entry in manifest.files.items():
        limit = MAX_JSON_BYTES if name.endswith((".json", ".html", ".py")) else MAX_FILE_BYTES
        if not 0 <= entry.size <= limit:
            raise BundleError(f"{path} gives '{name}' a size of {entry.size} bytes.", "Do not trust this bundle.")
    for ranked in ((manifest.chosen,), *(rank.variants for rank in manifest.ranks)):
        for name in ranked:
            if manifest.variant(name) is None:
                raise BundleError(f"{path} ranks the variant '{name}' but does not hold it.", "Make the bundle anew.")
