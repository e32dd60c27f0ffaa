"""Where workers keep Python's bytecode: beside the packages if it is there, else in a private folder of the cache."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.search.bytecode import folder_name, keeping_bytecode, torch_source

PLAIN = {"PATH": "/usr/bin", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(autouse=True)
def _pycs_lie_beside_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", None)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed package without bytecode, in a folder that may only be read."""
    site = tmp_path / "site"
    source = site / "torch" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("from torch import nn\n")
    (source.parent / "nn.py").write_text("LAYERS = 1\n")
    source.parent.chmod(0o555)
    yield source
    source.parent.chmod(0o755)


def test_without_bytecode_it_is_kept_in_a_private_folder(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "pycache"
    assert keeping_bytecode(PLAIN, package, folder) == {"PATH": "/usr/bin", "PYTHONPYCACHEPREFIX": str(folder)}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "PYTHONPYCACHEPREFIX" in keeping_bytecode(PLAIN, package, folder), "the folder is found again"


def test_a_relative_folder_is_named_from_the_root(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = keeping_bytecode(PLAIN, package, Path("cache/pycache"))
    assert found["PYTHONPYCACHEPREFIX"] == str(tmp_path / "cache" / "pycache")


def test_bytecode_beside_the_package_is_used(package: Path, tmp_path: Path) -> None:
    package.parent.chmod(0o755)
    py_compile.compile(str(package), cfile=importlib.util.cache_from_source(str(package)))
    assert keeping_bytecode(PLAIN, package, tmp_path / "pycache") == PLAIN
    assert not (tmp_path / "pycache").exists()


def test_the_users_own_prefix_stays(package: Path, tmp_path: Path) -> None:
    own = {**PLAIN, "PYTHONPYCACHEPREFIX": "/elsewhere"}
    assert keeping_bytecode(own, package, tmp_path / "pycache") == own
    assert not (tmp_path / "pycache").exists()


def test_without_torch_nothing_is_kept(tmp_path: Path) -> None:
    assert keeping_bytecode(PLAIN, None, tmp_path / "pycache") == PLAIN


def test_a_folder_that_others_may_enter_is_not_trusted(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pycache"
    folder.mkdir()
    folder.chmod(0o770)
    assert keeping_bytecode(PLAIN, package, folder) == PLAIN


def test_a_link_is_not_trusted(package: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "pycache").symlink_to(tmp_path / "theirs")
    assert keeping_bytecode(PLAIN, package, tmp_path / "pycache") == PLAIN


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a folder to somebody else")
def test_somebody_elses_folder_is_not_trusted(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pycache"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    assert keeping_bytecode(PLAIN, package, folder) == PLAIN


def test_a_folder_that_cannot_be_made_is_no_error(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert keeping_bytecode(PLAIN, package, tmp_path / "cache" / "pycache") == PLAIN


def test_torch_is_found_without_importing_it() -> None:
    code = "import sys; from onecard.search.bytecode import torch_source; print(torch_source(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(torch_source()), "False"]


SEARCH = """
import subprocess, sys
from pathlib import Path
from onecard.search.processes import Task

environment = Task("eager", ("build",), Path("log.txt"), 1.0).environment
grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch.nn'], check=True)"
subprocess.run([sys.executable, "-c", grandchild], env=environment, check=True)
"""


def test_workers_and_their_children_write_it_where_the_search_says(package: Path, cache: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPYCACHEPREFIX"}
    environment |= {"PYTHONPATH": str(package.parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", SEARCH], env=environment, check=True, timeout=200)
    kept = cache / folder_name() / package.parent.relative_to("/")
    assert {path.name.partition(".")[0] for path in kept.iterdir()} == {"__init__", "nn"}
    assert not (package.parent / "__pycache__").exists()
