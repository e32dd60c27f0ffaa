"""Our processes, with real ones: children of children, one that ends, and what they use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from onecard.telemetry.cpu_processes import CpuUsage, ProcessTree

pytestmark = pytest.mark.timeout(200)

PARENT = """
import subprocess, sys
code = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
sys.stdin.read()
child.stdin.close()
child.wait()
"""
SPIN = """
import sys, threading
threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(int, 1)], daemon=True).start()
sys.stdin.read()
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process and the number of its child; they end when the test does."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        yield parent, int(parent.stdout.readline())
        if parent.poll() is None:
            parent.stdin.close()
            parent.wait(60)


def test_children_of_children(family):
    parent, child = family
    assert ProcessTree(parent.pid).pids() == {parent.pid, child}
    assert ProcessTree().pids() >= {os.getpid(), parent.pid, child}


def test_a_new_process_is_seen_after_a_while():
    clock = Clock()
    tree = ProcessTree(refresh_s=10.0, clock=clock)
    before = tree.pids()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as new:
        clock.now += 9.0
        assert tree.pids() == before
        clock.now += 1.0
        assert tree.pids() == before | {new.pid}
        new.communicate(b"\n")


def test_one_that_ended_is_missed_at_once():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        tree = ProcessTree(clock=Clock())
        assert child.pid in tree.pids()
        child.communicate(b"\n")
    assert child.pid not in tree.pids()


def test_a_root_that_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        tree = ProcessTree(child.pid)
        child.communicate(b"\n")
    assert tree.pids() == frozenset()
    assert tree.cpu_seconds() == {}
    with pytest.raises(psutil.NoSuchProcess):
        ProcessTree(child.pid)


def test_a_busy_child_counts():
    with subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE) as child:
        usage = CpuUsage(ProcessTree(child.pid))

        def now() -> tuple[float, float]:
            times = psutil.Process(child.pid).cpu_times()
            return time.monotonic(), times.user + times.system

        before = now()
        assert usage.ours() == {}
        began = now()
        time.sleep(0.6)
        ended = now()
        share = usage.ours()["process_utilisation"]
        after = now()
        child.communicate(b"")
    # Between any two lines the machine may stall: what it says is of no less and no more than what lies around it.
    cores = share * psutil.cpu_count()
    assert ended[1] > began[1]
    assert (ended[1] - began[1]) / (after[0] - before[0]) - 0.01 <= cores
    assert cores <= (after[1] - before[1]) / (ended[0] - began[0]) + 0.01


def test_an_idle_child_does_not(family):
    usage = CpuUsage(ProcessTree(family[0].pid))
    usage.ours()
    time.sleep(0.2)
    assert usage.ours()["process_utilisation"] < 0.1


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ({"user": 10.0, "idle": 90.0}, {"user": 13.0, "idle": 91.0}, 0.75),
        ({"user": 10.0, "idle": 90.0, "iowait": 5.0}, {"user": 11.0, "idle": 91.0, "iowait": 7.0}, 0.25),
        # time of a guest is within the user's time; the kernel may count the waiting back
        ({"user": 1.0, "guest": 1.0, "idle": 1.0}, {"user": 2.0, "guest": 2.0, "idle": 2.0}, 0.5),
        ({"user": 1.0, "idle": 5.0, "iowait": 2.0}, {"user": 2.0, "idle": 5.0, "iowait": 1.5}, 1.0),
        ({"user": 1.0, "idle": 5.0}, {"user": 1.0, "idle": 5.0}, None),
    ],
)
def test_how_busy_the_machine_is(monkeypatch, before, after, share):
    class Times(dict):
        _asdict = dict.copy

    readings = iter([Times(before), Times(after)])
    monkeypatch.setattr("onecard.telemetry.cpu_processes.psutil.cpu_times", lambda: next(readings))
    usage = CpuUsage(ProcessTree())
    assert usage.machine() == {}
    assert usage.machine().get("utilisation") == share
