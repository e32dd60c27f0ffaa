"""The tuning of a bundle is read when it is there and whole, and never anything else in its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from onecard.bundle.amend import amend
from onecard.bundle.manifest import read_manifest
from onecard.bundle.tuning_file import TUNING, read_tuning
from onecard.errors import BundleError
from onecard.tuning import MAX_TUNING_BYTES, tuning_to_bytes
from tests.unit.test_tuning_data import FOUND

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "small.onecard"))


def write(bundle: Path, data: bytes) -> None:
    amend(bundle, {TUNING: data}, read_manifest(bundle))


def test_a_tuned_bundle(bundle):
    write(bundle, tuning_to_bytes(FOUND))
    assert read_tuning(bundle) == FOUND
    assert read_tuning(bundle, read_manifest(bundle)) == FOUND


def test_a_file_that_is_not_listed_is_none(bundle):
    (bundle / TUNING).write_bytes(tuning_to_bytes(FOUND))
    assert read_tuning(bundle) is None


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b" "), "has been changed"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "is a symbolic link"),
    ],
    ids=["changed", "emptied", "removed", "linked"],
)
def test_damage_is_refused(bundle, harm, message):
    write(bundle, tuning_to_bytes(FOUND))
    harm(bundle / TUNING)
    with pytest.raises(BundleError, match=message + ".*onecard tune"):
        read_tuning(bundle)


def test_a_file_that_is_too_large_is_not_read(bundle):
    write(bundle, b" " * (MAX_TUNING_BYTES + 1))
    with pytest.raises(BundleError, match="more than 4 MiB"):
        read_tuning(bundle)
