"""``onecard plan`` as its user meets it: the table, JSON, mistakes, a bundle, and Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from onecard import cli
from onecard.memory.figures import MemoryPlan
from tests.conftest import INPUT

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"


def onecard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["onecard", "plan", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.mark.timeout(600)
def test_the_table_and_the_largest_batch(model_file, cache, monkeypatch, capsys):
    words = (f"{model_file}:small", "--input", INPUT, "--device", "cpu", "--device-memory", "1GiB")
    code, out, err = onecard(monkeypatch, capsys, *words)
    assert code == 0, err
    for text in ("1.00 GiB to use", "B1", "B4", "activations", "measured", "yes", "peak at body."):
        assert text in out
    assert "The largest batch that fits in 1.00 GiB: B=4" in out
    assert "measuring B4 ..." in err
    assert list((cache / "plans").iterdir()) == []


def test_json_is_the_plan_and_nothing_else(model_file, cache, monkeypatch, capsys):
    words = (f"{model_file}:small", "--input", INPUT, "--device", "cpu", "--no-measure", "--json", "--batch", "3")
    code, out, _ = onecard(monkeypatch, capsys, *words)
    plan = msgspec.json.decode(out, type=MemoryPlan)
    assert code == 0
    assert [row.bucket for row in plan.buckets] == [{"B": 3}, {"B": 4}]
    assert all(row.measured is None and row.verdict.reason == "skipped" for row in plan.buckets)


def test_too_little_memory_is_told_with_advice(model_file, cache, monkeypatch, capsys):
    words = (f"{model_file}:small", "--input", INPUT, "--device", "cpu", "--no-measure", "--device-memory", "2MiB")
    code, out, _ = onecard(monkeypatch, capsys, *words)
    assert code == 0
    assert "Not even the smallest batch fits in 2.00 MiB." in out
    assert "no" in out


MISTAKES = {
    "size without unit": (["{zoo}:small", "--input", INPUT, "--device-memory", "8"], 2, "8GiB"),
    "misspelt size": (["{zoo}:small", "--input", INPUT, "--device-memory", "8GBs"], 2, "2GiB"),
    "nothing": (["{zoo}:small", "--input", INPUT, "--device-memory", "0"], 2, "2GiB"),
    "more than there is": (
        ["{zoo}:small", "--input", INPUT, "--device", "cpu", "--device-memory", "900TiB"],
        2,
        "--no-measure",
    ),
    "no bundle": (["{tmp}"], 6, "no onecard bundle"),
    "absent bundle": (["{tmp}/m.onecard"], 6, "no onecard bundle"),
    "inputs of a bundle": (["{golden}", "--input", INPUT], 2, "Leave out --input"),
    "precision of a bundle": (["{golden}", "--precision", "fp16"], 2, "Leave out --precision"),
    "unknown precision": (["{zoo}:small", "--input", INPUT, "--precision", "fp4"], 2, "fp32, fp16, bf16"),
    "no slots": (["{zoo}:small", "--input", INPUT, "--depth", "0"], 2, "at least 1"),
    "batch out of range": (["{zoo}:small", "--input", INPUT, "--batch", "99"], 2, "B=1..4"),
    "bad duration": (["{zoo}:small", "--input", INPUT, "--time-limit", "soon"], 2, "10m"),
    "missing file": (["nowhere.py:small"], 3, "nowhere.py"),
    "no input given": (["{zoo}:small"], 2, "--input"),
    "unknown option": (["{zoo}:small", "--frobnicate"], 2, "--frobnicate"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, model_file, cache, tmp_path, monkeypatch, capsys):
    words, code, hint = MISTAKES[mistake]
    places = {"{zoo}": str(model_file), "{tmp}": str(tmp_path), "{golden}": str(GOLDEN)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    got, out, err = onecard(monkeypatch, capsys, *words)
    assert got == code, err
    assert hint in err
    assert "Traceback" not in out + err


@pytest.mark.timeout(600)
def test_a_bundle_is_planned_by_the_variant_that_serves_each_size(cache, tmp_path, monkeypatch, capsys):
    bundle = tmp_path / "golden.onecard"
    shutil.copytree(GOLDEN, bundle)
    code, out, err = onecard(monkeypatch, capsys, str(bundle), "--device", "cpu", "--json")
    assert code == 0, err
    plan = msgspec.json.decode(out, type=MemoryPlan)
    assert plan.source == "bundle"
    for row in plan.buckets:
        assert row.variant != "as given"
        assert row.verdict.ok, row.verdict
        assert row.measured is not None
        assert row.parts
    code, out, _ = onecard(monkeypatch, capsys, str(bundle), "--device", "cpu", "--device-memory", "1MiB")
    assert "served by" in out
    assert "Not even the smallest batch fits" in out
    victim = next(path for path in sorted((bundle / "source").iterdir()) if path.is_file())
    victim.write_bytes(victim.read_bytes() + b" ")
    code, _, err = onecard(monkeypatch, capsys, str(bundle), "--device", "cpu", "--no-measure")
    assert code == 6
    assert victim.name in err


SLEEPER = """
import time
import torch
from torch import nn

class Sleeper(nn.Module):
    def forward(self, x):
        if x.shape[0] == 8 and type(x) is torch.Tensor:  # not while it is predicted
            time.sleep(600)
        return x + 1

def sleeper():
    return Sleeper()
"""


@pytest.mark.timeout(600)
def test_ctrl_c_ends_the_worker_and_leaves_nothing(cache, tmp_path):
    (tmp_path / "zoo.py").write_text(SLEEPER)
    register = "from onecard import cli, cli_memory\n"
    register += "if not any(c.name == 'plan' for c in cli.app.registered_commands): cli_memory.register(cli.app)\n"
    words = ["plan", f"{tmp_path / 'zoo.py'}:sleeper", "--input", "x: float32[B,4], B=1..8"]
    command = [sys.executable, "-c", register + "cli.main()", *words, "--batch", "8", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ) as plan:
        deadline = time.monotonic() + 250
        while not [stage for stage in cache.glob("plans/*/1-B8/stage") if stage.read_text() == "running"]:
            assert time.monotonic() < deadline and plan.poll() is None
            time.sleep(0.1)
        workers = psutil.Process(plan.pid).children(recursive=True)
        assert workers
        plan.send_signal(signal.SIGINT)
        printed, _ = plan.communicate(timeout=120)
    assert plan.returncode == 130, printed
    assert "Traceback" not in printed
    assert list((cache / "plans").iterdir()) == []
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
