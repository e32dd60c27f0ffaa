"""Sizes measured in real processes: what they hold, and every way in which one may fail."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from onecard.memory import resident
from onecard.memory.measure import Job, Meter, Outcome
from onecard.memory.resident import PeakWatch, resident_bytes, return_free_memory
from onecard.models.load import load_model
from onecard.models.source import save_source

MIB = 1 << 20
MODEL = '''
import os
import signal
import time

import torch
from torch import nn


class Moody(nn.Module):
    """What it does depends on the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1 << 20))

    def forward(self, x):
        rows = x.shape[0]
        if rows == 3:
            raise RuntimeError("three is too many")
        if rows == 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        if rows == 5:
            raise MemoryError("no room for five")
        if rows == 6:
            time.sleep(600)
        if rows == 7:
            os._exit(3)
        return (x + self.weight).sum(1)


def moody():
    return Moody()
'''


def measure(tmp_path: Path, batch: int, limit_s: float = 200.0, **changes: object) -> tuple[Outcome, list[str]]:
    (tmp_path / "moody.py").write_text(MODEL)
    inputs = [f"x: float32[B,{1 << 20}], B=1..8"]
    model = load_model(f"{tmp_path / 'moody.py'}:moody", inputs=inputs)
    save_source(model, tmp_path / "source")
    stages: list[str] = []
    meter = Meter(tmp_path / "work", limit_s, stages.append)
    return meter.measure(Job(str(tmp_path / "source"), model.spec, {"B": batch}, "cpu", **changes)), stages


def test_a_size_that_runs_is_its_weights_inputs_and_growth(tmp_path):
    outcome, stages = measure(tmp_path, 8)
    assert outcome.verdict.ok
    found = outcome.measured
    assert found is not None
    assert found.loaded_bytes == 4 * MIB
    assert 4 + 32 + 32 <= found.peak_bytes / MIB < 4 + 32 + 32 + 40
    assert (found.outside_bytes, found.reserved_bytes) == (0, found.allocated_bytes)
    assert set(stages) <= {"", "loading", "running"}
    assert found.seconds > 0


def test_half_precision_is_measured_so(tmp_path):
    outcome, _ = measure(tmp_path, 8, precision="bf16")
    assert outcome.measured is not None
    assert outcome.measured.loaded_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("batch", "reason", "detail", "cure"),
    [
        (3, "crashed", "three is too many", "by itself"),
        (4, "crashed", "killed by SIGSEGV while running", "newest version"),
        (5, "out_of_memory", "no room for five", ""),
        (7, "crashed", "exit code 3", "by itself"),
    ],
)
def test_a_failure_is_an_outcome_with_its_reason(tmp_path, batch, reason, detail, cure):
    outcome, _ = measure(tmp_path, batch)
    assert outcome.measured is None
    assert outcome.verdict.reason == reason
    assert detail in outcome.verdict.detail
    assert cure in outcome.verdict.cure
    assert "candidate" not in outcome.verdict.cure


def test_a_hang_ends_at_the_limit(tmp_path):
    outcome, _ = measure(tmp_path, 6, limit_s=8.0)
    assert outcome.verdict.reason == "timeout"
    assert "--time-limit" in outcome.verdict.cure


@pytest.mark.parametrize("how", ["clear_refs", "sampled"])
def test_the_peak_is_that_of_the_time_between(how, monkeypatch, tmp_path):
    if how == "sampled":  # as where the process may not reset its peak
        monkeypatch.setattr(resident, "_CLEAR", tmp_path / "absent" / "clear_refs")
    elif not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux keeps a peak that can be reset")
    earlier = b"x" * (300 * MIB)
    del earlier
    return_free_memory()
    before = resident_bytes()
    with PeakWatch() as watch:
        for _ in range(3):
            block = torch.ones(100 * MIB, dtype=torch.uint8)
            end = time.monotonic() + 30  # until who looks every millisecond has had its turn
            while how == "sampled" and watch.peak_bytes < before + 60 * MIB and time.monotonic() < end:
                time.sleep(0.01)
            del block
    if watch.how != how:
        pytest.skip("this system does not let a process reset its peak")
    assert 60 <= (watch.peak_bytes - before) / MIB < 150
