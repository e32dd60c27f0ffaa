"""``onecard mlperf`` on a real bundle with the real LoadGen: each scenario, the accuracy, and every way to fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from onecard.bundle.open import OnecardWarning, load_bundle
from onecard.verify.data import load_data
from onecard.verify.evaluate import answers_of, evaluate

pytest.importorskip("mlperf_loadgen", reason="MLPerf's LoadGen is not installed: pip install 'onecard[mlperf]'")
pytestmark = pytest.mark.timeout(600)

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"
COMMAND = """
from onecard import cli, cli_mlperf
if "mlperf" not in {c.name for c in cli.app.registered_commands}:
    cli_mlperf.register(cli.app)
cli.main()
"""
ROWS = 37  # no multiple of a query's samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose labels are the model's own answers for two thirds of them."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    image = np.random.default_rng(0).standard_normal((ROWS, 3, 16, 16), dtype=np.float32)
    bundle = opened()
    parts = [bundle(image=image[low : low + 4])["output"] for low in range(0, ROWS, 4)]
    bundle.close()
    label = np.concatenate(parts).argmax(-1)
    label[::3] = (label[::3] + 1) % 10
    np.savez(path, image=image, label=label)
    return path


def opened():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)
        return load_bundle(GOLDEN, "cpu")


def words(output: Path, data: object, *more: str) -> list[str]:
    command = [sys.executable, "-c", COMMAND, "mlperf", str(GOLDEN), "--data", str(data), "-o", str(output)]
    return [*command, "--device", "cpu", "--min-duration", "300ms", *more]


def onecard(output: Path, data: object, *more: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(output, data, *more), capture_output=True, text=True, check=False, timeout=280, **options
    )


@pytest.mark.parametrize(
    ("scenario", "more"),
    [
        ("SingleStream", ("--percentile", "0.5", "--min-queries", "64")),
        ("MultiStream", ("--percentile", "0.5", "--samples-per-query", "6")),
        ("Server", ("--qps", "200", "--latency", "20s", "--percentile", "0.5", "--min-queries", "64")),
        ("Offline", ()),
    ],
)
def test_each_scenario_runs_and_is_judged_by_loadgen(tmp_path, data, scenario, more):
    done = onecard(tmp_path, data, "--scenario", scenario, *more)
    assert done.returncode in (0, 11), done.stderr
    found = json.loads((tmp_path / "mlperf.json").read_text())
    said = (tmp_path / "mlperf_log_summary.txt").read_text()
    assert f"Scenario : {scenario}\n" in said
    assert ("Result is : VALID" in said) == found["summary"]["valid"] == (done.returncode == 0)
    assert ("INVALID" in done.stdout) == (done.returncode == 11)
    assert found["samples"] == ROWS
    assert found["summary"]["errors"] == 0
    assert (tmp_path / "mlperf_log_detail.txt").stat().st_size
    if scenario in ("Server", "Offline"):
        assert found["summary"]["samples_per_s"] > 0
    else:
        assert found["summary"]["latency_percentile"] == 0.5
        assert found["summary"]["latency_ns"]["result"] > 0
    if scenario == "MultiStream":
        assert found["summary"]["parameters"]["samples_per_query"] == "6"


@pytest.mark.parametrize(
    ("scenario", "more"), [("Offline", ()), ("MultiStream", ()), ("Server", ("--qps", "500", "--latency", "1s"))]
)
def test_the_accuracy_is_that_of_a_plain_loop(tmp_path, data, scenario, more):
    bundle = opened()
    rows = load_data(str(data), bundle.spec)
    plain = evaluate(answers_of(lambda inputs: bundle(**inputs), bundle.spec, rows, "cpu"), rows, "accuracy")
    bundle.close()
    assert plain == 24 / 37
    done = onecard(tmp_path, data, "--scenario", scenario, "--mode", "accuracy", "--json", *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "mlperf.json").read_text())
    assert (found["metric"], found["score"], found["summary"]["valid"]) == ("accuracy", plain, None)


def test_a_missed_bound_is_invalid_with_a_code_of_its_own(tmp_path, data):
    done = onecard(tmp_path, data, "--scenario", "Server", "--qps", "100", "--latency", "1us")
    assert done.returncode == 11, done.stderr
    assert "INVALID" in done.stdout
    assert "latency bound missed, the p99 is above 0.001 ms: lower --qps (now 100)" in done.stdout
    assert json.loads((tmp_path / "mlperf.json").read_text())["summary"]["valid"] is False


def test_queries_that_ran_out_are_invalid_too(tmp_path, data):
    done = onecard(tmp_path, data, "--scenario", "Offline", "--qps", "1", "--min-duration", "60s")
    assert done.returncode == 11, done.stderr
    assert "min duration of 60 s not met" in done.stdout
    assert "samples/s with --qps" in done.stdout


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda path: None, 4, "there is no file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), 4, "cannot read"),
        (lambda path: np.savez(path, image=np.zeros((3, 3, 8, 8), np.float32)), 4, "dimension 2 must be 16"),
        (lambda path: np.savez(path, image=np.zeros((3, 3, 16, 16), np.float32)), 4, "needs labels"),
    ],
)
def test_bad_data_is_told_and_leaves_no_result(tmp_path, make, code, said):
    path, output = tmp_path / "bad.npz", tmp_path / "out"
    make(path)
    done = onecard(output, path, "--scenario", "Offline", "--mode", "accuracy")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(output.iterdir()) == []


def test_an_earlier_result_survives_a_run_that_did_not_begin(tmp_path, data):
    (tmp_path / "mlperf.json").write_text("{}")
    (tmp_path / "mlperf_log_summary.txt").write_text("earlier")
    assert onecard(tmp_path, tmp_path / "none.npz", "--scenario", "Offline").returncode == 4
    assert (tmp_path / "mlperf.json").read_text() == "{}"
    assert (tmp_path / "mlperf_log_summary.txt").read_text() == "earlier"
    assert onecard(tmp_path, data, "--scenario", "Offline", "--mode", "accuracy", "--metric", "top5").returncode == 0
    assert json.loads((tmp_path / "mlperf.json").read_text())["metric"] == "top5"
    assert (tmp_path / "mlperf_log_summary.txt").read_text() != "earlier"


def test_options_and_places_that_do_not_fit(tmp_path, data):
    for more, code, said in (
        (("--scenario", "Server"), 2, "Pass --qps 200 --latency 15ms"),
        (("--scenario", "Offline", "--mode", "accuracy", "--metric", "acuracy"), 2, "unknown metric 'acuracy'"),
    ):
        done = onecard(tmp_path / "out", data, *more)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    (tmp_path / "file").write_text("")
    done = onecard(tmp_path / "file", data, "--scenario", "Offline")
    assert (done.returncode, "cannot be used" in done.stderr) == (9, True), done.stderr


def test_a_missing_package_names_its_cure(tmp_path, data):
    code = f"import sys\nsys.modules['mlperf_loadgen'] = None\n{COMMAND}"
    command = [code if word == COMMAND else word for word in words(tmp_path / "out", data, "--scenario", "Offline")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 5, done.stderr
    assert "pip install 'onecard[mlperf]'" in done.stderr
    assert not (tmp_path / "out").exists()


def begun(output: Path, data: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A run of five minutes in which LoadGen is at work, and its process."""
    command = words(output, data, "--scenario", "SingleStream", "--latency", "1ms")
    command[command.index("300ms")] = "300s"
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stderr is not None
    try:
        while line := run.stderr.readline():
            if line.startswith("SingleStream, performance"):
                break
        (child,) = (c for c in psutil.Process(run.pid).children() if "onecard.bench.mlperf_worker" in c.cmdline())
        until((output / "mlperf_log_detail.txt").is_file)
    except BaseException:
        run.kill()
        run.communicate()
        raise
    return run, child


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 50
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_ctrl_c_ends_cleanly_with_the_logs_so_far(tmp_path, data):
    run, child = begun(tmp_path, data)
    try:
        until(lambda: (tmp_path / "mlperf_log_detail.txt").stat().st_size > 0)  # they are written once a second
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=120)
        assert run.returncode == 130
        assert "no result was written" in said
        assert "Traceback" not in said
        assert (tmp_path / "mlperf_log_detail.txt").stat().st_size
        assert not (tmp_path / "mlperf.json").exists()
        assert not child.is_running()
    finally:
        run.kill()
        run.communicate()


