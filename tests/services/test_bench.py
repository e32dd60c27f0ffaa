"""``onecard bench`` against a real ``onecard serve``, over HTTP, a Unix-domain socket and gRPC, and in process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from onecard.bench.histogram import Histogram
from tests.services.running_server import GOLDEN, serving

pytestmark = pytest.mark.timeout(290)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    socket = tmp_path_factory.mktemp("bench") / "s"
    with serving(f"m={GOLDEN}", "--uds", str(socket)) as (port, server):
        grpc = re.search(r"gRPC on port (\d+)", server.output)
        assert grpc is not None, server.output
        yield {
            "http": f"http://127.0.0.1:{port}/m",
            "grpc": f"grpc://127.0.0.1:{grpc[1]}",
            "unix": f"unix:{socket}",
            "bundle": str(GOLDEN),
        }


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "onecard", "bench", *map(str, words)]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=here)


def bench(*words: object) -> tuple[int, str, str]:
    process = start(*words)
    try:
        out, error = process.communicate(timeout=250)
    finally:
        process.kill()
    assert "Traceback" not in error
    return process.returncode, out, error


@pytest.mark.parametrize("kind", ["http", "grpc", "unix", "bundle"])
def test_random_arrivals(places, kind, tmp_path):
    if kind == "grpc":
        pytest.importorskip("grpc")
    files = "--json", tmp_path / "f.json", "--html", tmp_path / "f.html"
    code, out, error = bench(places[kind], "--qps", 30, "--duration", "2s", "--slo", "p99=30s", *files)
    assert code == 0, error + out
    found = json.loads((tmp_path / "f.json").read_text())
    run = found["run"]
    assert run["answered"] == run["queries"] == pytest.approx(60, abs=35)
    assert run["refused"] == run["failed"] == {} and run["objective_kept"]
    assert Histogram.decode(run["histogram"]).total == run["answered"]
    assert found["settings"]["scenario"] == "server" and found["command"].startswith("onecard bench ")
    assert found["generator"]["python"] and found["target"]["protocol"]
    assert ("server" in found["target"]) == (kind != "bundle")
    page = (tmp_path / "f.html").read_text()
    assert page.count("<svg") >= 3 and "p99=30000ms is kept" in page
    assert "p99.99" in out and "kept" in out


@pytest.mark.parametrize("words", [("--scenario", "single-stream"), ("--scenario", "multi-stream", "--samples", "3"),
                                   ("--scenario", "offline", "--requests", "40"),
                                   ("--closed-loop", "--concurrency", "3", "--requests", "40")])  # fmt: skip
def test_the_other_scenarios(places, words):
    code, out, error = bench(places["http"], "--duration", "1s", "--warm-up", "0", "--rows", 2, *words)
    assert code == 0, error
    assert re.search(r"answered\s+│\s+[\d,]+ \(100 %\)", out), out
    assert ("for comparison only" in out) == ("--closed-loop" in words)


def test_the_knee(places):
    code, out, _ = bench(places["http"], "--find-knee", "--slo", "p50=1s", "--duration", "0.5s", "--tolerance", "0.5")
    assert code == 0
    assert "The knee:" in out and "keep p50=1000ms" in out


def test_an_objective_that_is_not_kept_is_exit_code_1(places):
    code, out, _ = bench(places["http"], "--qps", 20, "--duration", "1s", "--slo", "p50=1us")
    assert code == 1
    assert "not kept: p50 above the limit" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("{http}x", "--qps", "5"), 2, "does not serve 'mx'"),
        (("{grpc}", "--model", "x", "--qps", "5"), 2, "NOT_FOUND"),
        (("{http}", "--qps", "5", "--rows", "9999"), 10, "is outside the range"),
        (("{http}",), 2, "needs a rate or a trace"),
        (("{http}", "--qps", "5", "--slo", "fast"), 2, "cannot read --slo 'fast'"),
        (("{http}", "--scenario", "serve"), 2, "expected one of server, offline"),
        (("{http}", "--find-knee"), 2, "--find-knee needs an objective"),
        (("{http}", "--qps", "5", "--data", "none.npz"), 4, "there is no file none.npz"),
        (("{http}", "--qps", "5", "--json", "/none/f.json"), 9, "there is no folder /none"),
        (("grpc://127.0.0.1:9", "--model", "m", "--qps", "5"), 10, "cannot be reached"),
    ],
)
def test_mistakes_are_named(places, words, code, message):
    found, _, error = bench(*(word.format(**places) for word in words))
    assert message in " ".join(error.split())
    assert found == code


def answered(place: str) -> int:
    """Requests that the server has answered so far."""
    base, _, model = place.rpartition("/")
    with urllib.request.urlopen(f"{base}/v2/models/{model}/stats", timeout=60) as told:
        return int(json.load(told)["model_stats"][0]["inference_count"])


def test_ctrl_c_shows_what_was_measured(places):
    before = answered(places["http"])
    process = start(places["http"], "--qps", 20, "--duration", "100s", "--warm-up", "0")
    try:
        end = time.monotonic() + 120
        while answered(places["http"]) < before + 30:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "answered" in out and "stopped early" in out
    assert "Traceback" not in error
