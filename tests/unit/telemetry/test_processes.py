"""What processes use, read from the system."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from onecard.telemetry.processes import read_process


def test_this_process():
    found = read_process("front")
    assert found is not None
    assert found.role == "front"
    assert found.resident_bytes > 10 << 20
    assert found.cpu_s > 0
    assert found.threads >= 1
    assert found.open_files >= 3
    assert time.time() - 86_400 * 30 < found.started_s < time.time()
    busy_until = time.process_time() + 0.05
    while time.process_time() < busy_until:
        pass
    later = read_process("front", os.getpid())
    assert later is not None
    assert later.cpu_s > found.cpu_s


@pytest.mark.timeout(200)
def test_a_process_that_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(60)
    assert read_process("engine", process.pid) is None
