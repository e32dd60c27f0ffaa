"""One search of a job at a time, whatever the other one came to."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from onecard.api import prepare
from onecard.errors import UsageError
from onecard.search.lock import JobLock
from onecard.search.search import Search

pytest.importorskip("fcntl", reason="locks are POSIX's")

HOLDER = """
import sys, pathlib
from onecard.search.lock import JobLock
lock = JobLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "searches" / "key.lock"


def hold(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_search_is_told_who_the_first_is_and_a_killed_one_holds_nothing(path):
    with hold(path) as holder:
        with pytest.raises(UsageError, match=rf"running \(process {holder.pid}\): wait for it, or use another ONE"):
            JobLock(path)
        holder.kill()
    JobLock(path).release()


def test_a_lock_ends_when_it_is_released_or_collected(path):
    first = JobLock(path)
    with pytest.raises(UsageError, match=f"process {os.getpid()}"):
        JobLock(path)
    first.release()
    second = JobLock(path)
    del second
    gc.collect()
    JobLock(path).release()


def test_a_finished_search_keeps_others_out_but_not_its_own_process(path):
    first = JobLock(path)
    first.finish()
    code = HOLDER.replace("lock =", "JobLock(pathlib.Path(sys.argv[1]))\nlock =")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "another search of this job is running" in done.stderr
    second = JobLock(path)
    first.release()
    with pytest.raises(UsageError):
        JobLock(path)
    second.release()


def test_workers_do_not_inherit_it(path):
    lock = JobLock(path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        lock.release()
        JobLock(path).release()
        child.communicate(b"\n")


def test_a_search_of_a_job_that_is_searched_leaves_its_folder_alone(cache: Path):
    def search(fresh: bool = False) -> Search:
        options = {"recipes": ("eager",), "fresh": fresh}
        return Search(*prepare(nn.ReLU(), device="cpu", inputs=["x: float32[B,4], B=1..8"], options=options))

    first = search()
    (first.folder.root / "mark").touch()
    for fresh in (False, True):
        with pytest.raises(UsageError, match="another search of this job is running"):
            search(fresh)
    assert (first.folder.root / "mark").exists()
    del first
    gc.collect()
    search()
