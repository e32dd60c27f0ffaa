"""Bytes of all kinds: no hang, no undocumented status, nothing left behind, and the next good request is answered."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.server.http_peers import Reader, ask, chunked, echo, get, patient, post, running, until

LIMITS = patient(linger_s=0.2, max_body_bytes=100_000)
DOCUMENTED = {100, 200, 400, 408, 411, 413, 414, 415, 417, 431, 501, 503, 505}
SEEDS = [
    get("/v2/models/m?x=1", "Accept: */*"),
    post(b"hello", "/v2/models/m/infer", "Inference-Header-Content-Length: 2"),
    post(b"hello", "/", "Expect: 100-continue"),
    chunked(b"hello", b"world", trailer=b"X: y\r\n"),
    post(b"x\x9cK\x04\x00\x00b\x00b", "/", "Content-Encoding: deflate"),
    b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    post(bytes(30_000)) + get(),
]
PIECES = [
    *(b"", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b"0", b"9" * 20, b"\xff", b"chunked", b";"),
    *(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1", b"Connection: close\r\n"),
]


@pytest.fixture(scope="module")
def server():
    with running(echo, LIMITS) as running_server:
        yield running_server


def mutated(chance: random.Random) -> bytes:
    wire = bytearray(b"".join(chance.choice(SEEDS) for _ in range(chance.randint(1, 3))))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(wire))
        match chance.randrange(4):
            case 0:
                wire[place] = chance.randrange(256)
            case 1:
                wire[place : place + chance.randint(0, 3)] = chance.choice(PIECES)
            case 2:
                del wire[place : place + chance.randint(1, 20)]
            case _:
                other = chance.choice(SEEDS)
                wire[place:place] = other[: chance.randrange(len(other))]
        if not wire:
            wire += b"\r"
    return bytes(wire)


def statuses(server, wire: bytes, pieces: int = 1) -> list[int]:
    """Send, end the sending side, and read until the server closes: the statuses that came."""
    with server.connect() as peer:
        sender = threading.Thread(target=_send, args=(peer, wire, pieces))
        sender.start()
        received = bytearray()
        try:
            while data := peer.recv(65536):
                received += data
        except ConnectionResetError:
            pass
        sender.join()
    return _statuses(bytes(received))


def _send(peer: socket.socket, wire: bytes, pieces: int) -> None:
    step = len(wire) // pieces + 1
    try:
        for start in range(0, len(wire), step):
            peer.sendall(wire[start : start + step])
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the server has closed already


def _statuses(received: bytes) -> list[int]:
    found = []
    for part in received.split(b"HTTP/1.1 ")[1:]:
        if part.startswith(b"100") or (part[:3].isdigit() and b"\r\nDate: " in part[:80]):
            found.append(int(part[:3]))
    return found


def test_mutated_requests(server):
    ask(server, get())
    chance = random.Random(5)
    for number in range(3000):
        wire = mutated(chance)
        found = statuses(server, wire, chance.choice([1, 1, 1, 2, 5]))
        assert set(found) <= DOCUMENTED, (number, wire, found)
        if number % 50 == 0:
            assert ask(server, get("/good")).body == b"GET /good  "


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from(SEEDS), st.sampled_from(PIECES)), max_size=8))
def test_arbitrary_pieces(server, pieces):
    found = statuses(server, b"".join(pieces))
    assert set(found) <= DOCUMENTED
    assert ask(server, get("/good")).body == b"GET /good  "


def test_nothing_is_left_behind(server):
    chance = random.Random(6)

    def many(count):
        for _ in range(count):
            statuses(server, mutated(chance))
        assert until(lambda: server.server.connections == 0)
        gc.collect()

    many(200)
    descriptors, kilobytes = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many(600)
    assert until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < kilobytes + 20_000


def test_half_sent_requests_end():
    """Every prefix of a request, then silence: each connection is answered or closed, and none stays."""
    with running(echo, patient(head_timeout_s=1, body_timeout_s=1, idle_timeout_s=1, linger_s=0.2)) as server:
        half_send(server, post(b"hello", "/", "X: y"))
    with running(echo, LIMITS) as server:
        peers = [begin(server, post(b"hello")[:end]) for end in (0, 10, 60)]
        assert ask(server, get("/good")).status == 200
        for peer in peers:
            peer.close()


def begin(server, wire: bytes) -> socket.socket:
    peer = server.connect()
    with contextlib.suppress(ConnectionError):  # a machine that stood still: its time is over
        peer.sendall(wire)
    return peer


def half_send(server, wire: bytes) -> None:
    for peer in [begin(server, wire[:end]) for end in range(0, len(wire), 3)]:
        reader = Reader(peer)
        while reader.more():
            pass
        assert set(_statuses(reader.rest)) <= {408}
        peer.close()
    assert until(lambda: server.server.connections == 0)
