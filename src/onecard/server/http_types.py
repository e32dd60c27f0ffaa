"""The words of the HTTP front: limits, a request and its head, a response, and an error that carries its status.

No sockets and no parsing here; what is said in these types is independent of how it came over the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from onecard.errors import OnecardError

if TYPE_CHECKING:
    from onecard.server.http_held import Hold
    from onecard.server.traces import RequestTrace

LOGGER = logging.getLogger("onecard.server")

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Headers: TypeAlias = "Sequence[tuple[bytes, bytes]]"


@dataclass(frozen=True)
class HttpLimits:
    """What one connection, and all of them together, may ask of the server.

    Args:
        max_head_bytes: request line and header fields together (431 beyond it).
        max_target_bytes: the request target alone (414).
        max_headers: header fields of one request (431).
        max_body_bytes: a body, also after it was decompressed (413).
        max_held_bytes: of all bodies in chunks and compressed ones together, and of what they decompress to (503).
        max_connections: open connections; the next one is answered 503 and closed.
        max_pipeline: requests of one connection that may wait for their answers; beyond it, reading pauses.
        head_timeout_s: from the first byte of a head to its last (408).
        body_timeout_s: grace for a body, beside the time that ``min_body_bytes_per_s`` gives it (408).
        min_body_bytes_per_s: the mean rate that a body must keep once the grace is over.
        idle_timeout_s: how long a connection may stay open without a request.
        write_timeout_s: how long a client may take nothing of an answer that is ready.
        linger_s: how long what a refused client still sends is read, so that it sees the refusal and not a reset.
    """

    max_head_bytes: int = 16_384
    max_target_bytes: int = 8_192
    max_headers: int = 100
    max_body_bytes: int = 64 << 20
    max_held_bytes: int = 512 << 20
    max_connections: int = 1000
    max_pipeline: int = 16
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    min_body_bytes_per_s: int = 65_536
    idle_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    linger_s: float = 2.0


class HttpError(OnecardError):
    """A refusal with its status; what a handler raises to answer something other than 200.

    Args:
        status: the HTTP status code, 400 to 599.
        message: what was wrong, for the client: it is sent.
        headers: header fields to send with it, such as ``Retry-After``.
    """

    def __init__(self, status: int, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head, checked. Requests of a connection with equal heads share one, so nothing here is changed.

    Args:
        method: one of those the server knows, upper case.
        path: the target up to ``?``, as it came: still percent-encoded, so decode each segment after splitting it.
        query: the target after ``?``, as it came.
        minor: the minor version; the major one is 1.
        headers: names in lower case to values; values of a repeated field are joined by commas.
        content_length: bytes of the body as it comes over the wire; 0 when chunked.
        chunked: whether the body comes in chunks.
        keep_alive: whether the client goes on using the connection.
        expects_continue: whether the client waits for ``100 Continue`` before it sends the body.
        encoding: ``gzip``, ``deflate``, or empty for a body as it is.
    """

    method: str
    path: str
    query: str
    minor: int
    headers: Mapping[bytes, bytes]
    content_length: int
    chunked: bool
    keep_alive: bool
    expects_continue: bool
    encoding: str


NO_HEAD = Head("", "", "", 1, {}, 0, False, False, False, "")  # of a request whose head could not be read
EMPTY = memoryview(b"")


