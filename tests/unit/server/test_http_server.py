"""Listening and ending: Unix-domain sockets, TLS, shared ports, too many connections, draining."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import logging
import os
import socket
import ssl
import stat
import threading
import time

import pytest

from onecard.errors import UsageError
from onecard.server import http_server
from onecard.server.http_server import Listen
from onecard.server.http_tls import tls_context
from onecard.server.http_types import HttpLimits, HttpService, Response
from tests.unit.server.http_peers import LOOPS, PATIENCE_S, Reader, ask, echo, get, patient, post, running, until


@pytest.fixture(params=LOOPS)
def loop(request):
    return request.param


def who(request):
    return Response(200, (), [f"{request.client} {request.tls} {request.version}".encode()])


def test_unix_domain_socket(tmp_path, loop):
    path = tmp_path / "front.sock"
    with running(who, where=Listen(host=None, uds=path), loop=loop) as server:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert server.server.port is None
        assert ask(server, get()).body == b"unix False 1.1"
        with pytest.raises(UsageError, match="another process listens"), running(who, where=Listen(uds=path, port=0)):
            pass
        assert ask(server, get()).status == 200
    assert not path.exists()


def test_a_socket_left_behind_is_replaced_but_not_a_file(tmp_path, loop):
    path = tmp_path / "front.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with running(who, where=Listen(host=None, uds=path, uds_mode=0o666), loop=loop) as server:
        assert ask(server, get()).status == 200
    path.write_text("precious")
    with pytest.raises(UsageError, match="is no socket"), running(who, where=Listen(host=None, uds=path), loop=loop):
        pass
    assert path.read_text() == "precious"


def test_both_at_once(tmp_path, loop):
    path = tmp_path / "front.sock"
    with running(who, where=Listen(port=0, uds=path), loop=loop) as server:
        assert ask(server, get()).body == b"unix False 1.1"
        with socket.create_connection(("127.0.0.1", server.server.port)) as peer:
            peer.sendall(get())
            assert Reader(peer).answer().body == b"127.0.0.1 False 1.1"
        assert len(server.server.sockets) == 2


def test_a_port_that_is_taken(loop):
    with running(who, loop=loop) as server:
        taken = server.server.port
        with pytest.raises(UsageError, match=str(taken)), running(who, where=Listen(port=taken), loop=loop):
            pass


def test_nowhere_to_listen(loop):
    with pytest.raises(UsageError, match="neither"), running(who, where=Listen(host=None), loop=loop):
        pass


def test_two_servers_share_a_port(loop):
    with running(echo, where=Listen(port=0, reuse_port=True), loop=loop) as first:
        port = first.server.port
        with running(who, where=Listen(port=port, reuse_port=True), loop=loop) as second:
            bodies = {ask(second, get()).body for _ in range(100)}
    assert bodies == {b"GET /  ", b"127.0.0.1 False 1.1"}


def signed(folder, name):
    """A certificate that signs itself, and its key, in one file each."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, secret


def over_tls(server, authority, certificate=None):
    context = ssl.create_default_context(cafile=authority)
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context.wrap_socket(server.connect(), server_hostname="127.0.0.1")


def test_tls(tmp_path, loop):
    released = []

    def handler(request):
        if request.path == "/who":
            return who(request)
        return Response(200, (), [request.body, bytes(5_000_000)], on_sent=lambda: released.append(1))

    mine = signed(tmp_path, "server")
    with running(handler, patient(), Listen(port=0, tls=tls_context(*mine)), loop) as server:
        with over_tls(server, mine[0]) as peer:
            reader = Reader(peer)
            for _ in range(3):
                peer.sendall(get("/who"))
                assert reader.answer().body == b"127.0.0.1 True 1.1"
                body = os.urandom(300_000)
                peer.sendall(post(body))
                assert reader.answer().body == body + bytes(5_000_000)
            assert until(lambda: len(released) == 3)
            peer.sendall(b"\0")
            assert reader.answer().status == 400
        with server.connect() as peer:  # no TLS at all
            peer.sendall(get())
            assert b"HTTP" not in peer.recv(1000)
        assert until(lambda: server.server.connections == 0)


def test_client_certificates(tmp_path, loop, caplog):
    mine, theirs, other = (signed(tmp_path, name) for name in ("server", "client", "other"))
    context = tls_context(*mine, client_ca=theirs[0])
    with running(who, where=Listen(port=0, tls=context), loop=loop) as server:
        with over_tls(server, mine[0], theirs) as peer:
            peer.sendall(get())
            assert Reader(peer).answer().status == 200
        for wrong in (None, other):
            received = b""
            with contextlib.suppress(ssl.SSLError, ConnectionResetError), over_tls(server, mine[0], wrong) as peer:
                peer.sendall(get())
                received = peer.recv(1000)
            assert received == b""
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_tls_files_that_cannot_be_used(tmp_path):
    mine, other = signed(tmp_path, "server"), signed(tmp_path, "other")
    for files in [(tmp_path / "none", None), (mine[0], None), (mine[0], other[1]), (*mine, mine[1])]:
        with pytest.raises(UsageError, match="cannot be used"):
            tls_context(*files)