def test_loadgens_process_does_not_outlive_its_parent(tmp_path, data):
    run, child = begun(tmp_path, data)
    run.kill()
    run.communicate()
    child.wait(120)
    assert not child.is_running()


def test_a_process_that_dies_is_an_error(tmp_path, data):
    run, child = begun(tmp_path, data)
    try:
        child.kill()
        _, said = run.communicate(timeout=120)
        assert run.returncode == 10
        assert "LoadGen's process ended before the run was over: signal 9" in said
        assert not (tmp_path / "mlperf.json").exists()
    finally:
        run.kill()
        run.communicate()


def test_a_model_that_fails_in_the_middle_is_an_error(tmp_path, data):
    """LoadGen cannot be told of a failure and would wait for ever."""
    code = tmp_path / "data.py"
    code.write_text(
        "import numpy as np, onecard.runtime.engine as e\n"
        "plain, count = e.Engine.submit, [0]\n"
        "def submit(self, inputs, **more):\n"
        "    count[0] += 1\n"
        "    if count[0] > 200:\n"
        "        inputs = {'image': inputs['image'][:, :2]}\n"
        "    return plain(self, inputs, **more)\n"
        "e.Engine.submit = submit\n"
        "def rows():\n"
        "    return {'image': np.zeros((5, 3, 16, 16), np.float32)}, None\n"
    )
    done = onecard(
        tmp_path / "out", f"{code}:rows", "--scenario", "SingleStream", "--latency", "100us", "--min-queries", "2000"
    )
    assert done.returncode == 2, done.stderr  # what the engine says of a shape that does not fit
    assert "image" in done.stderr
    assert not (tmp_path / "out" / "mlperf.json").exists()


def test_the_probe_is_left_out_where_figures_are_given(tmp_path, data):
    done = onecard(tmp_path, data, "--scenario", "Offline", "--qps", "2000")
    assert "measuring" not in done.stderr
    found = json.loads((tmp_path / "mlperf.json").read_text())
    assert found["summary"]["parameters"]["target_qps"] == "2000"
    assert found["settings"]["qps"] == 2000.0
