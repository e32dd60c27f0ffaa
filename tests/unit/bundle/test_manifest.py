"""``onecard.json`` proves itself, and names nothing outside of its bundle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from onecard.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    VariantEntry,
    encode_manifest,
    read_manifest,
)
from onecard.errors import BundleError
from onecard.evidence import Measurement, Rank
from onecard.recipe import ORIGINAL, Recipe
from onecard.verify.cases import Case
from onecard.verify.compare import THRESHOLDS
from tests.unit.report.evidence_sample import B1, environment, sample

INDUCTOR = Recipe("inductor", static=True)


def manifest(**changes: Any) -> Manifest:
    made = Manifest(
        sha256="",
        format_version=FORMAT_VERSION,
        onecard_version="0.1.0",
        name="model",
        spec=sample().spec,
        buckets=(B1,),
        objective="latency",
        chosen=INDUCTOR.id,
        ranks=(Rank(B1, (INDUCTOR.id, ORIGINAL.id), 2.0, 0.01),),
        variants=tuple(VariantEntry(r, THRESHOLDS["fp32"], Measurement(), True) for r in (INDUCTOR, ORIGINAL)),
        environment=environment(),
        golden=Case(B1, 0),
        files={"variants/eager/dynamic/eager.json": FileEntry(17, "0" * 64)},
    )
    return msgspec.structs.replace(made, **changes)


def write(folder: Path, made: Manifest) -> Path:
    path = folder / MANIFEST
    path.write_bytes(encode_manifest(made))
    return path


def signed(data: bytes) -> bytes:
    """Bytes whose digest is right whatever else they say."""
    blank = b'{\n "sha256": "' + b"0" * 64 + b'"' + data
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def test_a_manifest_is_read_back(tmp_path):
    write(tmp_path, manifest())
    found = read_manifest(tmp_path)
    assert msgspec.structs.replace(found, sha256="") == manifest()
    assert found.variant(INDUCTOR.id).folder == "variants/inductor@bucket"
    assert found.variant("tensorrt") is None


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(tmp_path):
    data = write(tmp_path, manifest()).read_bytes()
    found = json.loads(data)["sha256"]
    assert hashlib.sha256(data.replace(found.encode(), b"0" * 64)).hexdigest() == found


def test_a_file_whose_digest_is_zeros_does_not_confuse_it(tmp_path):
    entry = FileEntry(0, "0" * 64)
    write(tmp_path, manifest(name="0" * 64, files={"a": entry, "b": entry}))
    assert read_manifest(tmp_path).files["a"] == entry


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"latency"', b'"latencX"'), (b'"size": 17', b'"size": 18'), (b'"sha256": "', b'"sha255": "'), (b"\n}", b"\n} ")],
)
def test_any_change_is_noticed(old, new, tmp_path):
    path = write(tmp_path, manifest())
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(BundleError, match=r"its digest does not match.*Copy the bundle again"):
        read_manifest(tmp_path)


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is no onecard bundle: it holds no onecard\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'{"format_version": "one"}', b"[" * 100_000])
def test_rubbish(data, tmp_path):
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        read_manifest(tmp_path)


def test_a_newer_format_is_refused_before_its_digest_is_looked_at(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b'{"format_version": 2, "all": "new"}')
    with pytest.raises(BundleError, match=r"format version 2; this onecard reads up to 1\. Upgrade"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match="larger than 16 MiB"):
        read_manifest(tmp_path)


def test_another_structure_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_bytes(signed(b',\n "format_version": 1, "name": "x"}'))
    with pytest.raises(BundleError, match=r"does not follow the format: .*missing required field"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "variants/../../evil", "a\\..\\b", "", "a/.."])
def test_paths_that_leave_the_folder_are_refused(name, tmp_path):
    write(tmp_path, manifest(files={name: FileEntry(1, "0" * 64)}))
    with pytest.raises(BundleError, match=r"outside of the bundle.*Do not trust"):
        read_manifest(tmp_path)


def test_recipes_whose_folder_leaves_the_bundle_are_refused(tmp_path):
    evil = VariantEntry(Recipe("../../evil"), THRESHOLDS["fp32"], Measurement(), False)
    write(tmp_path, manifest(variants=(evil,), ranks=()))
    with pytest.raises(BundleError, match="outside of the bundle"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("size", [-1, 1 << 60])
def test_sizes_that_no_file_has_are_refused(size, tmp_path):
    write(tmp_path, manifest(files={"a": FileEntry(size, "0" * 64)}))
    with pytest.raises(BundleError, match=f"a size of {size} bytes"):
        read_manifest(tmp_path)


def test_too_many_files_are_refused(tmp_path):
    write(tmp_path, manifest(files={f"f{i}": FileEntry(0, "0" * 64) for i in range(10_001)}))
    with pytest.raises(BundleError, match="lists 10001 files, more than 10000"):
        read_manifest(tmp_path)


def test_a_rank_of_a_variant_that_is_not_there_is_refused(tmp_path):
    write(tmp_path, manifest(ranks=(Rank(B1, ("tensorrt",), 1.0, 0.0),)))
    with pytest.raises(BundleError, match="ranks the variant 'tensorrt' but does not hold it"):
        read_manifest(tmp_path)
