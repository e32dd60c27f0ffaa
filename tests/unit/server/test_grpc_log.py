"""RPCs in the access log: all of them, or those that the server failed, whatever their way to end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from types import SimpleNamespace

import pytest

from onecard.errors import DeadlineError, DeviceMemoryError, EngineError, QueueFullError
from onecard.server.grpc_limits import GrpcLimits, GrpcListen
from onecard.server.grpc_server import serve_grpc
from onecard.server.http_types import HttpError
from onecard.server.logs import AccessLog
from tests.unit.server.grpc_faces import Running, echo_face

grpc = pytest.importorskip("grpc", reason="needs grpcio")
pytestmark = pytest.mark.timeout(180)
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@contextlib.contextmanager
def serving(face, sample, tracing=None, **limits):
    """A server with an access log, and a channel to it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made = serve_grpc(face, GrpcListen(port=0), GrpcLimits(**limits), tracing, AccessLog(sample))
    running = Running(asyncio.run_coroutine_threadsafe(made, loop).result(30), loop)
    try:
        with grpc.insecure_channel(running.url) as channel:
            yield channel
    finally:
        running.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@pytest.fixture
def logged(caplog):
    """Waits for so many entries of the access log, and says that there are no more."""
    caplog.set_level(logging.INFO, "onecard.access")

    def wait(count):
        end = time.monotonic() + 30
        while True:
            found = [record for record in caplog.records if record.name == "onecard.access"]
            if len(found) >= count or time.monotonic() > end:
                assert len(found) == count
                return found
            time.sleep(0.005)

    return wait


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def request(value=1.0, model="echo", request_id=""):
    import numpy as np

    from onecard.server.grpc_messages import inference_messages

    raw = [np.full((1, 3), value, np.float32).tobytes()]
    message = inference_messages()["ModelInferRequest"](model_name=model, id=request_id, raw_input_contents=raw)
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    return message.SerializeToString()


def refused(call):
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code().name


def test_an_entry_tells_of_its_rpc(logged):
    asked = request()
    with serving(echo_face(), 1) as channel:
        answer = channel.unary_unary(INFER)(asked, metadata=[("x-request-id", "mine")])
        channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"")
        channel.unary_unary("/inference.GRPCInferenceService/ModelReady")(b"\x0a\x04echo")
        first, second, third = logged(3)
    assert (first.method, first.path, first.status, first.levelname) == ("ModelInfer", INFER, 200, "INFO")
    assert (first.bytes_in, first.bytes_out, first.client) == (len(asked), len(answer), "127.0.0.1")
    assert (first.model, first.request_id) == ("echo", "mine") and 0 < first.ms < 10_000
    assert (second.method, second.model, third.method, third.model) == ("ServerLive", None, "ModelReady", "echo")
    assert second.request_id != third.request_id


ENDS = [
    (HttpError(400, "no"), "INVALID_ARGUMENT", 400),
    (HttpError(401, "no"), "UNAUTHENTICATED", 401),
    (HttpError(404, "no"), "NOT_FOUND", 404),
    (QueueFullError("no"), "RESOURCE_EXHAUSTED", 429),
    (HttpError(503, "no"), "UNAVAILABLE", 503),
    (DeadlineError("no"), "DEADLINE_EXCEEDED", 504),
    (EngineError("no"), "INTERNAL", 500),
    (RuntimeError("no"), "INTERNAL", 500),
    (DeviceMemoryError("no"), "RESOURCE_EXHAUSTED", 507),
]


@pytest.mark.parametrize(("error", "code", "status"), ENDS)
@pytest.mark.parametrize("sample", [0, 1])
def test_what_the_server_failed_is_always_there(logged, error, code, status, sample):
    face = echo_face()
    face.refusal = error
    with serving(face, sample) as channel:
        assert refused(lambda: channel.unary_unary(INFER)(request())) == code
        face.refusal = None
        channel.unary_unary(INFER)(request())
        found = [(record.status, record.levelname) for record in logged(2 * sample or int(status >= 500))]
    expected = [(status, "WARNING" if status >= 500 else "INFO"), (200, "INFO")]
    assert found == (expected if sample else [each for each in expected if each[0] >= 500])