def test_too_many_connections(loop):
    with running(echo, patient(max_connections=2, linger_s=0.3), loop=loop) as server:
        first, second = server.connect(), server.connect()
        assert until(lambda: server.server.connections == 2)
        with server.connect() as third:
            reader = Reader(third)
            refusal = reader.answer()
            assert (refusal.status, refusal.headers["connection"]) == (503, "close")
            assert reader.at_end()
        first.sendall(get())
        assert Reader(first).answer().status == 200
        first.close()
        assert until(lambda: server.server.connections == 1)
        assert ask(server, get()).status == 200
        second.close()


def test_a_flood_of_connections_is_cut_off():
    with running(echo, patient(max_connections=2)) as server:
        peers = [server.connect() for _ in range(120)]
        assert until(lambda: server.server.connections <= 2 + 65)
        for peer in peers:
            peer.close()
        assert until(lambda: server.server.connections == 0)
        assert ask(server, get()).status == 200


def closing(server, drain_s):
    thread = threading.Thread(target=server.close, args=(drain_s,))
    thread.start()
    return thread


def test_draining_answers_what_was_asked(loop, monkeypatch):
    monkeypatch.setattr(http_server, "_DRAIN_IDLE_S", 60.0)  # who is at rest may ask as late as a busy machine has it
    release, begun, lent = threading.Event(), threading.Event(), threading.Event()

    async def handler(request):
        while request.path == "/slow" and not release.is_set():
            begun.set()
            await asyncio.sleep(0.005)
        return echo(request)

    def allocate(request, length):
        lent.set()
        return memoryview(bytearray(length))

    with running(HttpService(handler, allocate), loop=loop) as server:
        port = server.server.port
        busy, half, idle, used = (server.connect() for _ in range(4))
        busy.sendall(get("/slow") + get("/behind"))
        half.sendall(post(b"abc")[:-1])
        used.sendall(get())
        assert Reader(used).answer().headers.get("connection") is None
        assert begun.wait(PATIENCE_S) and lent.wait(PATIENCE_S)
        ending = closing(server, 120)
        assert until(lambda: not server.server.sockets)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        half.sendall(b"c")
        reader = Reader(half)
        answer = reader.answer()
        assert (answer.body, answer.headers["connection"]) == (b"POST /  abc", "close")
        assert reader.at_end()
        used.sendall(get("/again"))  # it comes while at rest: still answered
        assert Reader(used).answer().headers["connection"] == "close"
        release.set()
        reader = Reader(busy)
        slow, behind = reader.answer(), reader.answer()
        assert (slow.body, behind.body) == (b"GET /slow  ", b"GET /behind  ")
        assert (slow.headers.get("connection"), behind.headers.get("connection")) == (None, "close")
        assert reader.at_end()
        assert server.server.connections == 1 and ending.is_alive()
        idle.close()
        ending.join(PATIENCE_S)
        assert not ending.is_alive()
        assert server.server.connections == 0
        for peer in (busy, half, idle, used):
            peer.close()


def test_draining_ends_what_is_at_rest(loop):
    with running(echo, loop=loop) as server, server.connect() as idle, server.connect() as used:
        reader = Reader(used)
        used.sendall(get())
        assert reader.answer().status == 200
        assert until(lambda: server.server.connections == 2)
        began, ending = time.monotonic(), closing(server, 60)
        assert Reader(idle).at_end() and reader.at_end()
        assert time.monotonic() - began < 30
        ending.join(PATIENCE_S)
        assert not ending.is_alive()


def test_draining_has_an_end(loop):
    begun, cancelled = threading.Event(), threading.Event()

    async def handler(request):
        request.on_gone(cancelled.set)
        begun.set()
        await asyncio.sleep(600)

    with running(handler, loop=loop) as server, server.connect() as peer:
        peer.sendall(get())
        assert begun.wait(PATIENCE_S)
        closing(server, 0.2).join(PATIENCE_S)
        assert cancelled.is_set()
        assert server.server.connections == 0
        assert Reader(peer).at_end()


def test_no_descriptor_is_left(loop):
    with running(echo, loop=loop) as server:
        ask(server, get())
        assert until(lambda: server.server.connections == 0)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            ask(server, get())
            ask(server, b"\0")
            server.connect().close()
        assert until(lambda: server.server.connections == 0)
        assert until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_limits_are_checked_by_the_clock_alone():
    """Nothing but time passes on the connection: the check is not a side effect of its traffic."""
    with running(echo, HttpLimits(idle_timeout_s=0.2)) as server, server.connect() as peer:
        assert Reader(peer).at_end()
