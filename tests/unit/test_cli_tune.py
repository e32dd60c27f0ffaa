"""``onecard tune`` through the command line, on a real bundle: what it says, writes, and leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from onecard.api_tuning import tune
from onecard.bundle.files import damaged
from onecard.bundle.manifest import read_manifest
from onecard.bundle.open import OnecardWarning
from onecard.bundle.tuning_file import read_tuning
from onecard.errors import BundleError, InterruptedSearch
from onecard.runtime.engine import Engine
from onecard.runtime.tune import TuneOptions, TuneProgress, tuned_options

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle-v1"
FEW = ["--seconds-per-point", "0.05", "--device", "cpu", "--batch", "1", "--batch", "4"]
QUICK = [*FEW, "--time-limit", "90s"]  # which only a machine that stands still would need


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "small.onecard"))


def onecard(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from onecard.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.timeout(290)
def test_a_bundle_is_tuned(bundle):
    # Each rate is tried for two seconds, and twice if it misses: a machine that stands still meanwhile has another try.
    done = onecard("tune", bundle, "--p99", "1us", "--p99", "200ms", *FEW, "--time-limit", "60s")
    assert done.returncode == 0, done.stderr
    assert "the knee" in done.stdout
    assert "p99 within 0.001 ms: no batch is that quick" in done.stdout
    assert "Written into" in done.stdout
    manifest = read_manifest(bundle)
    assert damaged(bundle, manifest.files.items()) == {}
    assert "tuning.json" in manifest.files
    found = read_tuning(bundle)
    assert found is not None
    assert [(p.batch, p.lanes) for p in found.points] == [(1, 1), (4, 1)]
    assert [s.p99_limit_ms for s in found.settings] == pytest.approx([0.001, 200.0])
    assert found.settings[1].failed == ""
    assert found.command.startswith("onecard tune ")
    page = (bundle / "report.html").read_text("utf-8")
    assert "<h2>Tuning</h2>" in page
    options = tuned_options(bundle, 200.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)
        with Engine.open(bundle, "cpu", options) as engine:
            assert engine.options.policy.max_rows == found.settings[1].batch
    assert os.listdir(bundle.parent) == [bundle.name]


def test_a_dry_run_measures_and_writes_nothing(bundle):
    before = content(bundle)
    done = onecard("tune", bundle, "--dry-run", "--p99", "5ms", "--lanes", "2", "--rows", "2", *QUICK)
    assert done.returncode == 0, done.stderr
    for said in ("on cpu, about ", "batches     1, 4", "lanes       2", "p99 limits  5 ms, requests of 2 rows"):
        assert said in done.stdout
    assert content(bundle) == before
    done = onecard("tune", bundle, "--dry-run", "--json", *QUICK)
    assert json.loads(done.stdout)["batches"] == [1, 4]


def test_what_was_found_as_json(bundle):
    done = onecard("tune", bundle, "--json", "--p99", "1us", *QUICK)
    assert done.returncode == 0, done.stderr
    assert [p["batch"] for p in json.loads(done.stdout)["points"]] == [1, 4]


MISTAKES = {
    "no bundle": (["tune", "{empty}"], 6, "no onecard bundle"),
    "bad limit": (["tune", "{bundle}", "--p99", "fast"], 2, "5ms"),
    "zero limit": (["tune", "{bundle}", "--p99", "0ms"], 2, "is not a duration"),
    "batch out of range": (["tune", "{bundle}", "--batch", "9"], 2, "1 to 4 rows"),
    "rows out of range": (["tune", "{bundle}", "--rows", "9"], 2, "B=1..4"),
    "no lanes": (["tune", "{bundle}", "--lanes", "0"], 2, "must be 1 to 16"),
    "no time": (["tune", "{bundle}", "--seconds-per-point", "0"], 2, "point_s"),
    "no such device": (["tune", "{bundle}", "--device", "abacus"], 2, "cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, bundle, tmp_path):
    arguments, code, hint = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    before = content(bundle)
    done = onecard(*(a.format(empty=tmp_path / "empty", bundle=bundle) for a in arguments))
    assert done.returncode == code, done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert content(bundle) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_leaves_the_bundle_as_it_was(bundle):
    before = content(bundle)
    command = [sys.executable, "-c", "from onecard.cli import main; main()", "tune", str(bundle), "--device", "cpu"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    said = ""
    while "left" not in said:  # the first measurement has begun
        line = running.stderr.readline()
        assert line, said
        said += line
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "small.onecard is as it was" in errors
    assert "Traceback" not in errors
    assert content(bundle) == before
    assert os.listdir(bundle.parent) == [bundle.name]


@pytest.mark.filterwarnings("ignore::onecard.bundle.open.OnecardWarning")
def test_a_stop_in_python(bundle):
    def observe(progress: TuneProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedSearch, match="is as it was"):
        tune(bundle, device="cpu", options=TuneOptions(batches=(1,)), observe=observe)


@pytest.mark.filterwarnings("ignore::onecard.bundle.open.OnecardWarning")
def test_a_bundle_that_is_replaced_meanwhile_is_left_alone(bundle):
    def observe(progress: TuneProgress) -> None:
        text = (bundle / "onecard.json").read_bytes()
        (bundle / "onecard.json").write_bytes(text.replace(b'"sha256": "', b'"sha256":  "', 1))

    options = TuneOptions((0.001,), (1,), (1,), 1, 0.05, 90.0)
    with pytest.raises(BundleError):
        tune(bundle, device="cpu", options=options, observe=observe)
    assert not (bundle / "tuning.json").exists()