def test_a_deadline_that_passed_is_the_server_s_failure_and_a_client_that_left_is_not(logged, caplog):
    for patience_s in (0.2, 10.0):  # on a machine that stands still, it may pass before the server hears of the RPC
        face = echo_face()
        caplog.clear()
        with serving(face, 0) as channel:
            channel.unary_unary(INFER)(request())  # the connection is there now
            late_call = functools.partial(channel.unary_unary(INFER), request(-1), timeout=patience_s)
            assert refused(late_call) == "DEADLINE_EXCEEDED"
            if len(face.asked) == 2:
                (late,) = logged(1)
                break
    assert (late.status, late.model, late.bytes_out) == (504, "echo", 0)
    face = echo_face()
    with serving(face, 1) as channel:
        call = channel.unary_unary(INFER).future(request(-1))
        wait_for(lambda: face.asked)
        call.cancel()
        assert logged(2)[1].status == 499


def test_rpcs_that_no_method_answers(logged):
    face = echo_face()
    with serving(face, 1, max_rpcs=1) as channel:
        assert (
            refused(lambda: channel.unary_unary("/inference.GRPCInferenceService/" + "x" * 600)(b"")) == "UNIMPLEMENTED"
        )
        waiting = channel.unary_unary(INFER).future(request(-1))
        wait_for(lambda: face.asked)
        assert refused(lambda: channel.unary_unary(INFER)(request())) == "RESOURCE_EXHAUSTED"
        waiting.cancel()
        unknown, many, left = logged(3)
    assert (unknown.status, len(unknown.method), len(unknown.path)) == (404, 128, 515)
    assert (many.status, many.method, left.status) == (429, "ModelInfer", 499)


def test_requests_of_a_stream_are_there_and_then_the_stream(logged):
    asked = [request(), request(model="m" * 1000), request()]
    with serving(echo_face(), 1) as channel:
        answers = list(channel.stream_stream(STREAM)(iter(asked)))
        *requests, stream = sorted(logged(4), key=lambda record: (record.model is None, record.status))
    assert [(each.model, each.status) for each in requests] == [("echo", 200), ("echo", 200), ("m" * 128, 404)]
    assert [each.bytes_out for each in requests] == [len(answers[0]), len(answers[2]), len(answers[1])]
    assert {each.method for each in (*requests, stream)} == {"ModelStreamInfer"}
    assert (stream.status, stream.model, stream.client) == (200, None, "127.0.0.1")
    assert (stream.bytes_in, stream.bytes_out) == (sum(map(len, asked)), sum(map(len, answers)))


class Tracing:
    """Begins traces that nobody collects."""

    def __init__(self):
        self.count = 0

    def begin(self, *told):
        self.count += 1
        done = dict.fromkeys(("asked", "failed", "set", "end"), lambda *told: None)
        return SimpleNamespace(**done, request_id=f"r{self.count}", trace_id=f"t{self.count}")


def test_an_entry_has_the_ids_of_its_trace(logged):
    with serving(echo_face(), 1, Tracing()) as channel:
        channel.unary_unary(INFER)(request(), metadata=[("x-request-id", "mine")])
        list(channel.stream_stream(STREAM)(iter([request(), request()])))
        unary, *streamed = logged(4)
    assert (unary.request_id, unary.trace_id) == ("r1", "t1")
    assert [getattr(each, "trace_id", None) for each in streamed] == ["t2", "t3", None]


def test_a_request_of_a_stream_that_the_server_failed_is_always_there(logged):
    face = echo_face()
    face.refusal = EngineError("no")
    with serving(face, 0) as channel:
        list(channel.stream_stream(STREAM)(iter([request()])))
        (failed,) = logged(1)
    assert (failed.status, failed.model) == (500, "echo")
