"""A server that is sent eight thousand requests over gRPC, most of them damaged, and connections that are no gRPC."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")

from tests.attacks.fuzz_grpc import DRAIN_S, Fuzzer, fuzz, fuzzed_server  # noqa: E402
from tests.attacks.fuzz_grpc_cases import DOCUMENTED, make_case  # noqa: E402
from tests.attacks.fuzz_grpc_frames import RawCase  # noqa: E402
from tests.attacks.fuzz_grpc_words import UNTOLD, method  # noqa: E402
from tests.attacks.fuzz_http import grew, held  # noqa: E402
from tests.attacks.grpc_wire import (  # noqa: E402
    END_HEADERS,
    HEADERS,
    call,
    fault_of_message,
    frame,
    infer_message,
    integer,
    literal,
    read_frames,
)
from tests.attacks.loops import run  # noqa: E402

pytestmark = pytest.mark.timeout(400)
ONE_CALL = {"good", "bytes", "odd", "region", "large", "method", "unknown", "control", "health", "metadata", "late"}
STREAMS = {"watch", "stream"}
FRAMES = {"garbage", "cut off", "mutated", "harmless", "slow", "prefix", "fields", "frames", "flood", "several"}


def test_a_fuzzed_server_stays_what_it_was(tmp_path):
    with fuzzed_server() as (server, prefix):
        fuzzer = Fuzzer(server.grpc_port, 3, prefix, tmp_path)
        before, after = fuzz(server, fuzzer, requests=8_000, warm_up=2_000)
        found = fuzzer.findings
        assert not found.faults, "\n".join(found.faults)
        assert found.requests >= 8_000 and found.good >= 14
        assert set(found.statuses) <= DOCUMENTED
        assert found.statuses["OK"] > 1_000 and found.statuses["INVALID_ARGUMENT"] > 2_000
        assert set(found.kinds) >= ONE_CALL | STREAMS | FRAMES
        assert {outcome.partition(": ")[0] for outcome in found.frames} >= FRAMES
        assert not grew(before, after), (before, after)
        refuse_often(server.grpc_port)
        assert not grew(after, held(server, after.descriptors)), "what is refused again and again is kept"
        began = time.monotonic()
        assert server.end(DRAIN_S + 30) == 0
        assert time.monotonic() - began < DRAIN_S, "a call was left open"
        assert "Traceback" not in server.output
        assert "hpack" not in server.output, "any client could fill the log"


def refuse_often(port: int) -> None:
    """Calls that are not taken, for reasons that never change."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [channel.unary_unary(method(name)) for name in UNTOLD]
        for _ in range(20):
            refused = [call.future(b"").code() for call in calls for _ in range(50)]
            assert set(refused) == {grpc.StatusCode.UNIMPLEMENTED}


def test_a_case_is_made_of_its_seed_and_number_alone():
    assert [make_case(1, n, "p") for n in range(300)] == [make_case(1, n, "p") for n in range(300)]
    assert make_case(1, 5, "p") != make_case(2, 5, "p")


def test_frames_are_read_as_they_are_written():
    message = infer_message(7, 2)
    received = read_frames(b"".join(call(message, 3)) + frame(HEADERS, END_HEADERS, 3, b"cut off")[:-1])
    assert [(kind, stream) for kind, _, stream, _ in received.frames] == [(1, 3), (0, 3)]
    assert (received.message(3), received.message(1)) == (message, b"")
    assert received.ended(3) and not received.ended(1)
    trailers = frame(HEADERS, END_HEADERS, 1, literal(b"grpc-status", b"13"))
    assert read_frames(trailers).status() == 13
    assert (integer(10, 5), integer(1337, 5)) == (b"\x0a", b"\x1f\x9a\x0a")  # RFC 7541, C.1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda request, context: context.abort(grpc.StatusCode.INTERNAL, "oh"), "got INTERNAL"),
        (lambda request, context: 1 / 0, "got UNKNOWN"),
        (lambda request, context: time.sleep(1.5), "no answer within"),
        (lambda request, context: request, "should be"),  # the id is right, the rest is the request
        (lambda request, context: infer_message(999_999), "has the id"),
    ],
)
def test_a_bad_server_is_found_out(tmp_path, monkeypatch, answer, words):
    limit_s = 0.5 if words == "no answer within" else 4.0  # what shall come must come, also on a machine that stalls
    for module in ("fuzz_grpc", "fuzz_grpc_peer"):
        monkeypatch.setattr(f"tests.attacks.{module}.LIMIT_S", limit_s)
    with answering(answer) as port:
        fuzzer = Fuzzer(port, 1, "p", tmp_path, at_once=8)
        run(fuzzer.run(60))
    assert any(words in fault for fault in fuzzer.findings.faults), fuzzer.findings
    assert list(tmp_path.glob("grpc-1-*.txt"))


def test_an_answer_to_another_is_seen():
    case = next(
        c for c in (make_case(1, n, "p") for n in range(1000)) if isinstance(c, RawCase) and c.wanted == "right"
    )
    assert case.kind in FRAMES
    assert "has the id" in fault_of_message(infer_message(5), 6, 1)
    assert "should be" in fault_of_message(infer_message(5), 5, 1)


@contextlib.contextmanager
def answering(answer: Callable[[bytes, Any], Any]) -> Iterator[int]:
    """A server of another make that answers all calls in the same way."""

    class Same(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), handlers=[Same()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()
