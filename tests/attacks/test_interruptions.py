"""A search that is killed goes on where it was; Ctrl-C keeps what is done; nothing half-written stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import INPUT

RECIPES = ("onnxruntime.cpu", "torchscript.trace", "eager+fold_bn")


def _command(model_file: Path, out: Path) -> list[str]:
    recipes = [part for r in RECIPES for part in ("--recipe", r)]
    # As a terminal would start it: where this test itself runs in the background, Ctrl-C may be ignored.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    onecard = [sys.executable, "-c", f"{listen}; from onecard.cli import main; main()"]
    return [*onecard, "optimize", f"{model_file}:small", "--input", INPUT, "--device", "cpu", *recipes, "-o", str(out)]


def _start(model_file: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(model_file, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _results(cache: Path) -> dict[str, float]:
    return {p.parent.name: p.stat().st_mtime for p in cache.glob("searches/*/candidates/*/result.json")}


def _wait_for_results(cache: Path, count: int, process: subprocess.Popen[bytes], limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while len(_results(cache)) < count:
        assert process.poll() is None, "the search ended before it could be interrupted"
        assert time.monotonic() < end, "the search made no progress"
        time.sleep(0.1)


def _workers() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    orphans = [p for p in psutil.process_iter(["cmdline"]) if "onecard.search.worker" in (p.info["cmdline"] or [])]
    return [*mine, *orphans]


def _leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.timeout(400)
def test_after_kill_9_the_same_command_goes_on(cache: Path, model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onecard"
    first = subprocess.Popen(_command(model_file, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for_results(cache, 2, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = _results(cache)
    assert not out.exists()
    time.sleep(1.0)
    assert not [p for p in _workers() if str(cache) in " ".join(p.cmdline())], "a worker outlived the search"

    subprocess.run(_command(model_file, out), check=True, capture_output=True, timeout=300)
    after = _results(cache)
    assert set(after) == {"eager", *RECIPES}
    assert {name: after[name] for name in done} == done, "a finished candidate was run again"
    evidence = json.loads((out / "evidence.json").read_text())
    assert {c["verdict"]["reason"] for c in evidence["candidates"]} <= {"ok", "slower"}
    assert _leftovers(tmp_path) == []


@pytest.mark.timeout(400)
def test_ctrl_c_once_writes_a_bundle_of_what_is_done(cache: Path, model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onecard"
    process = _start(model_file, out)
    _wait_for_results(cache, 2, process)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 0, text
    evidence = json.loads((out / "evidence.json").read_text())
    reasons = [c["verdict"]["reason"] for c in evidence["candidates"]]
    assert "skipped" in reasons and "ok" in reasons
    assert "interrupted" in text


@pytest.mark.timeout(300)
def test_ctrl_c_twice_ends_with_one_message_and_writes_nothing(cache: Path, model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onecard"
    process = _start(model_file, out)
    _wait_for_results(cache, 2, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, text
    assert text.count("error:") == 1 and "Traceback" not in text
    assert not out.exists()
    assert _leftovers(tmp_path) == []


@pytest.mark.timeout(120)
def test_ctrl_c_before_anything_is_ready(cache: Path, model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onecard"
    process = _start(model_file, out)
    end = time.monotonic() + 60
    while not list(cache.glob("searches/*/job.json")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, text
    assert text.count("error:") == 1 and "Traceback" not in text
    assert not out.exists() and os.listdir(tmp_path)
