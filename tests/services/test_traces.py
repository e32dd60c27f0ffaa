"""``onecard serve`` with traces: a real collector, and tritonclient with a trace context, over HTTP and gRPC."""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("opentelemetry.sdk.trace", reason="onecard[trace] is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="onecard[trace] is not installed")
triton_grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
triton_http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402

from tests.services.running_server import GOLDEN, Server, serving  # noqa: E402
from tests.services.trace_collector import Collector, Span  # noqa: E402

pytestmark = pytest.mark.timeout(400)
PARTS = {"parse", "queue", "copy-in", "compute", "copy-out", "reply"}
TRACES = {name: f"{number:032x}" for number, name in enumerate(("away", "http", "grpc", "stream", "none", "last"), 1)}
PARENT = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


def context(name: str, sampled: bool = True) -> dict[str, str]:
    return {"traceparent": f"00-{TRACES[name]}-{PARENT}-{sampled:02x}", "tracestate": "vendor=value"}


def ask(module, address: str, image: np.ndarray, headers: dict[str, str], model: str = "m") -> np.ndarray:
    with module.InferenceServerClient(address) as client:
        tensor = module.InferInput("image", list(image.shape), "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(image))
        return client.infer(model, [tensor], headers=headers).as_numpy("output")


def stream(address: str, image: np.ndarray, headers: dict[str, str], requests: int) -> None:
    found: list = []
    with triton_grpc.InferenceServerClient(address) as client:
        tensor = triton_grpc.InferInput("image", list(image.shape), "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(image))
        client.start_stream(lambda result, error: found.append(error), headers=headers)
        for _ in range(requests):
            client.async_stream_infer("m", [tensor])
        client.stop_stream()
    assert found == [None] * requests


def of(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.trace == TRACES[name]]


def check_request(spans: list[Span], name: str, between: tuple[int, int]) -> Span:
    """The request's span, with all parts inside it and in their order."""
    (request,) = (span for span in spans if span.parent == PARENT)
    assert (request.name, request.service, request.status) == (name, "onecard", 0)
    parts = {span.name: span for span in spans if span is not request}
    assert parts.keys() == PARTS and len(spans) == 1 + len(PARTS)
    assert between[0] <= request.began and request.ended <= between[1]
    for part in parts.values():
        assert part.parent == request.id
        assert request.began <= part.began <= part.ended <= request.ended
    order = ("parse", "queue", "copy-in", "compute", "copy-out", "reply")
    for before, after in itertools.pairwise(order):
        assert parts[before].ended <= parts[after].began, (before, after)
    assert parts["compute"].ended > parts["compute"].began
    assert parts["compute"].attributes == {"onecard.batch.rows": 2}
    shown = {name: request.attributes[f"onecard.{name}"] for name in ("model", "version", "batch.rows")}
    assert shown == {"model": "m", "version": "1", "batch.rows": 2}
    return request


def test_spans_of_requests_arrive(golden):
    """One server: its collector is away at first, then comes; the end of the server sends what is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--trace-endpoint", f"http://127.0.0.1:{port}", "--trace-sample", "0"]
    words += ["--access-log", "1", "--log-format", "json"]
    hurry = {"OTEL_BSP_SCHEDULE_DELAY": "500", "OTEL_EXPORTER_OTLP_TIMEOUT": "2.5"}
    image, wanted = (np.repeat(golden[name][:1], 2, axis=0) for name in ("in.image", "out.output"))
    with serving(f"m={GOLDEN}", *words, environment=hurry) as (http_port, server):
        http, grpc = f"127.0.0.1:{http_port}", f"127.0.0.1:{_grpc_port(server)}"
        for _ in range(2):
            answer = ask(triton_http, http, image, context("away"))
            np.testing.assert_allclose(answer, wanted, rtol=1e-3, atol=1e-4)
            _wait_for_log(server, "traces cannot be delivered")
        collector = Collector(port)
        try:
            began = time.time_ns()
            ask(triton_http, http, image, {**context("http"), "X-Request-Id": "mine"})
            ask(triton_grpc, grpc, image, context("grpc"))
            stream(grpc, image, context("stream"), 2)
            ask(triton_http, http, image, context("none", sampled=False))
            ask(triton_http, http, image, {})
            with pytest.raises(InferenceServerException):
                ask(triton_http, http, image, context("last"), model="unknown")
            assert server.end(signal.SIGTERM) == 0
            ended = time.time_ns()
        finally:
            collector.close()
    spans = collector.spans
    assert collector.paths == {"/v1/traces"}
    assert {span.trace for span in spans} - {TRACES["away"]} == {TRACES[n] for n in ("http", "grpc", "stream", "last")}
    by_http = check_request(of(spans, "http"), "POST /v2/models/{model}/infer", (began, ended))
    assert by_http.attributes["http.response.status_code"] == 200
    assert by_http.attributes["http.request.method"] == "POST"
    assert by_http.attributes["url.path"] == "/v2/models/m/infer"
    assert by_http.attributes["onecard.request.id"] == "mine"
    by_grpc = check_request(of(spans, "grpc"), "inference.GRPCInferenceService/ModelInfer", (began, ended))
    assert by_grpc.attributes["rpc.response.status_code"] == "OK"
    in_stream = [span for span in of(spans, "stream") if span.parent == PARENT]
    assert [span.name for span in in_stream] == ["inference.GRPCInferenceService/ModelStreamInfer"] * 2
    (unknown,) = (span for span in of(spans, "last") if span.parent == PARENT)
    assert (unknown.attributes["http.response.status_code"], unknown.status) == (404, 0)
    assert _logged(server, TRACES["http"]) == [("mine", 200)]
    assert server.output.count("traces cannot be delivered") == 1


def test_without_the_option_nothing_of_it_is_imported(golden, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def tell(): open(os.path.join(os.path.dirname(__file__), f'{os.getpid()}.modules'), 'w')"
        ".write(chr(10).join(sys.modules))\n"
        "atexit.register(tell)\n"
    )
    with serving(f"m={GOLDEN}", environment={"PYTHONPATH": str(tmp_path)}) as (port, server):
        ask(triton_http, f"127.0.0.1:{port}", golden["in.image"][:1], context("none"))
        ask(triton_grpc, f"127.0.0.1:{_grpc_port(server)}", golden["in.image"][:1], context("none"))
        assert server.end() == 0
        modules = Path(tmp_path / f"{server.process.pid}.modules").read_text().split("\n")
    assert "onecard.server.app" in modules and "onecard.server.grpc_inference" in modules
    assert not [name for name in modules if name.split(".")[0] == "opentelemetry"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trace-endpoint", "collector:4318"], "http://127.0.0.1:4318"),
        (["--trace-endpoint", "http://127.0.0.1:4318", "--trace-sample", "2"], "Invalid value for '--trace-sample'"),
    ],
)
def test_options_that_cannot_be_are_said(words, said):
    server = Server(f"m={GOLDEN}", *words, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    assert server.process.wait(150) == 2
    server.reader.join(10)
    assert said in re.sub(r"\s+", " ", server.output) and "Traceback" not in server.output


def _grpc_port(server: Server) -> int:
    found = re.search(r"gRPC on port (\d+)", server.output)
    assert found is not None, server.output
    return int(found[1])


def _wait_for_log(server: Server, text: str) -> None:
    end = time.monotonic() + 90
    while text not in server.output:
        assert time.monotonic() < end, server.output
        time.sleep(0.05)


def _logged(server: Server, trace: str) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    return [(line["request_id"], line["status"]) for line in lines if line.get("trace_id") == trace]
