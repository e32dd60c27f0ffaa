"""What a real server tells of itself: state, metrics, report and console; and what Prometheus makes of its troubles."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from onecard.telemetry.snapshot import HISTOGRAMS, ModelFigures, Snapshot, decode
from tests.attacks.attacked import attacked
from tests.attacks.null_server import NullBundle
from tests.services.monitoring_queries import panel_queries, unanswered
from tests.services.prometheus_process import NOT_HERE, PROMETHEUS, PROMTOOL, watching
from tests.services.running_server import GOLDEN, serving

pytestmark = pytest.mark.timeout(500)
_METRICS_PORT = re.compile(r"metrics on port (\d+)")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason=NOT_HERE)


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    words = (f"a={GOLDEN}", f"b={GOLDEN}", "--max-batch", "4", "--metrics-compat", "triton")
    with serving(*words) as (port, server):
        found = _METRICS_PORT.search(server.output)
        assert found is not None
        yield port, int(found[1])


def ask(port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def state(port: int) -> Snapshot:
    time.sleep(0.25)  # those who ask within a fifth of a second get the same
    status, headers, body = ask(port, "/v2/onecard/state")
    assert (status, headers["content-type"]) == (200, "application/json")
    return decode(body)


def model(port: int, name: str = "a") -> ModelFigures:
    (found,) = [each for each in state(port).models if each.name == name]
    return found


def infer(port: int, rows: int = 1, model: str = "a", **more: object) -> int:
    image = np.zeros((rows, 3, 16, 16), np.float32)
    tensor = {"name": "image", "datatype": "FP32", "shape": list(image.shape), "data": image.ravel().tolist()}
    return ask(port, f"/v2/models/{model}/infer", "POST", json.dumps({"inputs": [tensor], **more}).encode())[0]


def test_every_request_is_counted_once_where_it_belongs(ports):
    port, _ = ports
    before = model(port)
    assert [infer(port, rows) for rows in (1, 3, 2)] == [200, 200, 200]
    assert infer(port, 9) == 400
    assert infer(port, 1, parameters={"timeout": 1}) == 504
    assert infer(port, 1, model="nobody") == 404
    end = time.monotonic() + 30
    while (after := model(port)).requests - before.requests < 3 or after.in_flight:  # the engine tells a little later
        assert time.monotonic() < end, after
    assert after.requests - before.requests == 3
    assert after.rows - before.rows == 6
    assert after.histograms["request_s"].minus(before.histograms["request_s"]).count == 3
    assert after.histograms["queue_s"].minus(before.histograms["queue_s"]).count == 3
    failures = {key: n - before.failures.get(key, 0) for key, n in after.failures.items()}
    late = failures.pop("deadline", 0) + failures.pop("refused_deadline", 0)
    assert (late, {key: n for key, n in failures.items() if n}) == (1, {"bad_input": 1})
    assert after.in_flight == after.queue_requests == 0
    assert set(after.histograms) == set(HISTOGRAMS)
    assert after.batches - before.batches == after.batch_rows.minus(before.batch_rows).count > 0
    assert {each.name for each in state(port).models} == {"a", "b"}


def test_the_state_says_what_runs_and_on_what(ports):
    port, _ = ports
    found = state(port)
    assert found.server.ready and found.server.engine_restarts == 0 and found.server.open_connections >= 1
    assert [process.role for process in found.processes] == ["front", "engine"]
    assert all(process.resident_bytes > 1 << 20 for process in found.processes)
    figures = model(port)
    assert (figures.state, figures.device, figures.version) == ("READY", "cpu", "1")
    assert figures.variant and figures.load_s > 0 and figures.queue_limit_requests == 1000
    assert figures.inputs[0].shape == (-1, 3, 16, 16)
    assert found.card["device"] == "cpu" and found.card["memory_total_bytes"] > 1 << 30


def test_metrics_are_the_same_on_both_ports_and_in_both_formats(ports):
    port, metrics = ports
    infer(port)
    for where in (port, metrics):
        status, headers, body = ask(where, "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain")
        text = body.decode()
        assert 'onecard_requests_answered_total{model="a",version="1"}' in text
        assert 'nv_inference_request_success{model="a",version="1"}' in text
    _, headers, body = ask(metrics, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["content-type"].startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")
    assert ask(metrics, "/v2")[0] == ask(metrics, "/")[0] == 404
    assert ask(port, "/metrics", "POST", b"")[0] == 405


def test_the_console_and_the_report_are_served(ports):
    port, _ = ports
    status, headers, body = ask(port, "/")
    assert status == 200 and b"console/console.js" in body
    assert "default-src 'self'" in headers["content-security-policy"]
    assert ask(port, "/console/console.css")[1]["content-type"].startswith("text/css")
    status, headers, body = ask(port, "/v2/onecard/models/a/report")
    if (GOLDEN / "report.html").exists():
        assert status == 200 and b"<html" in body
    else:
        assert status == 404 and b"no report" in body
    for path in (
        "/console/../app.py",
        "/console/%2e%2e/app.py",
        "/v2/onecard/models/nobody/report",
        "/v2/onecard",
        "/x",
    ):
        assert ask(port, path)[0] == 404, path


def test_a_token_guards_what_tells_of_the_server_but_not_the_page(tmp_path):
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length")
    token.chmod(0o600)
    with serving(f"a={GOLDEN}", "--auth-token-file", str(token)) as (port, _):
        assert ask(port, "/")[0] == 200
        for path in ("/metrics", "/v2/onecard/state", "/v2/onecard/models/a/report"):
            assert ask(port, path)[0] == 401, path
        status, _, _ = ask(port, "/v2/onecard/state", Authorization="Bearer a-token-of-some-length")
        assert status == 200


def test_the_monitor_shows_a_real_server(ports):
    port, _ = ports
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "onecard", "monitor", url]
    once = subprocess.run([*command, "--once"], capture_output=True, text=True, check=True, timeout=150)
    assert "a" in once.stdout.split() and "READY" in once.stdout.upper()
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=150)
    assert [each["name"] for each in json.loads(as_json.stdout)["models"]] == ["a", "b"]


@needs_prometheus
def test_every_panel_has_data_of_a_real_server(ports, tmp_path):
    port, metrics = ports
    with (
        watching(tmp_path, {"real": metrics}) as prometheus,
        Load(lambda: infer(port)),
        Load(lambda: infer(port, 2, "b")),
    ):
        prometheus.wait_for(lambda: prometheus.query("count_over_time(up[5m]) >= 5"), "five scrapes")
        page = ask(metrics, "/metrics")[2].decode()
        queries = panel_queries({"model_a": "a", "model_b": "b"})
        prometheus.wait_for(lambda: not unanswered(prometheus, queries, page), "every panel has data")


@needs_prometheus
def test_alerts_fire_when_the_queue_is_full_and_when_the_engine_was_killed(tmp_path):
    """A model that takes half a second a batch of one, and a queue of four."""
    slow = NullBundle(delay_ms=500, batches=(1,))
    with attacked({"slow": slow}, "--queue-items", "4") as server, watching(tmp_path, {"s": server.port}) as prometheus:

        def one() -> None:
            values = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
            ask(server.port, "/v2/models/slow/infer", "POST", json.dumps({"inputs": [values]}).encode())
            time.sleep(0.05)

        def firing(name: str) -> bool:
            return any(a["labels"]["alertname"] == name and a["state"] == "firing" for a in prometheus.alerts())

        prometheus.wait_for(lambda: prometheus.query("onecard_engine_restarts_total"), "a first scrape")
        assert not firing("OnecardQueueNearlyFull") and not firing("OnecardEngineRestarted")
        with Load(one, threads=10):
            prometheus.wait_for(lambda: firing("OnecardQueueNearlyFull"), "the queue's alert")
            prometheus.wait_for(lambda: firing("OnecardRefusesRequests"), "the refusals' alert")
        engine = server.engine()
        assert engine is not None
        engine.kill()
        prometheus.wait_for(lambda: firing("OnecardEngineRestarted"), "the engine's alert")


class Load:
    """Calls a function from some threads for as long as the block lasts."""

    def __init__(self, call: Callable[[], object], threads: int = 1) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(call,), daemon=True) for _ in range(threads)]

    def _run(self, call: Callable[[], object]) -> None:
        while not self._stop.is_set():
            try:
                call()
            except OSError:
                time.sleep(0.1)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
