"""Peak memory of a process is its own: neither another's nor its parent's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onecard.measure.memory import MemoryWatch

MIB = 1 << 20
CHILD = """
import sys
from onecard.measure.memory import MemoryWatch
watch = MemoryWatch("cpu")
block = b"x" * (int(sys.argv[1]) << 20)
del block
print(watch.peak_process_bytes())
"""


def peak_of_child(mib: int) -> int:
    done = subprocess.run([sys.executable, "-c", CHILD, str(mib)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_cpu_has_no_device_memory():
    assert MemoryWatch("cpu").peak_device_bytes() == 0


def test_the_peak_stays_after_the_memory_is_free_again():
    assert peak_of_child(400) - peak_of_child(0) > 350 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child's peak from its parent's")
def test_the_peak_is_not_that_of_the_process_that_started_it():
    block = b"x" * (900 * MIB)
    assert peak_of_child(0) < 800 * MIB
    del block
