"""The answers of one connection: in the order of their requests, sent from where they are, released once sent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from onecard.server.http_response import encode_head, has_body, response_of
from onecard.server.http_shared import Shared
from onecard.server.http_types import Buffer, Request, Response, call_quietly

_JOIN_BYTES = 16_384  # below this, copying costs less than a second buffer in the system call


class Owner(Protocol):
    """The connection, as its answers see it."""

    def answered(self, keep: bool) -> None:
        """An answer was written; without ``keep`` it was the last one."""

    def between_requests(self) -> bool:
        """Whether nothing of a further request has come."""


class Answers:
    """The queue of requests whose answers are still to be written.

    Args:
        shared: what all connections share.
        transport: where answers go. Its write limits must be such that it pauses while anything at all is unsent: then
            "not paused" means that no buffer is in use any more.
        owner: the connection.

    Attributes:
        pending: requests in order; each leaves when its answer is written.
        paused: whether something written is not sent yet.
    """

    __slots__ = ("_owner", "_shared", "_transport", "_unsent", "paused", "pending")

    def __init__(self, shared: Shared, transport: asyncio.Transport, owner: Owner) -> None:
        self._shared = shared
        self._transport = transport
        self._owner = owner
        self._unsent: list[Callable[[], None]] = []
        self.pending: deque[Request] = deque()
        self.paused = False

    def put(self, request: Request, answer: Response | Awaitable[Response]) -> None:
        """Take what the handler gave: written now, or when it is there and those before it are written."""
        if type(answer) is Response:
            request.answer = answer
            self.pending.append(request)
            if self.pending[0] is request:
                self._flush()
            return
        try:
            future = asyncio.ensure_future(answer, loop=self._shared.loop)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:  # neither a response nor something that this loop can await
            self.put(request, response_of(error, request))
            return
        request.task = future
        self.pending.append(request)
        if future.done():
            self._done(request, future)
        else:
            future.add_done_callback(partial(self._done, request))

    def _done(self, request: Request, future: asyncio.Future[Response]) -> None:
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        response = future.result() if error is None else None
        if request.gone:
            if type(response) is Response and response.on_sent is not None:
                call_quietly(response.on_sent)
            return
        if error is None and type(response) is not Response:
            error = TypeError(f"the handler gave {type(response).__name__}, not Response")
        request.task = None
        request.answer = response if error is None else response_of(error, request)
        if self.pending[0] is request:
            self._flush()

    def _flush(self) -> None:
        pending = self.pending
        keep = True
        while keep and pending and (response := pending[0].answer) is not None:
            keep = self._write(pending.popleft(), response)
        self._owner.answered(keep)

    def _write(self, request: Request, response: Response) -> bool:
        head = request.head
        keep = head.keep_alive
        if self._transport.is_closing():  # it broke while an earlier answer was written
            request.lose()
            return False
        if self._shared.draining and not self.pending and self._owner.between_requests():
            keep = False
        try:
            parts, length = _parts(response.body)
            start = encode_head(response, self._shared.date.now(), length, head, keep)
        except (KeyError, TypeError, ValueError) as error:  # the handler's response cannot be sent
            if response.on_sent is not None:
                call_quietly(response.on_sent)
            return self._write(request, response_of(error, request))
        if self._shared.service.on_answer is not None:
            self._shared.service.on_answer(request, response, length)
        if not length or not has_body(response, head):
            self._transport.write(start)
        elif length <= _JOIN_BYTES:
            self._transport.write(b"".join((start, *parts)))
        else:
            self._send(start, parts)
            if response.on_sent is not None and self.paused:
                self._unsent.append(response.on_sent)
                return keep
        if response.on_sent is not None:
            call_quietly(response.on_sent)
        return keep

    def _send(self, start: bytes, parts: list[bytes | memoryview]) -> None:
        if self._shared.scatters:
            self._transport.writelines([start, *parts])
            return
        self._transport.write(start)
        for part in parts:
            self._transport.write(part)

    def resume(self) -> None:
        """All that was written is sent."""
        self.paused = False
        self._release()

    def lose(self) -> None:
        """Nobody reads answers any more, or the last one is written: what is pending is cancelled."""
        while self.pending:
            self.pending.popleft().lose()

    def end(self) -> None:
        """The connection is closed: also what was written but not sent is not needed any more."""
        self.lose()
        self._release()

    def _release(self) -> None:
        unsent, self._unsent = self._unsent, []
        for callback in unsent:
            call_quietly(callback)


def _parts(body: Sequence[Buffer]) -> tuple[list[bytes | memoryview], int]:
    """Buffers as bytes or views of bytes, none of them empty, and their length in bytes."""
    parts: list[bytes | memoryview] = []
    length = 0
    for buffer in body:
        part = buffer if type(buffer) is bytes else memoryview(buffer)
        if type(part) is memoryview:
            if not part.nbytes:
                continue
            if part.format != "B" or part.ndim != 1:
                part = part.cast("B")
        if part:
            parts.append(part)
            length += len(part)
    return parts, length
