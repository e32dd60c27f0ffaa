"""Traces: which requests are traced, the spans they become, and a collector that is away."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="onecard[trace] is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="onecard[trace] is not installed")
from opentelemetry.sdk.trace import TracerProvider, sampling
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from onecard.errors import DeadlineError, EngineError, MissingDependencyError, UsageError
from onecard.ipc.messages import Answered, Infer, Stages, decode_to_engine, decode_to_front, encode, packet
from onecard.ipc.segment import Segment
from onecard.server.app import access_logger
from onecard.server.engine_answers import EngineAnswer
from onecard.server.engine_memory import RequestMemory
from onecard.server.engine_request import EngineRequest
from onecard.server.http_response import response_of
from onecard.server.http_types import Head, HttpError, HttpService, Request, Response
from onecard.server.logs import AccessLog
from onecard.server.traces import TraceOptions, Tracing
from onecard.server.traces_export import TraceExport, traces_url
from onecard.server.traces_grpc import traced_call
from onecard.server.traces_http import traced_service
from tests.services.trace_collector import Collector

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode()}
UNSAMPLED = {b"traceparent": f"00-{TRACE}-{PARENT}-00".encode()}


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter):
    provider = TracerProvider(sampling.ALWAYS_ON, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider.get_tracer("test")
    provider.shutdown()


@pytest.fixture
def memory():
    made = RequestMemory(1 << 20)
    yield made
    made.close()


def begin(tracer, sample, headers, began=0.0):
    return Tracing(tracer, sample).begin("POST /x", headers, began, {"http.request.method": "POST"})


def test_a_sampled_parent_is_followed_whatever_the_ratio(tracer, exporter):
    trace = begin(tracer, 0.0, {**SAMPLED, b"tracestate": b"vendor=value,other=1"})
    assert trace.trace_id == TRACE
    trace.end()
    parse, span = exporter.get_finished_spans()
    assert f"{span.parent.span_id:016x}" == PARENT and span.parent.is_remote
    assert span.kind is SpanKind.SERVER and parse.parent.span_id == span.context.span_id
    assert dict(span.context.trace_state) == {"vendor": "value", "other": "1"}


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"00",
        b"x" * 5000,
        b"00-" + b"0" * 32 + b"-" + PARENT.encode() + b"-01",
        b"00-" + TRACE.encode() + b"-" + b"0" * 16 + b"-01",
        b"00-" + TRACE.upper().encode() + b"-" + PARENT.encode() + b"-01",
        b"ff-" + TRACE.encode() + b"-" + PARENT.encode() + b"-01",
        b"00-" + TRACE.encode() + b"-" + PARENT.encode() + b"-01-more",
        SAMPLED[b"traceparent"] + b", " + SAMPLED[b"traceparent"],  # a field that was sent twice
        b"\xff\xfe\x00",
    ],
)
def test_a_malformed_trace_context_counts_as_none(tracer, exporter, given):
    assert begin(tracer, 0.0, {b"traceparent": given}) is None
    trace = begin(tracer, 1.0, {b"traceparent": given, b"tracestate": b"=\xff,,=="})
    assert trace.trace_id != TRACE
    trace.end()
    assert exporter.get_finished_spans()[-1].parent is None


def test_others_are_traced_by_ratio(tracer):
    assert begin(tracer, 0.0, {}) is None and begin(tracer, 0.0, UNSAMPLED) is None
    assert begin(tracer, 1.0, {}) is not None and begin(tracer, 1.0, UNSAMPLED).trace_id == TRACE
    tracing = Tracing(tracer, 0.25)
    taken = []
    for number in range(400):
        low = (number << 64) // 400  # evenly spread over what the decision rests on
        headers = {b"traceparent": f"00-{'1' * 16}{low | 1:016x}-{PARENT}-00".encode()}
        both = [tracing.begin("x", headers, 0.0, {}) is not None for _ in range(2)]
        assert both[0] == both[1]
        taken += both[:1]
    assert sum(taken) == 100


def test_the_spans_lie_where_the_time_went(tracer, exporter, memory):
    async def main() -> None:
        trace = begin(tracer, 1.0, {}, began=10.0)
        request = EngineRequest(asyncio.get_running_loop(), memory.place({}, {}), lambda _: None)
        request.model, request.priority, request.deadline = "m", 2, None
        request.id, request.client = 1, ""
        trace.asked(request)
        assert request.message().traced
        stages = Stages(began=1e9 + 1, launched=1e9 + 2, ended=1e9 + 12, copy_in_s=1.0, compute_s=5.0, copy_out_s=2.0)
        segment = Segment.create("test", 4096)
        try:
            request.solve(EngineAnswer(Answered(1, (), 1.0, 12.0, 3, "7", stages), segment, lambda _: None))
            await request
        finally:
            segment.close()
        trace.end()

    asyncio.run(main())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans.pop("POST /x")
    base = spans["copy-in"].start_time - 2 * 10**9

    def around(name: str) -> tuple[float, float]:
        return ((spans[name].start_time - base) / 1e9, (spans[name].end_time - base) / 1e9)

    assert around("copy-in") == pytest.approx((2, 3), abs=1e-3)
    assert around("compute") == pytest.approx((5, 10), abs=1e-3)
    assert around("copy-out") == pytest.approx((10, 12), abs=1e-3)
    assert around("queue")[1] == pytest.approx(1, abs=1e-3)
    assert {span.parent.span_id for span in spans.values()} == {request.context.span_id}
    assert spans.keys() == {"parse", "queue", "copy-in", "compute", "copy-out", "reply"}
    shown = {name: request.attributes[f"onecard.{name}"] for name in ("model", "version", "batch.rows")}
    assert shown == {"model": "m", "version": "7", "batch.rows": 3}


def test_what_is_traced_travels_with_the_messages():
    sent = Infer(3, "m", 0, (), traced=True)
    assert decode_to_engine(packet([encode(sent)])) == [sent]
    told = Answered(3, (), 0.0, 0.0, 1, "1", Stages(1.0, 2.0, 3.0, 0.5, 0.25, 0.125))
    assert decode_to_front(packet([encode(told), encode(Answered(4, (), 0.0, 0.0, 1))])) == [
        told,
        Answered(4, (), 0.0, 0.0, 1),
    ]


def ask(service: HttpService, path="/v2/models/m/infer", headers=SAMPLED, method="POST") -> Request:
    """As a connection does it, to the end of the answer."""
    request = Request(Head(method, path, "token=secret", 1, headers, 0, False, True, False, ""), "192.0.2.7", True)
    try:
        response = service.handler(request)
    except Exception as error:
        response = response_of(error, request)
    service.on_answer(request, response, 5)
    if response.on_sent is not None:
        response.on_sent()
    return request


def handler(outcome):
    def handle(request: Request) -> Response:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return handle


def test_a_request_over_http(tracer, exporter):
    released = []
    service = HttpService(handler(Response(200, on_sent=lambda: released.append(1))))
    service = traced_service(service, Tracing(tracer, 0.0))
    ask(service, headers={**SAMPLED, b"user-agent": b"curl/8", b"authorization": b"Bearer secret"})
    ask(service, "/v2/models/a%20b/versions/3/infer")
    assert released == [1, 1]
    _, plain, _, versioned = exporter.get_finished_spans()
    assert (plain.name, versioned.name) == (
        "POST /v2/models/{model}/infer",
        "POST /v2/models/{model}/versions/{version}/infer",
    )
    assert plain.attributes["http.route"] == "/v2/models/{model}/infer"
    assert plain.attributes["http.response.status_code"] == 200 and plain.status.status_code is StatusCode.UNSET
    assert (plain.attributes["url.scheme"], plain.attributes["client.address"]) == ("https", "192.0.2.7")
    assert plain.attributes["user_agent.original"] == "curl/8"
    assert versioned.attributes["onecard.model"] == "a b"
    assert "secret" not in repr([dict(span.attributes) for span in exporter.get_finished_spans()])


@pytest.mark.parametrize(
    ("path", "method"), [("/v2/health/ready", "GET"), ("/v2/models/m", "GET"), ("/v2/models/m/infer", "GET")]
)
def test_only_inference_is_traced(tracer, exporter, path, method):
    request = ask(traced_service(HttpService(handler(Response())), Tracing(tracer, 1.0)), path, method=method)
    assert request.trace is None and not exporter.get_finished_spans()


@pytest.mark.parametrize(
    ("error", "status", "told", "kind"),
    [
        (HttpError(404, "there is no model"), 404, None, None),
        (EngineError("the model failed"), 500, "the model failed", "EngineError"),
        (DeadlineError("too late"), 504, "too late", "DeadlineError"),
        (ValueError("what a client sent"), 500, "500", "ValueError"),
    ],
)
def test_errors_over_http(tracer, exporter, error, status, told, kind):
    ask(traced_service(HttpService(handler(error)), Tracing(tracer, 0.0)))
    span = exporter.get_finished_spans()[-1]
    assert span.attributes["http.response.status_code"] == status
    assert span.status.status_code is (StatusCode.UNSET if told is None else StatusCode.ERROR)
    assert (span.status.description, span.attributes.get("error.type")) == (told, kind)


def test_a_client_that_goes_away(tracer, exporter):
    waiting = SimpleNamespace()
    service = traced_service(HttpService(lambda request: waiting), Tracing(tracer, 0.0))
    request = Request(Head("POST", "/v2/models/m/infer", "", 1, SAMPLED, 0, False, True, False, ""), "192.0.2.7", False)
    assert service.handler(request) is waiting
    request.lose()
    span = exporter.get_finished_spans()[-1]
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "client_gone")
    request.trace.end()
    assert [each.name for each in exporter.get_finished_spans()] == ["parse", span.name]


@pytest.mark.parametrize("given", [{}, {b"x-request-id": b"mine"}])
def test_the_access_log_and_the_trace_name_each_other(tracer, exporter, given, caplog):
    service = HttpService(handler(Response()), on_answer=access_logger(AccessLog(1.0)))
    logger = logging.getLogger("onecard.access")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        ask(traced_service(service, Tracing(tracer, 0.0)), headers={**SAMPLED, **given})
        ask(traced_service(service, Tracing(tracer, 0.0)), headers=given)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
    traced, other = (vars(record) for record in caplog.records[:: len(caplog.records) // 2])
    span = exporter.get_finished_spans()[-1]
    assert traced["trace_id"] == TRACE and "trace_id" not in other
    assert traced["request_id"] == span.attributes["onecard.request.id"]
    assert not given or traced["request_id"] == "mine"


@pytest.mark.parametrize(
    ("error", "code", "fault"),
    [
        (None, "OK", False),
        (HttpError(404, "there is no model"), "NOT_FOUND", False),
        (DeadlineError("too late"), "DEADLINE_EXCEEDED", True),
        (ValueError("what a client sent"), "INTERNAL", True),
        (asyncio.CancelledError(), "CANCELLED", False),
    ],
)
def test_a_request_over_grpc(tracer, exporter, error, code, fault):
    caller = SimpleNamespace(headers=SAMPLED, address="192.0.2.7")
    raised = None
    try:
        with traced_call(Tracing(tracer, 0.0), "ModelInfer", caller, 0.0) as trace:
            assert trace.trace_id == TRACE
            if error is not None:
                raise error
    except BaseException as found:
        raised = found
    assert raised is error
    span = exporter.get_finished_spans()[-1]
    assert span.name == span.attributes["rpc.method"] == "inference.GRPCInferenceService/ModelInfer"
    assert (span.attributes["rpc.system.name"], span.attributes["rpc.response.status_code"]) == ("grpc", code)
    assert span.status.status_code is (StatusCode.ERROR if fault else StatusCode.UNSET)
    assert "sent" not in (span.status.description or "")


def test_an_rpc_that_is_not_traced(tracer, exporter):
    caller = SimpleNamespace(headers={}, address="192.0.2.7")
    with traced_call(Tracing(tracer, 0.0), "ModelInfer", caller, 0.0) as trace:
        assert trace is None
    assert not exporter.get_finished_spans()


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        ("http://[::1]:4318/own/path", "http://[::1]:4318/own/path"),
    ],
)
def test_where_traces_are_posted_to(endpoint, url):
    assert traces_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "grpc://x:4317", "http://", "http://x:99999", "http://[x"])
def test_an_endpoint_that_cannot_be(endpoint):
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:4318"):
        traces_url(endpoint)


@pytest.mark.parametrize("sample", [-0.1, 1.1, float("nan")])
def test_a_sample_that_cannot_be(sample):
    with pytest.raises(UsageError, match="0 to 1"):
        TraceExport(TraceOptions("http://127.0.0.1:4318", sample))


def test_without_the_package_its_cure_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'onecard\[trace\]'"):
        TraceExport(TraceOptions("http://127.0.0.1:4318", 1.0))


@pytest.fixture
def log():
    """What the server logs, as text."""
    lines: list[str] = []
    keep = logging.Handler()
    keep.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("onecard.server")
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(keep)
    logger.setLevel(level)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(180)
def test_a_collector_that_is_away_is_told_of_once(monkeypatch, log, capfd):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    port = free_port()
    export = TraceExport(TraceOptions(f"http://127.0.0.1:{port}", 1.0))

    def trace() -> None:
        export.tracing.begin("x", {}, 0.0, {}).end()
        export._provider.force_flush()

    async def main() -> list:
        for _ in range(3):
            trace()
        assert [line for line in log if "delivered" in line] == log and len(log) == 1
        assert f"127.0.0.1:{port}" in log[0]
        collector = Collector(port)
        exporter = export._exporter._exporter
        for part in (exporter, getattr(exporter, "_client", None)):  # some releases keep it here, some there
            if hasattr(part, "_timeout"):
                part._timeout = 60.0  # the collector of a busy machine takes its time
        try:
            trace()
            trace()
            export.tracing.begin("last", {}, 0.0, {}).end()
            await export.close(60.0)
            return collector.spans
        finally:
            collector.close()

    spans = asyncio.run(main())
    assert len(log) == 2 and "again; 6 spans" in log[1]
    assert [span.name for span in spans] == ["parse", "x", "parse", "x", "parse", "last"]
    assert {span.service for span in spans} == {"mine"}
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.timeout(180)
def test_why_a_collector_takes_nothing_is_told(log):
    collector = Collector(status=404)
    try:
        export = TraceExport(TraceOptions(f"http://127.0.0.1:{collector.port}/wrong", 1.0))
        export.tracing.begin("x", {}, 0.0, {}).end()
        asyncio.run(export.close(60.0))
    finally:
        collector.close()
    assert len(log) == 1 and "404" in log[0] and collector.paths == {"/wrong"}


@pytest.mark.timeout(180)
def test_the_end_does_not_wait_for_a_collector_that_hangs(log):
    """It accepts and never answers: the exporter would wait 10 s, and the SDK 30."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        export = TraceExport(TraceOptions(f"http://127.0.0.1:{silent.getsockname()[1]}", 1.0))
        export.tracing.begin("x", {}, 0.0, {}).end()

        async def close() -> float:
            loop = asyncio.get_running_loop()
            began = loop.time()
            await export.close(0.2)
            return loop.time() - began

        assert asyncio.run(close()) < 5
    assert "could not be delivered within 0.2 s" in log[0]


def test_a_number_of_spans_beyond_what_waits_does_no_harm(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    export = TraceExport(TraceOptions(f"http://127.0.0.1:{free_port()}", 1.0))
    for _ in range(100):
        export.tracing.begin("x", {}, 0.0, {}).end()
    asyncio.run(export.close(5.0))


def test_an_sdk_that_is_switched_off_traces_nothing(monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    export = TraceExport(TraceOptions("http://127.0.0.1:4318", 1.0))
    assert export.tracing.begin("x", SAMPLED, 0.0, {}) is None
    asyncio.run(export.close(1.0))


def test_an_exporters_variables_that_cannot_be_are_told(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(UsageError, match="OTEL_"):
        TraceExport(TraceOptions("http://127.0.0.1:4318", 1.0))


def test_a_request_that_is_not_traced_does_not_ask_for_times(memory):
    async def main() -> Infer:
        arrays = {"x": np.zeros(4, np.float32)}
        request = EngineRequest(asyncio.get_running_loop(), memory.place(arrays, {"x": "float32"}), lambda _: None)
        request.model, request.priority, request.client, request.deadline = "m", 2, "", None
        message = request.message()
        request.let_go()
        return message

    assert asyncio.run(main()).traced is False