class Response:
    """An answer: status, header fields, and a body in as many buffers as it has.

    ``Content-Length``, ``Connection`` and ``Date`` are added when it is sent. Large buffers are sent from where they
    are: they must not change until ``on_sent`` is called.

    Args:
        status: the HTTP status code.
        headers: header fields, names as they shall be sent.
        body: contiguous buffers, sent one after the other.
        on_sent: called once, when the buffers are no longer needed: sent, or the client is gone.
    """

    __slots__ = ("body", "headers", "on_sent", "status")

    def __init__(
        self,
        status: int = 200,
        headers: Headers = (),
        body: Sequence[Buffer] = (),
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.on_sent = on_sent


class Request:
    """A request as a handler sees it.

    Args:
        head: its head.
        client: the peer's IP address, ``unix`` for one on a Unix-domain socket, ``unknown`` for one that was gone.
        tls: whether it came over TLS.

    Attributes:
        body: the whole body, decompressed, in the memory that the allocator gave.
        gone: whether the client left, or was sent away, before its answer was written.
        began: when its head was there, in seconds of ``time.monotonic``.
        answer: set by the connection: the response, once there is one.
        task: set by the connection: what is awaited for the answer.
        trace: set by the application, if it is traced.
        admitted: set by the application's ``admit``, for its handler: the client may ask this.
        most_body_bytes: set by the application's ``admit``: of the body, where that is less than the limit.
        hold: set by the connection: the bytes of the body that are counted; None if it lies where the allocator said.
    """

    __slots__ = (
        *("_callbacks", "admitted", "answer", "began", "body", "client", "gone", "head", "hold", "most_body_bytes"),
        *("task", "tls", "trace"),
    )

    def __init__(self, head: Head, client: str, tls: bool) -> None:
        self.head = head
        self.client = client
        self.tls = tls
        self.began = time.monotonic()
        self.body: memoryview = EMPTY
        self.gone = False
        self.answer: Response | None = None
        self.task: asyncio.Future[Response] | None = None
        self.trace: RequestTrace | None = None
        self.admitted = False
        self.most_body_bytes: int | None = None
        self.hold: Hold | None = None
        self._callbacks: list[Callable[[], None]] | None = None

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def query(self) -> str:
        return self.head.query

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        return self.head.headers

    @property
    def version(self) -> str:
        return f"1.{self.head.minor}"

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Have a function called if the client goes away before its answer is written.

        A client that closes its sending half counts as gone: it cannot be told from one that closed both. The same
        goes for a request whose body never comes to its end. At once if that already happened. A response that is there
        but not written yet has its ``on_sent`` called too.

        Args:
            callback: called on the loop's thread, at most once.
        """
        if self.gone:
            callback()
        elif self._callbacks is None:
            self._callbacks = [callback]
        else:
            self._callbacks.append(callback)

    def lose(self) -> None:
        """Told by the connection: nobody waits for the answer. Cancels the handler."""
        if self.gone:
            return
        self.gone = True
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            call_quietly(callback)
        if self.task is not None:
            self.task.cancel()
        if self.answer is not None and self.answer.on_sent is not None:
            call_quietly(self.answer.on_sent)


def call_quietly(callback: Callable[[], None]) -> None:
    """Call a callback of the application, whose failure must not end the connection's own work."""
    try:
        callback()
    except Exception:
        LOGGER.exception("A callback of a request failed.")


Handler: TypeAlias = "Callable[[Request], Awaitable[Response] | Response]"
BodyAllocator: TypeAlias = "Callable[[Request, int], memoryview]"
Admission: TypeAlias = "Callable[[Request], None]"


@dataclass(frozen=True)
class HttpService:
    """What the application gives to the front.

    Args:
        handler: answers a request whose body is whole. A coroutine becomes a task; a future is awaited without one; a
            response is sent at once. Errors of onecard are answered with their status and message, others 500. A task
            that is cancelled before its first step runs none of its code: what must be given back when the client goes
            away belongs into ``on_gone``, or into a callback of the future.
        allocator: gives the memory for a body of that many bytes, one dimension of bytes, writable; it may raise to
            refuse. Bodies with a length are received straight into it; chunked and compressed ones are copied there
            when they are whole. None: fresh memory for each.
        admit: called with each request that has a body, before there is memory for it; it raises to refuse, and may
            set ``most_body_bytes``.
        on_answer: told of each answer that is written, with the bytes of its body.
    """

    handler: Handler
    allocator: BodyAllocator | None = None
    admit: Admission | None = None
    on_answer: Callable[[Request, Response, int], None] | None = None
