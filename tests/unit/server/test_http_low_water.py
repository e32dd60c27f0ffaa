"""Bodies in pieces: the kernel collects them, and nobody waits for it who has no reason to."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from onecard.server.http_protocol import HttpConnection
from onecard.server.http_server import Listen
from onecard.server.http_tls import tls_context
from onecard.server.http_types import HttpError, HttpService
from tests.unit.server.http_peers import LOOPS, Reader, chunked, echo, get, patient, post, running, until
from tests.unit.server.test_http_server import over_tls, signed

BODY = os.urandom(600_000)
PIECE = 10_000
ASKED = [
    (post(BODY), b"POST /  " + BODY),
    (get("/a"), b"GET /a  "),
    (post(b"small", "/b"), b"POST /b  small"),
    (post(BODY, "/c"), b"POST /c  " + BODY),
    (chunked(b"chu", b"nked"), b"POST /c  chunked"),
    (post(BODY, "/d"), b"POST /d  " + BODY),
]


@pytest.fixture(params=LOOPS)
def loop(request):
    return request.param


@pytest.fixture
def wakes(monkeypatch):
    """The bytes of each arrival that the front was told of."""
    told: list[int] = []
    own = HttpConnection.buffer_updated

    def buffer_updated(self, nbytes):
        told.append(nbytes)
        own(self, nbytes)

    monkeypatch.setattr(HttpConnection, "buffer_updated", buffer_updated)
    return told


def send_in_pieces(peer, wire, rest_s=0.002):
    for start in range(0, len(wire), PIECE):
        peer.sendall(wire[start : start + PIECE])
        time.sleep(rest_s)


def test_a_body_in_pieces_wakes_the_front_a_few_times(loop, wakes):
    with running(echo, loop=loop) as server, server.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = Reader(peer)
        for _ in range(2):
            wakes.clear()
            send_in_pieces(peer, post(BODY))
            assert reader.answer().body == b"POST /  " + BODY
            assert sum(wakes) == len(post(BODY))
            assert len(wakes) < 10  # of 61 pieces


def test_what_comes_behind_a_body_wakes_the_front(loop):
    """However little it is."""
    with running(echo, loop=loop) as server, server.connect() as peer:
        sender = threading.Thread(target=send_in_pieces, args=(peer, b"".join(wire for wire, _ in ASKED)))
        sender.start()
        reader = Reader(peer)
        for _, answer in ASKED:
            assert reader.answer().body == answer
        sender.join()


def test_large_and_small_bodies_in_turn(loop):
    with running(echo, loop=loop) as server, server.connect() as peer:
        reader = Reader(peer)
        for wire, answer in ASKED:
            send_in_pieces(peer, wire)
            assert reader.answer().body == answer


def test_expected_and_refused_bodies_in_pieces(loop):
    def admit(request):
        if request.path == "/no":
            raise HttpError(404, "no such model")

    with running(HttpService(echo, admit=admit), loop=loop) as server, server.connect() as peer:
        reader = Reader(peer)
        asking = post(BODY, "/", "Expect: 100-continue")
        peer.sendall(asking[: -len(BODY)])
        assert reader.answer().status == 100
        send_in_pieces(peer, BODY)
        assert reader.answer().body == b"POST /  " + BODY
        send_in_pieces(peer, post(BODY, "/no"))
        assert reader.answer().status == 404
        send_in_pieces(peer, post(BODY))
        assert reader.answer().body == b"POST /  " + BODY


def test_a_receive_buffer_smaller_than_what_is_collected(loop):
    with running(echo, loop=loop) as server:
        server.server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        with server.connect() as peer:
            sender = threading.Thread(target=send_in_pieces, args=(peer, post(BODY) + get("/next")))
            sender.start()
            reader = Reader(peer)
            assert reader.answer().body == b"POST /  " + BODY
            assert reader.answer().body == b"GET /next  "
            sender.join()


def test_a_client_that_leaves_within_a_body_in_pieces(loop):
    for way in ("half", "close"):
        gone = threading.Event()
        lent = threading.Event()

        def allocate(request, length, gone=gone, lent=lent):
            request.on_gone(gone.set)
            lent.set()
            return memoryview(bytearray(length))

        with running(HttpService(echo, allocate), loop=loop) as server, server.connect() as peer:
            send_in_pieces(peer, post(BODY)[:150_000])
            assert lent.wait(30)
            assert not gone.is_set()
            if way == "half":
                peer.shutdown(socket.SHUT_WR)
                assert Reader(peer).at_end()
            else:
                peer.close()
            assert gone.wait(30)


def test_what_the_kernel_collects_counts_as_come():
    """By what was received when the grace ended, this client were too slow: most waits in the kernel."""
    limits, wire = patient(body_timeout_s=0.3), post(BODY[:250_000])
    with running(echo, limits) as server:

        def comes_in_time():
            began, kept_pace = time.monotonic(), True
            with server.connect() as peer:
                for start in range(0, len(wire), PIECE):
                    due_s = limits.body_timeout_s + start / limits.min_body_bytes_per_s
                    kept_pace = kept_pace and time.monotonic() - began < due_s - 0.1
                    peer.sendall(wire[start : start + PIECE])
                    time.sleep(0.04)  # at most 250,000 bytes a second, four times what is asked
                answer = Reader(peer).answer()
            assert time.monotonic() - began > 3 * limits.body_timeout_s
            assert answer.status == 200 or not kept_pace, "a machine that stands still is too slow, this one was not"
            return answer.body == b"POST /  " + BODY[:250_000]

        assert until(comes_in_time)


@pytest.mark.parametrize("trickle", [b"", b"a"])
def test_a_body_that_no_longer_comes_is_refused(loop, wakes, trickle):
    limits = patient(body_timeout_s=0.3, min_body_bytes_per_s=1_000_000)
    with running(echo, limits, loop=loop) as server, server.connect() as peer:
        began = time.monotonic()
        send_in_pieces(peer, post(BODY)[:150_000])  # a part waits in the kernel
        sent = 150_000
        peer.settimeout(0.05)
        answer = b""
        while not answer:
            try:
                answer = peer.recv(1000)
            except TimeoutError:
                peer.sendall(trickle)
                sent += len(trickle)
            assert time.monotonic() - began < 30
        assert answer.startswith(b"HTTP/1.1 408 ")
        peer.sendall(BODY[:PIECE])  # read and dropped, or the connection would end in a reset
        assert until(lambda: sum(wakes) == sent + PIECE)
        peer.shutdown(socket.SHUT_WR)
        assert until(lambda: server.server.connections == 0)
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_bodies_in_pieces_over_other_transports(tmp_path, loop):
    path = tmp_path / "front.sock"
    with running(echo, where=Listen(host=None, uds=path), loop=loop) as server, server.connect() as peer:
        reader = Reader(peer)
        for _ in range(2):
            send_in_pieces(peer, post(BODY))
            assert reader.answer().body == b"POST /  " + BODY
    mine = signed(tmp_path, "server")
    with (
        running(echo, where=Listen(port=0, tls=tls_context(*mine)), loop=loop) as server,
        over_tls(server, mine[0]) as peer,
    ):
        reader = Reader(peer)
        for _ in range(2):
            send_in_pieces(peer, post(BODY))
            assert reader.answer().body == b"POST /  " + BODY
