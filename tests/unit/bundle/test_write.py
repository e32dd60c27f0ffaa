"""A bundle is written aside and renamed: afterwards there is the old one or the new one, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onecard.bundle.manifest import MANIFEST
from onecard.bundle.write import check_writable, new_bundle
from onecard.errors import StorageError


def fill(folder: Path, text: str) -> None:
    (folder / "variants").mkdir()
    (folder / "variants" / "weights").write_text(text)
    (folder / MANIFEST).write_text("{}")


def content(out: Path) -> str:
    return (out / "variants" / "weights").read_text()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model.onecard"


@pytest.fixture
def old(out: Path) -> Path:
    with new_bundle(out) as folder:
        fill(folder, "old")
    return out


def neighbours(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir()]


def test_a_new_bundle_appears_whole_at_the_end(out):
    with new_bundle(out) as folder:
        fill(folder, "new")
        assert not out.exists()
        assert folder.parent == out.parent
    assert content(out) == "new"
    assert neighbours(out) == [out.name]


def test_folders_above_are_made(tmp_path):
    with new_bundle(tmp_path / "a" / "b" / "m.onecard") as folder:
        fill(folder, "new")
    assert content(tmp_path / "a" / "b" / "m.onecard") == "new"


def test_an_old_bundle_is_replaced_at_the_very_end(old):
    with new_bundle(old) as folder:
        fill(folder, "new")
        assert content(old) == "old"
    assert content(old) == "new"
    assert neighbours(old) == [old.name]


def test_a_link_is_followed(old):
    link = old.parent / "link"
    link.symlink_to(old)
    check_writable(link)
    with new_bundle(link) as folder:
        fill(folder, "new")
    assert link.is_symlink()
    assert content(old) == "new"
    assert sorted(neighbours(old)) == ["link", old.name]


def test_a_link_to_nothing_yet_is_followed(out):
    link = out.parent / "link"
    link.symlink_to(out.parent / "disk" / "bundle")
    with new_bundle(link) as folder:
        fill(folder, "new")
    assert link.is_symlink()
    assert content(out.parent / "disk" / "bundle") == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_nothing_behind(error, out):
    with pytest.raises(error), new_bundle(out) as folder:
        fill(folder, "new")
        raise error
    assert neighbours(out) == []


def test_a_block_that_raises_leaves_the_old_bundle(old):
    with pytest.raises(RuntimeError), new_bundle(old) as folder:
        fill(folder, "new")
        raise RuntimeError
    assert content(old) == "old"
    assert neighbours(old) == [old.name]


def test_an_empty_folder_may_be_there(out):
    out.mkdir()
    with new_bundle(out) as folder:
        fill(folder, "new")
    assert content(out) == "new"


def test_a_foreign_folder_is_refused_and_kept(out):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match=r"exists and is no onecard bundle.*Choose another"), new_bundle(out):
        pytest.fail("the block was entered")
    assert (out / "thesis.txt").read_text() == "years of work"
    assert neighbours(out) == [out.name]


def test_a_file_in_the_way_is_refused(out):
    out.write_text("not a folder")
    with pytest.raises(StorageError, match="is no onecard bundle"):
        check_writable(out)


def test_a_file_above_is_no_folder_to_write_into(out):
    out.write_text("not a folder")
    with pytest.raises(StorageError, match=r"was not written.*choose another"):
        check_writable(out / "model.onecard")


def test_checking_leaves_nothing_behind(out):
    check_writable(out)
    assert neighbours(out) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, the disk that is always full, is not here")
def test_a_full_disk_is_said_and_leaves_the_old_bundle(old):
    message = r"the disk is full: .*model\.onecard was not written\. Free some space"
    with pytest.raises(StorageError, match=message), new_bundle(old) as folder:
        fill(folder, "new")
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")
    assert content(old) == "old"
    assert neighbours(old) == [old.name]


SMALL_FILES_ONLY = """
import pathlib, resource, signal, sys
from onecard.bundle.write import new_bundle
from onecard.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with new_bundle(pathlib.Path(sys.argv[1])) as folder:
        (folder / "weights").write_bytes(b"x" * 2000)
except StorageError as error:
    print(error, "|", error.exit_code)
"""


def test_a_write_that_the_system_cuts_short_leaves_the_old_bundle(old):
    done = subprocess.run(
        [sys.executable, "-c", SMALL_FILES_ONLY, str(old)], capture_output=True, text=True, check=False
    )
    assert "was not written" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert done.stdout.strip().endswith("| 9")
    assert content(old) == "old"
    assert neighbours(old) == [old.name]


KILLED = """
import os, pathlib, signal, sys
from onecard.bundle.write import new_bundle
with new_bundle(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_leaves_the_old_bundle_as_it_was(old):
    subprocess.run([sys.executable, "-c", KILLED, str(old)], check=False)
    assert content(old) == "old"
    with new_bundle(old) as folder:
        fill(folder, "new")
    assert content(old) == "new"
