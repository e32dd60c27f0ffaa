"""A real server on a thread of its own, and a client of raw sockets, for the tests of the HTTP front."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecard.server.http_server import HttpServer, Listen, serve_http
from onecard.server.http_types import HttpLimits, HttpService, Request, Response

LOOPS = ("asyncio", "uvloop")
QUICK = HttpLimits(head_timeout_s=0.3, body_timeout_s=0.3, idle_timeout_s=0.4, write_timeout_s=0.4, linger_s=0.3)
PATIENCE_S = 30.0  # a busy machine may stand still for seconds; nothing that happens takes so long


def patient(**quick: float) -> HttpLimits:
    """Limits of time that no test comes to, but for these."""
    slow = dict.fromkeys(("head_timeout_s", "body_timeout_s", "idle_timeout_s", "write_timeout_s", "linger_s"), 60.0)
    return HttpLimits(**{**slow, **quick})  # type: ignore[arg-type]


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "asyncio":
        return asyncio.SelectorEventLoop()
    return pytest.importorskip("uvloop").new_event_loop()


def echo(request: Request) -> Response:
    """Answers with method, path, query and body, so that a wrong pairing of answers is seen."""
    start = f"{request.method} {request.path} {request.query} ".encode()
    return Response(200, [(b"Content-Type", b"text/plain")], [start, request.body])


@dataclasses.dataclass
class Running:
    server: HttpServer
    loop: asyncio.AbstractEventLoop
    uds: Path | None = None

    def connect(self) -> socket.socket:
        if self.uds is not None:
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(PATIENCE_S)
            peer.connect(str(self.uds))
            return peer
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE_S)

    def close(self, drain_s: float = 0.0) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(drain_s), self.loop).result(60)


@contextlib.contextmanager
def running(
    service: HttpService | Callable, limits: HttpLimits | None = None, where: Listen | None = None, loop: str = "uvloop"
) -> Iterator[Running]:
    service = service if isinstance(service, HttpService) else HttpService(service)
    where = where or Listen(port=0)
    the_loop = new_loop(loop)
    thread = threading.Thread(target=the_loop.run_forever)
    thread.start()
    try:
        served = asyncio.run_coroutine_threadsafe(serve_http(service, where, limits), the_loop).result(PATIENCE_S)
        running = Running(served, the_loop, where.uds)
        try:
            yield running
        finally:
            running.close()
    finally:
        the_loop.call_soon_threadsafe(the_loop.stop)
        thread.join()
        the_loop.run_until_complete(the_loop.shutdown_default_executor())
        the_loop.close()


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Reader:
    """Reads answers from a socket, one after the other."""

    def __init__(self, peer: socket.socket | ssl.SSLSocket) -> None:
        self.peer = peer
        self.rest = b""

    def more(self) -> bool:
        try:
            data = self.peer.recv(65536)
        except ConnectionResetError:
            data = b""
        self.rest += data
        return bool(data)

    def answer(self, method: str = "GET") -> Answer:
        while b"\r\n\r\n" not in self.rest:
            assert self.more(), f"closed after {self.rest!r}"
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        assert len(headers) == len(lines)
        length = 0 if method == "HEAD" or int(status) in (100, 204, 304) else int(headers["content-length"])
        while len(self.rest) < length:
            assert self.more(), "closed within a body"
        body, self.rest = self.rest[:length], self.rest[length:]
        return Answer(int(status), headers, body)

    def at_end(self) -> bool:
        """Whether the server closes, and sends nothing before."""
        return not self.rest and not self.more()


def until(condition: Callable[[], bool]) -> bool:
    """Wait for something that another thread brings about; whether it came."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return condition()
        time.sleep(0.01)
    return True


def ask(server: Running, request: bytes) -> Answer:
    """One request on a connection of its own."""
    with server.connect() as peer:
        peer.sendall(request)
        return Reader(peer).answer()


def get(path: str = "/", *fields: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: test", *fields, "", "")).encode("latin-1")


def post(body: bytes, path: str = "/", *fields: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *fields, "", "")
    return "\r\n".join(lines).encode("latin-1") + body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    head = b"POST /c HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailer + b"\r\n"
