"""A process that lets engines go in any order still takes signals: each case is a process, since it may die of one."""

import subprocess
import sys

import pytest

pytest.importorskip("openvino", reason="openvino is not installed")

PROGRAM = """
import contextlib, os, signal, sys
import numpy as np
import openvino as ov
from openvino import opset8 as ops
from onecard.backends.signal_stack import kept_signal_stack

x = ops.parameter([1, 4], np.float32)
model = ov.Model([ops.relu(x)], [x], "tiny")
guard = kept_signal_stack if "guarded" in sys.argv else contextlib.nullcontext

def engine():
    with guard():
        return ov.Core().compile_model(model, "CPU")

first = engine()
second = engine()
first = None
second = None
taken = []
signal.signal(signal.SIGUSR1, lambda number, frame: taken.append(number))
os.kill(os.getpid(), signal.SIGUSR1)
assert taken == [signal.SIGUSR1]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="alternate signal stacks are looked after on Linux only")
def test_a_signal_is_taken_after_engines_went_in_the_order_they_came():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "guarded"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
