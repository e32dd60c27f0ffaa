"""Connections over real sockets: framing, order, refusals, timeouts, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import struct
import threading
import time
import zlib

import pytest

from onecard.errors import QueueFullError, SpecError
from onecard.server.http_types import HttpError, HttpLimits, HttpService, Response
from tests.unit.server.http_peers import LOOPS, QUICK, Reader, ask, chunked, echo, get, patient, post, running, until


@pytest.fixture(scope="module", params=LOOPS)
def echoing(request):
    with running(echo, HttpLimits(max_body_bytes=1_000_000, linger_s=60), loop=request.param) as server:
        yield server


def test_a_request_and_its_answer(echoing):
    answer = ask(echoing, get("/a?b=c"))
    assert (answer.status, answer.body) == (200, b"GET /a b=c ")
    assert answer.headers["content-type"] == "text/plain"
    assert "connection" not in answer.headers
    assert answer.headers["date"].endswith("GMT")


def test_large_bodies_come_and_go_whole(echoing):
    with echoing.connect() as peer:
        reader = Reader(peer)
        for size in (1, 16_383, 16_384, 100_000, 999_999):
            body = bytes(range(256)) * (size // 256 + 1)
            sender = threading.Thread(target=peer.sendall, args=(post(body[:size]),))
            sender.start()
            assert reader.answer().body == b"POST /  " + body[:size]
            sender.join()


@pytest.mark.parametrize("request_bytes", [post(b"hello\r\n\r\n"), chunked(b"hel", b"lo"), b"\r\n" + get("/x")])
def test_every_split_of_a_request(echoing, request_bytes):
    with echoing.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = Reader(peer)
        peer.sendall(request_bytes)
        whole = reader.answer().body
        for cut in range(1, len(request_bytes)):
            peer.sendall(request_bytes[:cut])
            time.sleep(0.001)
            peer.sendall(request_bytes[cut:])
            assert reader.answer().body == whole


def test_byte_by_byte(echoing):
    with echoing.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in chunked(b"abc", b"d", trailer=b"A: b\r\n"):
            peer.sendall(bytes([byte]))
            time.sleep(0.0005)
        assert Reader(peer).answer().body == b"POST /c  abcd"


def test_pipelined_answers_come_in_order(echoing):
    with echoing.connect() as peer:
        peer.sendall(b"".join(post(b"%d" % number, f"/{number}") for number in range(200)))
        reader = Reader(peer)
        for number in range(200):
            assert reader.answer().body == b"POST /%d  %d" % (number, number)


def test_head_has_the_length_but_no_body(echoing):
    with echoing.connect() as peer:
        peer.sendall(b"HEAD /abc HTTP/1.1\r\nHost: a\r\n\r\n" + get("/next"))
        reader = Reader(peer)
        assert reader.answer("HEAD").headers["content-length"] == "11"
        assert reader.answer().body == b"GET /next  "


def test_connection_close_and_http_1_0(echoing):
    for request, field in [
        (get("/", "Connection: close"), "close"),
        (b"GET / HTTP/1.0\r\n\r\n", "close"),
        (post(b"x", "/", "Connection: close") + get("/never"), "close"),
    ]:
        with echoing.connect() as peer:
            peer.sendall(request)
            reader = Reader(peer)
            assert reader.answer().headers["connection"] == field
            assert reader.at_end()
    with echoing.connect() as peer:
        reader = Reader(peer)
        for _ in range(2):
            peer.sendall(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
            assert reader.answer().headers["connection"] == "keep-alive"


def test_100_continue(echoing):
    with echoing.connect() as peer:
        reader = Reader(peer)
        peer.sendall(post(b"", "/", "Expect: 100-continue").replace(b"Length: 0", b"Length: 3"))
        assert reader.answer().status == 100
        peer.sendall(b"abc")
        assert reader.answer().body == b"POST /  abc"
        peer.sendall(chunked(b"").partition(b"\r\n\r\n")[0] + b"\r\nExpect: 100-continue\r\n\r\n")
        assert reader.answer().status == 100
        peer.sendall(b"1\r\nx\r\n0\r\n\r\n")
        assert reader.answer().body == b"POST /c  x"
        peer.sendall(post(b"here", "/", "Expect: 100-continue"))  # nothing is asked for that has come already
        assert reader.answer().body == b"POST /  here"


def test_no_100_before_the_answers_to_what_came_before():
    release = threading.Event()

    async def handler(request):
        while request.path == "/slow" and not release.is_set():
            await asyncio.sleep(0.005)
        return echo(request)

    with running(handler) as server, server.connect() as peer:
        head = post(b"", "/", "Expect: 100-continue").replace(b"Length: 0", b"Length: 1")
        peer.sendall(get("/slow") + head)
        peer.settimeout(0.1)
        with pytest.raises(TimeoutError):
            peer.recv(1)
        peer.settimeout(30)
        release.set()
        reader = Reader(peer)
        assert reader.answer().body == b"GET /slow  "
        assert reader.answer().status == 100
        peer.sendall(b"x")
        assert reader.answer().body == b"POST /  x"


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("gzip", gzip.compress(b"hello" * 1000)),
        ("GZIP", gzip.compress(b"hello" * 500) + gzip.compress(b"hello" * 500)),
        ("deflate", zlib.compress(b"hello" * 1000)),
        ("deflate", raw_deflate(b"hello" * 1000)),
        ("identity", b"hello" * 1000),
    ],
    ids=["gzip", "two gzip members", "zlib", "raw deflate", "identity"],
)
def test_compressed_bodies(echoing, name, packed):
    assert ask(echoing, post(packed, "/", f"Content-Encoding: {name}")).body == b"POST /  " + b"hello" * 1000
    coded = chunked(packed[:7], packed[7:]).replace(b"Host: test", f"Host: a\r\nContent-Encoding: {name}".encode())
    assert ask(echoing, coded).body == b"POST /c  " + b"hello" * 1000


def test_compressed_bodies_that_are_refused(echoing):
    whole = gzip.compress(b"hello")
    with echoing.connect() as peer:
        reader = Reader(peer)
        for packed, status in [
            (whole[:-3], 400),
            (whole + b"junk", 400),
            (b"junk", 400),
            (gzip.compress(b"") * 200, 400),
            (gzip.compress(bytes(1_000_001)), 413),
            (gzip.compress(bytes(999_999)) * 2, 413),
        ]:
            peer.sendall(post(packed, "/", "Content-Encoding: gzip") + get("/next"))
            refusal = reader.answer()
            assert refusal.status == status
            assert "error" in json.loads(refusal.body)
            assert reader.answer().body == b"GET /next  "  # where the body ended was known


def test_a_refusal_is_json_and_ends_the_connection(echoing):
    for request, status in [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /" + b"a" * 20_000, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 16_380 + b"\r\n\r\n", 431),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (chunked(b"abc").replace(b"3\r\n", b"3\n"), 400),
        (chunked(b"abc").replace(b"3\r\n", b"fffffff\r\n"), 413),
        (post(b"", "/", "Content-Length: 0"), 400),
        (post(b"").replace(b"Length: 0", b"Length: 99999999") + b"x" * 300_000, 413),
    ]:
        with echoing.connect() as peer:
            peer.sendall(get("/before") + request)
            reader = Reader(peer)
            assert reader.answer().body == b"GET /before  "
            refusal = reader.answer()
            assert refusal.status == status, request[:100]
            assert refusal.headers["connection"] == "close"
            assert isinstance(json.loads(refusal.body)["error"], str)
            peer.sendall(get("/after"))
            assert reader.at_end()


def test_a_smuggled_request_is_not_answered(echoing):
    inner = get("/smuggled")
    for outer in (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % len(inner),
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(inner),
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nX: y\r\n Content-Length: 5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nX: y\nContent-Length: 5\r\n\r\n",
    ):
        with echoing.connect() as peer:
            peer.sendall(outer + inner)
            reader = Reader(peer)
            assert reader.answer().status == 400
            assert reader.at_end()


def test_errors_of_handlers(caplog):
    def handler(request):
        raise {
            "/http": HttpError(404, "no such model", [(b"X-A", b"b")]),
            "/spec": SpecError("image is of the wrong dtype.", "Send float32."),
            "/full": QueueFullError("full", retry_after_s=1.2),
            "/other": RuntimeError("a secret"),
        }[request.path]

    async def later(request):
        await asyncio.sleep(0)
        return handler(request)

    for service in (handler, later):
        with running(service) as server, server.connect() as peer:
            reader = Reader(peer)
            peer.sendall(get("/http") + get("/spec") + get("/full") + get("/other", "X-Request-Id: r-1"))
            missing, wrong, full, other = (reader.answer() for _ in range(4))
        assert (missing.status, missing.headers["x-a"]) == (404, "b")
        assert json.loads(wrong.body) == {"error": "image is of the wrong dtype. Send float32."}
        assert (full.status, full.headers["retry-after"]) == (429, "2")
        assert (other.status, other.headers["x-request-id"]) == (500, "r-1")
        assert b"secret" not in other.body
        [record] = caplog.get_records("call")
        assert record.name == "onecard.server"
        assert "r-1" in record.message
        assert "a secret" in str(record.exc_info[1])
        caplog.clear()


def test_a_handler_that_answers_nonsense_is_a_500(caplog):
    released = []

    async def handler(request):
        return {
            "/none": None,
            "/split": Response(200, [(b"X", b"a\r\nSet-Cookie: b")], on_sent=lambda: released.append(1)),
            "/status": Response(299),
            "/body": Response(200, (), ["text"]),
        }[request.path]

    with running(handler) as server, server.connect() as peer:
        reader = Reader(peer)
        for path in ("/none", "/split", "/status", "/body"):
            peer.sendall(get(path))
            assert reader.answer().status == 500
    assert released == [1]
    assert len(caplog.records) == 4


def test_a_handler_may_return_what_cannot_be_awaited(caplog):
    with running(lambda request: 5) as server:
        assert ask(server, get()).status == 500


def test_the_order_holds_when_later_ones_are_ready_first():
    started = []

    async def handler(request):
        started.append(request.path)
        await asyncio.sleep(0.05 / (1 + int(request.path[1:])))
        return echo(request)

    with running(handler) as server, server.connect() as peer:
        reader = Reader(peer)
        peer.sendall(b"".join(get(f"/{number}") for number in range(10)))
        assert [reader.answer().body for _ in range(10)] == [b"GET /%d  " % number for number in range(10)]


def test_no_more_than_max_pipeline_are_handled_at_once():
    at_once, most = 0, 0
    handled: list[str] = []

    async def handler(request):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        while most < 4:  # however slowly they come
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05 if len(handled) < 4 else 0.002)  # time for a fifth one, if it were let in
        handled.append(request.path)
        at_once -= 1
        return echo(request)

    with running(handler, HttpLimits(max_pipeline=4)) as server, server.connect() as peer:
        reader = Reader(peer)
        body = b"b" * 5000
        sender = threading.Thread(
            target=peer.sendall, args=(b"".join(post(body, f"/{number}") for number in range(100)),)
        )
        sender.start()
        for number in range(100):
            assert reader.answer().body == b"POST /%d  %b" % (number, body)
        sender.join()
    assert most == 4


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_leaves_cancels_its_handler(loop):
    events: list[str] = []
    over = threading.Event()

    async def handler(request):
        request.on_gone(lambda: events.append("gone"))
        try:
            events.append("began")
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            events.append("cancelled")
            over.set()
            raise

    with running(handler, loop=loop) as server:
        for way in ("close", "reset", "half"):
            events.clear()
            over.clear()
            peer = server.connect()
            peer.sendall(get())
            while "began" not in events:
                time.sleep(0.001)
            if way == "reset":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if way == "half":
                peer.shutdown(socket.SHUT_WR)
                assert Reader(peer).at_end()
            peer.close()
            assert over.wait(30)
            assert events == ["began", "gone", "cancelled"]


def test_a_client_that_leaves_within_a_body_is_told_to_the_allocator():
    gone = threading.Event()

    def allocate(request, length):
        request.on_gone(gone.set)
        return memoryview(bytearray(length))

    with running(HttpService(echo, allocate)) as server:
        peer = server.connect()
        peer.sendall(post(b"abc")[:-1])
        time.sleep(0.05)
        assert not gone.is_set()
        peer.close()
        assert gone.wait(30)


def test_bodies_are_received_in_the_allocators_memory():
    arena = bytearray(1000)
    seen = []

    def allocate(request, length):
        seen.append((request.path, length))
        return memoryview(arena)[100 : 100 + length]

    def handler(request):
        assert request.body.obj is arena
        return echo(request)

    with running(HttpService(handler, allocate)) as server, server.connect() as peer:
        reader = Reader(peer)
        packed = post(gzip.compress(b"zipped"), "/z", "Content-Encoding: gzip")
        for request, content in [(post(b"x" * 900), b"x" * 900), (chunked(b"ab", b"c"), b"abc"), (packed, b"zipped")]:
            peer.sendall(request)
            assert reader.answer().body.endswith(content)
            assert arena[100 : 100 + len(content)] == content
    assert seen == [("/", 900), ("/c", 3), ("/z", 6)]


@pytest.mark.parametrize("where", ["admit", "allocator"])
def test_what_is_refused_before_its_body(where):
    def refuse(request, length=0):
        if request.path != "/good":
            raise QueueFullError("full", retry_after_s=3)
        return memoryview(bytearray(length))

    service = HttpService(echo, refuse) if where == "allocator" else HttpService(echo, admit=refuse)
    with running(service, patient()) as server:
        with server.connect() as peer:  # a small body is read past: the connection goes on
            reader = Reader(peer)
            for body in (b"small", b"y" * 100_000):
                peer.sendall(post(body) + post(b"z", "/good"))
                assert reader.answer().status == 429
                assert reader.answer().body == b"POST /good  z"
            if where == "allocator":  # known only when it is whole
                peer.sendall(chunked(b"abc") + post(b"z", "/good"))
                assert reader.answer().status == 429
                assert reader.answer().body == b"POST /good  z"
        with server.connect() as peer:  # who asks first is answered, and need not send it
            reader = Reader(peer)
            peer.sendall(post(b"", "/", "Expect: 100-continue").replace(b"Length: 0", b"Length: 9"))
            refusal = reader.answer()
            assert (refusal.status, refusal.headers["connection"]) == (429, "close")
            assert reader.at_end()
        with server.connect() as peer:
            reader = Reader(peer)
            peer.sendall(post(b"z" * 5_000_000))
            assert reader.answer().headers["connection"] == "close"


def test_a_refused_body_that_stops_coming_ends_the_connection_without_a_second_answer():
    def refuse(request):
        raise HttpError(404, "no such model")

    with running(HttpService(echo, admit=refuse), patient(body_timeout_s=0.3)) as server, server.connect() as peer:
        peer.sendall(post(b"abc")[:-1])
        reader = Reader(peer)
        refusal = reader.answer()
        assert (refusal.status, refusal.headers.get("connection")) == (404, None)
        assert reader.at_end()


def test_timeouts():
    with running(echo, patient(head_timeout_s=0.3, body_timeout_s=0.3, linger_s=0.3)) as server:
        for sent, status in [
            (b"GET / HTT", 408),
            (b"GET / HTTP/1.1\r\nHost: a\r\n", 408),
            (post(b"abc")[:-1], 408),
            (chunked(b"abc")[:-3], 408),
            (post(b"abc")[:-3], 408),
        ]:
            with server.connect() as peer:
                peer.sendall(sent)
                reader = Reader(peer)
                assert reader.answer().status == status
                assert reader.at_end()
    with running(echo, patient(idle_timeout_s=0.4)) as server:  # at rest: closed without a word
        with server.connect() as peer:
            assert Reader(peer).at_end()

        def answered_and_then_closed():
            with server.connect() as peer, contextlib.suppress(ConnectionError):
                peer.sendall(get())
                reader = Reader(peer)
                if not reader.more():  # the machine stood still, and its time was over before it asked
                    return False
                assert reader.answer().status == 200
                return reader.at_end()
            return False

        assert until(answered_and_then_closed)


def test_memory_of_a_body_given_up_is_not_written_again():
    arena = bytearray(100_000)
    gone = threading.Event()

    def allocate(request, length):
        request.on_gone(gone.set)
        return memoryview(arena)[:length]

    with running(HttpService(echo, allocate), patient(body_timeout_s=0.3)) as server, server.connect() as peer:
        peer.sendall(post(b"a" * 100_000)[:-50_000])
        assert gone.wait(30)
        before = bytes(arena)
        peer.sendall(b"b" * 50_000)
        assert Reader(peer).answer().status == 408
        assert arena == before


def test_slow_heads_and_bodies_are_cut_off_though_something_always_comes():
    with running(echo, patient(head_timeout_s=0.3, body_timeout_s=0.3)) as server:
        for first, drop in [(b"GET / HTTP/1.1\r\nX: ", b"a"), (post(b"a" * 100)[:-100], b"a")]:
            with server.connect() as peer:
                peer.sendall(first)
                peer.settimeout(0.02)
                answer = b""
                for _ in range(1000):
                    try:
                        answer = peer.recv(100)
                        break
                    except TimeoutError:
                        peer.sendall(drop)
                assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_slow_handler_is_not_a_timeout():
    began = []

    async def handler(request):
        began.append(request.path)
        await asyncio.sleep(1)
        return echo(request)

    with running(handler, QUICK) as server:

        def answered():
            with server.connect() as peer:
                reader = Reader(peer)
                with contextlib.suppress(ConnectionError):
                    peer.sendall(get())
                if not reader.more():  # the machine stood still, and its time was over before it asked
                    assert not began
                    return False
                assert reader.answer().status == 200
                return True

        assert until(answered)


@pytest.mark.parametrize("loop", LOOPS)
def test_who_reads_no_answer_is_cut_off_though_who_is_at_rest_is_not(loop):
    released: list[str] = []

    def handler(request):
        return Response(200, (), [memoryview(bytes(20_000_000))], on_sent=lambda: released.append(request.path))

    with running(handler, patient(write_timeout_s=0.4), loop=loop) as server, server.connect() as peer:
        peer.sendall(get())
        assert until(lambda: released == ["/"])


@pytest.mark.parametrize("loop", LOOPS)
def test_buffers_are_released_once_sent(loop):
    asked: list[str] = []
    released: list[str] = []
    big = bytes(20_000_000)

    def handler(request):
        asked.append(request.path)
        body = big if request.path == "/big" else b"small"
        return Response(200, (), [memoryview(body)], on_sent=lambda: released.append(request.path))

    with running(handler, loop=loop) as server:
        with server.connect() as peer:
            reader = Reader(peer)
            peer.sendall(get("/small"))
            reader.answer()
            assert until(lambda: released == ["/small"])
            peer.sendall(get("/big") + get("/after"))
            time.sleep(0.1)
            assert released == ["/small"]  # unsent, so still in use; and the next one waits
            assert len(reader.answer().body) == len(big)
            reader.answer()
            assert until(lambda: released == ["/small", "/big", "/after"])
            peer.sendall(get("/big"))
            assert until(lambda: asked.count("/big") == 2)
        assert until(lambda: len(released) == 4)  # the client left
        assert released == ["/small", "/big", "/after", "/big"]


def test_the_clock_of_a_body_starts_when_it_is_asked_for():
    over = 0.0

    async def handler(request):
        nonlocal over
        if request.path == "/slow":
            await asyncio.sleep(1)
            over = time.monotonic()
        return echo(request)

    limits = patient(body_timeout_s=0.3)
    with running(handler, limits) as server:

        def comes_in_time():
            with server.connect() as peer:
                head = post(b"", "/", "Expect: 100-continue").replace(b"Length: 0", b"Length: 1")
                peer.sendall(get("/slow") + head)
                reader = Reader(peer)
                assert [reader.answer().status, reader.answer().status] == [200, 100]
                peer.sendall(b"x")
                answer = reader.answer()
                # A machine that stood still has brought it too late.
                assert answer.status == 200 or time.monotonic() - over >= limits.body_timeout_s
                return answer.body == b"POST /  x"

        assert until(comes_in_time)


def test_who_reads_nothing_is_cut_off():
    asked, released = threading.Event(), threading.Event()

    def handler(request):
        asked.set()
        return Response(200, (), [bytes(20_000_000)], on_sent=released.set)

    with running(handler, QUICK) as server, contextlib.ExitStack() as peers:
        while not asked.is_set():  # a machine that stood still: its time was over before it asked
            peer = peers.enter_context(server.connect())
            with contextlib.suppress(ConnectionError):
                peer.sendall(get())
            asked.wait(1)
        assert released.wait(30)
        assert until(lambda: server.server.connections == 0)


def test_bodies_in_many_buffers_of_any_kind():
    import numpy as np

    parts = [
        b"a",
        bytearray(b"bc"),
        b"",
        memoryview(np.arange(3, dtype=np.int32)),
        memoryview(np.empty((0, 2))),
        np.empty((2, 0)).data,
    ]
    with running(lambda request: Response(200, (), parts)) as server:
        assert ask(server, get()).body == b"abc" + np.arange(3, dtype=np.int32).tobytes()


def test_nothing_is_logged_for_bad_bytes(caplog):
    with running(echo) as server:
        ask(server, b"\0\1\2")
        with server.connect() as peer:
            peer.sendall(post(b"abc")[:-1])
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
