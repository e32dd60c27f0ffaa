"""What a folder of bundles tells: copies under way, replacements, removals, and what is passed over."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest

from onecard.bundle.amend import amend
from onecard.bundle.files import describe
from onecard.bundle.manifest import MAX_MANIFEST_BYTES, encode_manifest, read_manifest
from onecard.bundle.write import new_bundle
from onecard.errors import UsageError
from onecard.server.watch import Change, FolderWatch
from tests.unit.bundle.test_manifest import manifest

WEIGHTS = "variants/eager/weights.bin"


class Watched:
    """A folder, a watch, and a clock that goes on when told to."""

    def __init__(self, folder: Path, settle_s: float = 2.0) -> None:
        self.folder = folder
        self.now = 1000.0
        self.watch = FolderWatch(folder, settle_s, lambda: self.now)

    def after(self, seconds: float) -> list[tuple[str, str]]:
        return [(change.kind, change.name) for change in self.changes(seconds)]

    def changes(self, seconds: float) -> list[Change]:
        self.now += seconds
        return self.watch.changes()

    def settled(self) -> list[tuple[str, str]]:
        """What is told once all that happened is two seconds old."""
        return [*self.after(0), *self.after(2)]


@pytest.fixture
def watched(tmp_path):
    (tmp_path / "models").mkdir()
    return Watched(tmp_path / "models")


def put(folder: Path, weights: bytes = b"weights") -> Path:
    """A bundle with one file beside its manifest."""
    (folder / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    write_manifest(folder, {WEIGHTS: len(weights)})
    return folder


def write_manifest(folder: Path, files: dict[str, int]) -> None:
    (folder / "onecard.json").write_text(json.dumps({"files": {k: {"size": v} for k, v in files.items()}, "name": "m"}))


def reason(watched: Watched) -> str:
    """Of the one bundle that is broken."""
    watched.after(0)
    (change,) = watched.changes(2)
    assert change.kind == "broken"
    return change.reason


def test_models_come_change_and_go(watched):
    assert watched.settled() == []
    put(watched.folder / "a.onecard")
    put(watched.folder / "b")
    assert watched.after(0) == watched.after(1.9) == []
    assert watched.after(0.1) == [("added", "a"), ("added", "b")]
    assert watched.settled() == []
    put(watched.folder / "b", b"other")
    assert watched.settled() == [("changed", "b")]
    shutil.rmtree(watched.folder / "a.onecard")
    assert watched.after(0) == watched.after(1.9) == []
    assert watched.after(0.1) == [("removed", "a")]
    assert watched.settled() == []


def test_a_change_says_where(watched):
    path = put(watched.folder / "a.onecard")
    watched.after(0)
    assert watched.changes(2) == [Change("added", "a", path)]
    shutil.rmtree(path)
    watched.after(0)
    assert watched.changes(2) == [Change("removed", "a", path)]


def test_at_once_tells_what_is_there(watched):
    put(watched.folder / "a")
    write_manifest(put(watched.folder / "b"), {"missing": 1})
    assert [(change.kind, change.name) for change in watched.watch.changes(at_once=True)] == [
        ("added", "a"),
        ("broken", "b"),
    ]
    assert watched.settled() == []


def test_without_a_time_to_settle_it_tells_at_once(tmp_path):
    watched = Watched(tmp_path, settle_s=0)
    put(tmp_path / "a")
    assert watched.after(0) == [("added", "a")]


def test_a_copy_under_way_is_no_bundle(watched):
    folder = watched.folder / "a"
    write_manifest(put(folder, b""), {"first": 5, WEIGHTS: 30})  # "first" comes last
    for size in range(1, 31):
        (folder / WEIGHTS).write_bytes(b"w" * size)
        assert watched.after(1.5) == []
    (folder / "first").write_bytes(b"12345")
    assert watched.settled() == [("added", "a")]


def test_what_stays_incomplete_is_told_once_and_then_when_it_is_whole(watched):
    folder = put(watched.folder / "a")
    (folder / WEIGHTS).unlink()
    assert reason(watched) == f"{WEIGHTS} is missing, or not copied yet"
    assert watched.settled() == watched.after(100) == []
    (folder / WEIGHTS).write_bytes(b"short")
    assert reason(watched) == f"{WEIGHTS} has 5 bytes, expected 7"
    put(folder)
    assert watched.settled() == [("added", "a")]


def test_one_that_broke_is_told_again_when_it_breaks_again(watched):
    folder = put(watched.folder / "a")
    assert watched.settled() == [("added", "a")]
    for _ in range(2):
        (folder / WEIGHTS).rename(folder / "away")
        assert watched.settled() == [("broken", "a")]
        (folder / "away").rename(folder / WEIGHTS)
        assert watched.settled() == []  # it is what it was
    shutil.rmtree(folder)
    assert watched.settled() == [("removed", "a")]


def test_one_that_never_was_whole_is_removed_as_well(watched):
    (watched.folder / "a.onecard").mkdir()
    assert reason(watched) == "onecard.json is missing, or not copied yet"
    (watched.folder / "a.onecard").rmdir()
    assert watched.settled() == [("removed", "a")]
    assert watched.watch._tracks == {}


def test_one_whose_manifest_is_taken_away_is_broken_and_not_gone(watched):
    folder = put(watched.folder / "a")
    assert watched.settled() == [("added", "a")]
    (folder / "onecard.json").unlink()
    assert reason(watched) == "onecard.json is missing, or not copied yet"


def test_the_same_bundle_copied_anew_is_a_change(watched):
    folder = put(watched.folder / "a")
    watched.settled()
    data = (folder / WEIGHTS).read_bytes()
    (folder / "new").write_bytes(data)
    os.replace(folder / "new", folder / WEIGHTS)  # it may have been damaged before
    assert watched.settled() == [("changed", "a")]


def test_another_manifest_over_the_same_files_is_a_change(watched):
    folder = put(watched.folder / "a")
    watched.settled()
    (folder / "onecard.json").write_text((folder / "onecard.json").read_text() + " ")
    assert watched.settled() == [("changed", "a")]


def test_what_is_written_beside_its_files_is_none(watched):
    folder = put(watched.folder / "a")
    watched.settled()
    (folder / "__pycache__").mkdir()
    (folder / "variants" / "notes.txt").write_text("mine")
    os.utime(folder, ns=(1, 1))
    assert watched.settled() == []


def test_a_gap_while_folders_are_renamed_is_no_removal(watched, tmp_path):
    put(watched.folder / "a")
    new = put(tmp_path / "new", b"new one")
    watched.settled()
    (watched.folder / "a").rename(tmp_path / "old")
    assert watched.after(1) == []
    new.rename(watched.folder / "a")
    assert watched.settled() == [("changed", "a")]


def test_bundles_that_onecard_writes_and_amends(watched):
    out = watched.folder / "real.onecard"
    with new_bundle(out) as aside:
        (aside / "report.html").write_text("hello")
        (aside / "onecard.json").write_bytes(
            encode_manifest(manifest(files={"report.html": describe(aside / "report.html")}))
        )
        assert aside.parent == watched.folder
        assert watched.settled() == []  # whole already, but under its temporary name
    assert watched.settled() == [("added", "real")]
    before = read_manifest(out)
    amend(out, {"tuning.json": b"{}"}, before)
    assert msgspec.structs.replace(read_manifest(out), sha256="") != msgspec.structs.replace(before, sha256="")
    assert watched.settled() == [("changed", "real")]
    assert [path.name for path in watched.folder.iterdir()] == ["real.onecard"]


def test_what_is_no_bundle_is_passed_over(watched, caplog):
    put(watched.folder / ".hidden.tmp")
    (watched.folder / "data").mkdir()
    (watched.folder / "lost+found").mkdir()
    (watched.folder / "README").write_text("hello")
    (watched.folder / "file.onecard").write_text("hello")
    (watched.folder / "dangling").symlink_to("nowhere")
    assert watched.settled() == []
    assert not caplog.records


def test_names_that_are_none_are_warned_of_once(watched, caplog):
    for name in ("a b", "-a.onecard", os.fsdecode(b"\xff"), "new\nline"):
        put(watched.folder / name)
    assert watched.settled() == watched.after(50) == []
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 4 and all("passed over" in text and text.isprintable() for text in warned)
    shutil.rmtree(watched.folder / "a b")
    watched.after(1)
    put(watched.folder / "a b")
    watched.after(1)
    assert len(caplog.records) == 5


def test_of_two_with_one_name_the_one_that_was_first_goes_on(watched, caplog):
    put(watched.folder / "a")
    assert watched.settled() == [("added", "a")]
    put(watched.folder / "a.onecard")
    assert watched.settled() == watched.settled() == []
    (record,) = caplog.records
    assert "'a.onecard' is passed over: 'a' is called 'a' as well" in record.getMessage()
    shutil.rmtree(watched.folder / "a")
    assert watched.settled() == [("changed", "a")]


def test_of_two_with_one_name_the_suffix_goes_first(watched, caplog):
    put(watched.folder / "a")
    put(watched.folder / "a.onecard")
    watched.after(0)
    assert watched.changes(2) == [Change("added", "a", watched.folder / "a.onecard")]
    assert len(caplog.records) == 1


def test_links_that_stay_inside_are_followed(watched):
    put(watched.folder / ".versions" / "1")
    put(watched.folder / ".versions" / "2", b"number two")
    (watched.folder / "a").symlink_to(".versions/1")
    watched.after(0)
    assert watched.changes(2) == [Change("added", "a", watched.folder / ".versions/1")]
    (watched.folder / ".new").symlink_to(".versions/2")
    os.replace(watched.folder / ".new", watched.folder / "a")
    watched.after(0)
    assert watched.changes(2) == [Change("changed", "a", watched.folder / ".versions/2")]


@pytest.mark.parametrize("target", ["../outside", "{absolute}", "inside/../../outside", ".", ".."])
def test_links_that_lead_out_are_refused(watched, tmp_path, target):
    put(tmp_path / "outside")
    (watched.folder / "inside").mkdir()
    link = watched.folder / "a.onecard"
    link.symlink_to(target.replace("{absolute}", str(tmp_path / "outside")))
    assert "out of the folder of models" in reason(watched)
    assert watched.settled() == []


def test_a_link_by_way_of_another_is_refused(watched, tmp_path):
    put(tmp_path / "outside")
    (watched.folder / ".way").symlink_to(tmp_path)
    (watched.folder / "a").symlink_to(".way/outside")
    assert "out of the folder of models" in reason(watched)


def test_links_that_lead_nowhere_or_round(watched):
    link = watched.folder / "a.onecard"
    link.symlink_to("nowhere")
    assert reason(watched) == "it is a symbolic link that leads nowhere"
    link.unlink()
    link.symlink_to("a.onecard")
    assert "cannot be read" in reason(watched)


def test_a_manifest_that_is_a_link_is_refused(watched, tmp_path):
    folder = put(watched.folder / "a")
    (folder / "onecard.json").rename(tmp_path / "onecard.json")
    (folder / "onecard.json").symlink_to(tmp_path / "onecard.json")
    assert reason(watched) == "its onecard.json is not a regular file"


def test_a_file_that_is_a_link_is_refused(watched, tmp_path):
    folder = put(watched.folder / "a")
    (folder / WEIGHTS).rename(tmp_path / "weights")
    (folder / WEIGHTS).symlink_to(tmp_path / "weights")
    assert reason(watched) == f"{WEIGHTS} is not a regular file"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"files": {"a": {}}}', b'{"files": {"a": {"size": "1"}}}', b"\xff"]
)
def test_a_manifest_that_is_none(watched, data):
    (put(watched.folder / "a") / "onecard.json").write_bytes(data)
    assert "does not follow the format" in reason(watched)


@pytest.mark.parametrize("name", ["../b", "/etc/passwd", "", ".", "a/../../b", "a\0b"])
def test_a_manifest_that_names_files_outside(watched, name):
    write_manifest(put(watched.folder / "a"), {name: 1})
    assert "outside of the bundle" in reason(watched)


def test_a_manifest_that_is_too_large(watched):
    (put(watched.folder / "a") / "onecard.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    assert "more than 16 MiB" in reason(watched)


@pytest.fixture
def as_nobody():
    """A folder that everybody can reach, for a user who is not above its permissions."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "models").mkdir()
    user = os.geteuid()
    if user == 0:
        shutil.chown(folder / "models", 65534)
        os.seteuid(65534)
    try:
        yield folder / "models"
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def test_bundles_that_cannot_be_read(as_nobody):
    watched = Watched(as_nobody)
    folder = put(watched.folder / "a")
    assert watched.settled() == [("added", "a")]
    folder.chmod(0)
    assert "cannot be read: Permission denied" in reason(watched)
    folder.chmod(0o755)
    assert watched.settled() == []
    (put(watched.folder / "b") / "onecard.json").chmod(0)
    assert reason(watched) == "onecard.json cannot be read: Permission denied"
    (watched.folder / "c").mkdir(mode=0)
    assert watched.settled() == [("broken", "c")]


def test_a_folder_that_cannot_be_read_for_a_while_removes_nothing(as_nobody, caplog):
    watched = Watched(as_nobody)
    put(watched.folder / "a")
    assert watched.settled() == [("added", "a")]
    for times in (1, 2):
        watched.folder.chmod(0)
        assert watched.settled() == watched.after(100) == []
        assert len(caplog.records) == times and "Permission denied" in caplog.text
        watched.folder.chmod(0o755)
        assert watched.settled() == []
    os.rename(watched.folder / "a", watched.folder / ".a")
    assert watched.settled() == [("removed", "a")]


def test_a_folder_that_is_away_for_a_while_removes_nothing(watched, tmp_path, caplog):
    put(watched.folder / "a")
    watched.settled()
    watched.folder.rename(tmp_path / "away")
    assert watched.settled() == watched.after(100) == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    (tmp_path / "away").rename(watched.folder)
    assert watched.settled() == []


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_folder_to_watch(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be read"):
        FolderWatch(tmp_path / name)


def test_a_manifest_is_read_once(watched, monkeypatch):
    put(watched.folder / "a")
    watched.settled()
    monkeypatch.setattr("onecard.server.watch._read_listing", lambda path: pytest.fail("read again"))
    assert watched.settled() == []
