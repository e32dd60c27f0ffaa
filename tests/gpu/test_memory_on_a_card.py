"""The plan on a real card: the limit holds, and what was predicted is what the allocator held."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from onecard.measure.memory import MemoryWatch
from onecard.memory.plan import PlanOptions, make_plan
from tests.unit.memory.planned_models import IMAGE, ResNet

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

GIB = 1 << 30
LIMITED = """
import torch
from onecard.device_memory import limit_device_memory
limit_device_memory("cuda:0", 1 << 30)
half = torch.empty(1 << 29, dtype=torch.uint8, device="cuda:0")
try:
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
except torch.OutOfMemoryError:
    raise SystemExit(42)
"""


def test_the_limit_is_that_of_a_smaller_card():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.returncode == 42, done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_allocator_holds_what_was_predicted(cache, precision):
    options = PlanOptions(device="cuda:0", device_memory=4 * GIB, batches=(1, 16), precision=precision)
    plan = make_plan(ResNet(), inputs=[IMAGE], options=options)
    for row in plan.buckets:
        assert row.verdict.ok, row.verdict
        assert row.fits
        assert row.measured is not None
        live = row.part("weights") + row.part("inputs") + row.part("outputs") + row.part("activations")
        assert row.measured.allocated_bytes >= 0.9 * live
        assert row.measured.allocated_bytes <= 1.25 * (row.call_bytes or 0)
        assert row.measured.reserved_bytes >= row.measured.allocated_bytes
    assert plan.largest is not None
    assert plan.largest.verified


@pytest.mark.timeout(300)
def test_too_little_is_out_of_memory_at_the_limit(cache):
    options = PlanOptions(device="cuda:0", device_memory=24 << 20, batches=(4096,), depth=1)
    plan = make_plan(ResNet(), inputs=["image: float32[B,3,64,64], B=1..4096"], options=options)
    row = next(row for row in plan.buckets if row.bucket == {"B": 4096})
    assert row.verdict.reason == "out_of_memory"
    assert "at the limit of 0.02 GiB" in row.verdict.detail
    assert row.fits is False
    assert plan.advice


def test_what_a_graph_keeps_for_its_replays_is_in_use():
    torch.cuda.empty_cache()
    watch = MemoryWatch("cuda:0")
    before = torch.cuda.memory_allocated()
    x = torch.ones(1 << 20, device="cuda:0")  # 4 MiB
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = x.repeat(64).mul(2).view(64, -1).sum(0)  # two times 256 MiB on the way
    watch.loaded()
    graph.replay()
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # the allocator's own word
    found = watch.peak_allocated_bytes() - before
    assert 500 << 20 < found < 700 << 20
    assert answer[0].item() == 128
    graph.reset()
