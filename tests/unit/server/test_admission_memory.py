"""Bodies in chunks and compressed ones: together they are bounded, and every end of one gives back what it had."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import socket
import struct
import threading

import pytest

from onecard.server import http_bodies
from onecard.server.http_held import Held
from onecard.server.http_types import HttpError, HttpLimits, HttpService, Response
from tests.unit.server.http_peers import LOOPS, Reader, Running, ask, chunked, echo, patient, post, running, until

MOST = 1_000_000
LIMITS = HttpLimits(max_body_bytes=900_000, max_held_bytes=MOST)
GZIP = "Content-Encoding: gzip"
FULL = {"error": "too many requests are held in memory; come back later."}
NOISE = os.urandom(600_000)
CHUNKS = b"POST /c HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"

pytestmark = pytest.mark.timeout(180)


def held(server: Running) -> int:
    return server.server._shared.held.nbytes


def nothing_held(server: Running) -> bool:
    return until(lambda: held(server) == 0)


def begun(server: Running, head: bytes, body: bytes) -> socket.socket:
    """A connection on which a body has begun, all of it that was sent being there."""
    before = held(server)
    peer = server.connect()
    peer.sendall(head + body)
    assert until(lambda: held(server) > before + len(body) - 100)
    return peer


def in_chunks(body: bytes) -> bytes:
    return b"%x\r\n" % (len(body) + 1000) + body


def compressed(length: int) -> bytes:
    return post(b"", "/z", GZIP).replace(b"Length: 0", b"Length: %d" % length)


@pytest.fixture(params=LOOPS)
def server(request):
    with running(echo, LIMITS, loop=request.param) as server:
        yield server


@pytest.mark.parametrize("kind", ["chunked", "compressed"])
def test_more_than_all_may_hold_is_refused(server, kind):
    head, body = (CHUNKS, in_chunks(NOISE)) if kind == "chunked" else (compressed(700_000), NOISE)
    with begun(server, head, body), server.connect() as peer:
        peer.sendall(head + body)
        reader = Reader(peer)
        refusal = reader.answer()
        assert (refusal.status, json.loads(refusal.body), refusal.headers["retry-after"]) == (503, FULL, "1")
        assert ask(server, post(b"x" * 800_000)).status == 200, "one that lies where it shall needs nothing"
    assert nothing_held(server)
    assert ask(server, chunked(NOISE)).body.endswith(NOISE)
    assert ask(server, post(gzip.compress(b"plain"), "/z", GZIP)).body == b"POST /z  plain"
    assert nothing_held(server)


def test_what_comes_out_of_a_compressed_body_counts_too(server):
    packed = gzip.compress(bytes(800_000))
    with begun(server, CHUNKS, in_chunks(NOISE)):
        refusal = ask(server, post(packed, "/z", GZIP))
        assert (refusal.status, json.loads(refusal.body)) == (503, FULL)
    assert until(lambda: held(server) == 0)
    assert ask(server, post(packed, "/z", GZIP)).status == 200
    alone = gzip.compress(NOISE)
    refusal = ask(server, post(alone, "/z", GZIP))
    assert refusal.status == 413, "it would never fit"
    assert f"the server has {MOST:,} for all" in json.loads(refusal.body)["error"]
    assert nothing_held(server)


@pytest.mark.parametrize("kind", ["chunked", "compressed", "both"])
@pytest.mark.parametrize("end", ["close", "reset", "half"])
def test_clients_that_leave(server, kind, end):
    head = {"chunked": CHUNKS, "compressed": compressed(300_000)}.get(
        kind, CHUNKS.replace(b"\r\n\r\n", f"\r\n{GZIP}\r\n\r\n".encode())
    )
    body = NOISE[:200_000] if kind == "compressed" else in_chunks(NOISE[:200_000])
    with begun(server, head, body) as peer:
        if end == "half":
            peer.shutdown(socket.SHUT_WR)
        elif end == "reset":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
        else:
            peer.close()
        assert nothing_held(server)


ENDS = {
    "whole": (chunked(NOISE), 200),
    "whole and compressed": (post(gzip.compress(bytes(500_000)), "/z", GZIP), 200),
    "a chunk without its end": (CHUNKS + b"%x\r\n" % 1000 + NOISE[:1000] + b"junk", 400),
    "too large": (CHUNKS + b"%x\r\n" % 1000 + NOISE[:1000] + b"\r\nfffffff\r\n", 413),
    "not compressed": (post(NOISE[:1000], "/z", GZIP), 400),
    "cut short": (post(gzip.compress(NOISE[:1000])[:-3], "/z", GZIP), 400),
    "too large when plain": (post(gzip.compress(bytes(900_001)), "/z", GZIP), 413),
    "no room for it when it is there": (chunked(b"full").replace(b"/c", b"/full"), 503),
    "no room for it when it is plain": (post(gzip.compress(b"full"), "/full", GZIP), 503),
    "the handler fails": (chunked(b"x").replace(b"/c", b"/fail"), 500),
    "the handler fails on what was compressed": (post(gzip.compress(b"x"), "/fail", GZIP), 500),
}


def allocate(request, length):
    if request.path == "/full":
        raise HttpError(503, "full")
    return memoryview(bytearray(length))


def answer(request):
    if request.path == "/fail":
        raise ValueError("on purpose")
    return echo(request)


@pytest.mark.parametrize("name", ENDS)
def test_every_end_of_a_request(name):
    sent, status = ENDS[name]
    with running(HttpService(answer, allocate), LIMITS) as server:
        for _ in range(3):
            with server.connect() as peer:
                peer.sendall(sent)
                assert Reader(peer).answer().status == status
                assert nothing_held(server), "though the connection may go on"


def test_bodies_that_are_too_slow(monkeypatch):
    taken: list[int] = []
    take = Held.take

    def noted(self, nbytes):
        taken.append(nbytes)
        take(self, nbytes)

    monkeypatch.setattr(Held, "take", noted)
    with running(echo, patient(body_timeout_s=0.3)) as server:
        for head, body in ((CHUNKS, in_chunks(NOISE[:1000])), (compressed(2000), NOISE[:1000])):
            taken.clear()
            with server.connect() as peer:
                peer.sendall(head + body)
                assert Reader(peer).answer().status == 408
                assert sum(taken) > len(body) - 100
                assert nothing_held(server)


def test_the_servers_end():
    with running(echo, LIMITS) as server:
        peers = [begun(server, CHUNKS, in_chunks(NOISE[:1000])), begun(server, compressed(2000), NOISE[:1000])]
        server.close()
        assert nothing_held(server)
        for peer in peers:
            peer.close()


def test_a_thread_that_still_decompresses_keeps_its_bytes(monkeypatch):
    go, at_it, decompress = threading.Event(), threading.Event(), http_bodies.decompress

    def slow(*arguments):
        at_it.set()
        go.wait(60)
        return decompress(*arguments)

    monkeypatch.setattr(http_bodies, "decompress", slow)
    packed = gzip.compress(NOISE[:100_000])
    with running(echo, LIMITS) as server:
        peer = server.connect()
        peer.sendall(post(packed, "/z", GZIP))
        assert at_it.wait(30)
        peer.close()
        assert until(lambda: not server.server.connections)
        assert held(server) == len(packed), "the client is gone, what it sent is not"
        go.set()
        assert nothing_held(server)


def test_compressed_requests_that_wait_for_their_answers_hold_nothing():
    begun, release = threading.Event(), threading.Event()

    async def wait(request):
        begun.set()
        while not release.is_set():
            await asyncio.sleep(0.005)
        return Response(200, (), [request.body])

    with running(wait, LIMITS) as server, server.connect() as peer:
        peer.sendall(post(gzip.compress(b"plain"), "/z", GZIP))
        assert begun.wait(30)
        assert nothing_held(server)
        release.set()
        assert Reader(peer).answer().body == b"plain"


def test_counts_from_many_threads_do_not_drift():
    counted = Held(1 << 40)

    def work():
        for size in range(2000):
            hold = counted.begin()
            hold.grow(size)
            hold.grow(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.nbytes == 0
