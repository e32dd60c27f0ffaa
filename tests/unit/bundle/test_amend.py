"""A bundle with a file more: it proves itself, the rest is the same, and after a failure it is the old one."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file

import onecard
from onecard.bundle import amend as amending
from onecard.bundle.amend import amend
from onecard.bundle.files import damaged
from onecard.bundle.manifest import MANIFEST, encode_manifest, read_manifest
from onecard.bundle.open import OnecardWarning
from onecard.errors import BundleError, StorageError

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "small.onecard"))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def alone(folder: Path) -> bool:
    return os.listdir(folder.parent) == [folder.name]


def test_the_amended_bundle_proves_itself_and_answers(bundle):
    before = content(bundle)
    amend(bundle, {"tuning.json": b"{}", "report.html": b"<p>new"}, read_manifest(bundle))
    manifest = read_manifest(bundle)
    assert damaged(bundle, manifest.files.items()) == {}
    after = content(bundle)
    assert after.keys() == before.keys() | {"tuning.json"} == {*manifest.files, MANIFEST}
    assert (after["tuning.json"], after["report.html"]) == (b"{}", b"<p>new")
    changed = {"tuning.json", "report.html", MANIFEST}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert replace(manifest, sha256="", files={}) == replace(read_manifest(GOLDEN), sha256="", files={})
    assert alone(bundle)
    golden = load_file(bundle / "golden.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OnecardWarning)
        warnings.filterwarnings("ignore", "(?s).*was passed over", OnecardWarning)  # an engine may be missing here
        opened = onecard.load(bundle, device="cpu")
    np.testing.assert_allclose(opened(image=golden["in.image"])["output"], golden["out.output"], rtol=1e-3, atol=1e-4)
    opened.close()


def test_it_can_be_amended_again(bundle):
    for text in (b"one", b"two, which is longer"):
        amend(bundle, {"tuning.json": text}, read_manifest(bundle))
    assert (bundle / "tuning.json").read_bytes() == b"two, which is longer"
    assert damaged(bundle, read_manifest(bundle).files.items()) == {}


def test_a_bundle_that_is_open_goes_on(bundle):
    """Its files are linked, not written to: who reads the old ones reads them to the end."""
    with (bundle / "report.html").open("rb") as old:
        amend(bundle, {"report.html": b"<p>new"}, read_manifest(bundle))
        assert old.read() == (GOLDEN / "report.html").read_bytes()


def test_nothing_is_copied_where_links_can_be(bundle):
    weights = bundle / "golden.safetensors"
    inode = weights.stat().st_ino
    amend(bundle, {"tuning.json": b"{}"}, read_manifest(bundle))
    assert weights.stat().st_ino == inode
    assert weights.stat().st_nlink == 1, "the old folder is gone"


def test_files_are_copied_where_links_cannot_be(bundle, monkeypatch):
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    amend(bundle, {"tuning.json": b"{}"}, read_manifest(bundle))
    assert damaged(bundle, read_manifest(bundle).files.items()) == {}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_bundle(bundle, monkeypatch, error):
    before = content(bundle)

    def fail(manifest: object) -> bytes:
        raise error

    monkeypatch.setattr(amending, "encode_manifest", fail)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        amend(bundle, {"tuning.json": b"{}", "report.html": b""}, read_manifest(bundle))
    assert content(bundle) == before
    assert alone(bundle)


def test_damage_is_not_signed_anew(bundle):
    weights = bundle / "golden.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    amend(bundle, {"tuning.json": b"{}"}, read_manifest(bundle))
    assert set(damaged(bundle, read_manifest(bundle).files.items())) == {"golden.safetensors"}


def test_a_bundle_that_was_replaced_meanwhile_is_left_alone(bundle):
    expected = read_manifest(bundle)
    (bundle / MANIFEST).write_bytes(encode_manifest(replace(expected, name="another")))
    before = content(bundle)
    with pytest.raises(BundleError, match="was replaced meanwhile"):
        amend(bundle, {"tuning.json": b"{}"}, expected)
    assert content(bundle) == before


def test_what_else_lies_there_stays_there_unlisted(bundle):
    (bundle / "notes.txt").write_text("mine")
    (bundle / "link").symlink_to("notes.txt")
    amend(bundle, {"tuning.json": b"{}"}, read_manifest(bundle))
    assert (bundle / "notes.txt").read_text() == "mine"
    assert (bundle / "link").is_symlink()
    assert not {"notes.txt", "link"} & set(read_manifest(bundle).files)


def test_a_private_bundle_stays_private(bundle):
    bundle.chmod(0o700)
    (bundle / "source").chmod(0o750)
    amend(bundle, {"tuning.json": b"{}"}, read_manifest(bundle))
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o700
    assert stat.S_IMODE((bundle / "source").stat().st_mode) == 0o750


def test_through_a_link_the_bundle_itself_is_amended(bundle, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(bundle.name)
    amend(link, {"tuning.json": b"{}"}, read_manifest(link))
    assert link.is_symlink()
    assert (bundle / "tuning.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", [MANIFEST, "", "..", "../x", "source/x", "a\\b"])
def test_only_files_at_the_top_can_be_added(bundle, name):
    with pytest.raises(ValueError, match="amended with"):
        amend(bundle, {name: b""}, read_manifest(bundle))


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no onecard bundle"):
        amend(tmp_path, {"tuning.json": b"{}"}, read_manifest(GOLDEN))
