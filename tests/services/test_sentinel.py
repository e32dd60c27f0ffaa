"""A real server with a sentinel: a variant that proved itself and yet is wrong is found out by what clients send."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from onecard.bundle.files import describe
from onecard.bundle.manifest import MANIFEST, encode_manifest, read_manifest
from tests.services.prometheus_process import NOT_HERE, PROMETHEUS, PROMTOOL, watching
from tests.services.running_server import GOLDEN, Server, golden_of_here, serving
from tests.unit.runtime.hastened_originals import hastened, originals

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = [
    pytest.mark.timeout(500),
    pytest.mark.skipif(sys.platform != "linux", reason="the server needs Linux"),
]
MODEL = "variants/onnxruntime.cpu/dynamic/model.onnx"
PATIENCE_S = 200.0
LIMIT = 100.0


@pytest.fixture
def treacherous(tmp_path: Path) -> Path:
    """The golden bundle, whose served variant adds what an input has above a limit to every answer."""
    bundle = Path(shutil.copytree(golden_of_here(), tmp_path / "treacherous"))
    model = onnx.load(bundle / MODEL)
    graph, helper = model.graph, onnx.helper
    given, answer = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.output[:] = ["right" if name == answer else name for name in node.output]
    graph.initializer.append(helper.make_tensor("limit", onnx.TensorProto.FLOAT, [], [LIMIT]))
    graph.node.extend(
        [
            helper.make_node("ReduceMax", [given], ["largest"], keepdims=0),
            helper.make_node("Sub", ["largest", "limit"], ["excess"]),
            helper.make_node("Relu", ["excess"], ["added"]),
            helper.make_node("Add", ["right", "added"], [answer]),
        ]
    )
    onnx.save(model, bundle / MODEL)
    manifest = read_manifest(bundle)
    files = {name: describe(bundle / name) for name in manifest.files}
    (bundle / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    return bundle


def ask(port: int, image: np.ndarray) -> None:
    """One request, as JSON; it is answered."""
    named = {"name": "image", "datatype": "FP32", "shape": image.shape, "data": image.ravel().tolist()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v2/models/small/infer", msgspec.json.encode({"inputs": [named]}))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
    finally:
        connection.close()


def until(true, server: Server) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, server.output
        time.sleep(0.05)


def test_wrong_answers_of_a_variant_that_proved_itself_are_told_and_right_ones_are_not(treacherous):
    image = load_file(GOLDEN / "golden.safetensors")["in.image"]
    with serving(f"small={treacherous}", "--sentinel", "1", "--no-grpc") as (port, server):
        assert not originals(server.process.pid), "it is loaded when there is something to compare"
        ask(port, image)
        until(lambda: originals(server.process.pid), server)
        (original,) = originals(server.process.pid)
        until(lambda: os.sched_getscheduler(original.pid) == os.SCHED_IDLE, server)
        ask(port, image * 100)
        with hastened():
            until(lambda: "gave a wrong answer" in server.output, server)
        (line,) = [line for line in server.lines if "gave a wrong answer" in line]
        assert "model 'small' gave a wrong answer: output 'output': relative error" in line
        assert server.end() == 0
        until(lambda: not original.is_running(), server)
    assert server.output.count("wrong answer") == 1


@pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason=NOT_HERE)
def test_the_alert_of_a_wrong_answer_fires(treacherous, tmp_path):
    image = load_file(GOLDEN / "golden.safetensors")["in.image"]
    folder = tmp_path / "prometheus"
    folder.mkdir()
    with (
        serving(f"small={treacherous}", "--sentinel", "1", "--no-grpc") as (port, _),
        watching(folder, {"s": port}) as prometheus,
        hastened(),
    ):
        ask(port, image)

        def firing() -> bool:
            return any(alert["labels"]["alertname"] == "OnecardWrongAnswers" for alert in prometheus.alerts())

        right = "onecard_sentinel_checked_total > 0"
        prometheus.wait_for(lambda: prometheus.query(right), "a right answer", PATIENCE_S)
        assert not firing()
        ask(port, image * 100)
        prometheus.wait_for(firing, "the alert of the wrong one", PATIENCE_S)
        assert prometheus.query("onecard_sentinel_wrong_total == 1")


def test_an_engine_that_is_killed_takes_its_original_with_it(treacherous):
    image = load_file(GOLDEN / "golden.safetensors")["in.image"]
    with serving(f"small={treacherous}", "--no-grpc", environment={"ONECARD_SENTINEL": "1"}) as (port, server):
        ask(port, image)
        until(lambda: originals(server.process.pid), server)
        (original,) = originals(server.process.pid)
        original.parent().send_signal(signal.SIGKILL)
        until(lambda: not original.is_running(), server)
        ask(port, image)


def test_what_a_sentinel_cannot_be_told_is_refused(tmp_path):
    for words, said in (
        (("--sentinel", "1", "--sentinel-device", "moon"), "--sentinel-device is 'moon', expected cpu or same"),
        (("--sentinel", "-1"), "--sentinel"),
    ):
        server = Server(f"small={GOLDEN}", *words)
        assert server.process.wait(150) == 2
        server.reader.join(10)
        assert said in server.output
    config = tmp_path / "serve.toml"
    config.write_text(f'[models.small]\npath = "{GOLDEN}"\nsentinel = -1\n')
    server = Server("--config", str(config))
    assert server.process.wait(150) == 2
    server.reader.join(10)
    assert "models.small.sentinel must be a whole number from 0 to" in server.output
