"""One connection: heads are taken out of an inbox, bodies are received where they shall be, requests are handed on.

The bytes of a body that came with its head are copied; all others the kernel writes straight into the allocator's
memory. Answers are the matter of ``http_answers``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from dataclasses import replace
from typing import cast

from onecard.server.http_answers import Answers
from onecard.server.http_bodies import begin_body, end_chunks, make_plain
from onecard.server.http_chunked import ChunkedBody
from onecard.server.http_inbox import Inbox
from onecard.server.http_low_water import LowWater
from onecard.server.http_response import CONTINUE, json_error, response_of
from onecard.server.http_shared import Shared
from onecard.server.http_types import LOGGER, NO_HEAD, Head, HttpError, Request, Response

# What the bytes that come next belong to. Plain numbers, since they are compared several times a request.
_HEAD, _BODY, _CHUNKED, _SKIPPED, _NOTHING = range(5)
_SKIP_BYTES = 1 << 20  # a refused body up to this size is read and dropped, so that the connection can go on
SPARE_CONNECTIONS = 64  # above the limit: as many are told 503, any further are cut off


class HttpConnection(asyncio.BufferedProtocol):
    """The protocol object that the loop calls.

    Args:
        shared: what all connections share.
    """

    __slots__ = (
        *("_answers", "_body_since", "_chunks", "_client", "_closing", "_continue_due", "_deadline", "_handler"),
        *("_held", "_inbox", "_left", "_linger", "_loop", "_low_water", "_request", "_room", "_shared", "_state"),
        *("_tls", "_transport", "_unsent_bytes", "_whole"),
    )

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._loop = shared.loop
        self._handler = shared.service.handler
        self._inbox = Inbox(shared.limits)
        self._room = self._inbox.room()  # where the next bytes go
        self._state = _HEAD
        self._request: Request | None = None  # whose body is being received
        self._chunks: ChunkedBody | None = None
        self._left = 0  # bytes of the body, or of what is skipped, that are still to come
        self._whole = 0  # what that was when its clock began
        self._body_since = 0.0
        self._continue_due = False
        self._held = False  # reading is paused until answers are written
        self._linger = False
        self._closing = False
        self._unsent_bytes = 0

    # The loop's calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        shared = self._shared
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop has classes of its own
        self._tls = transport.get_extra_info("sslcontext") is not None
        self._client = _peer(transport)
        self._low_water = LowWater(transport)
        self._answers = Answers(shared, transport, self)
        self._deadline = self._loop.time() + shared.limits.idle_timeout_s
        # Over TLS, zero would mean "always paused": one means there what zero means here.
        self._transport.set_write_buffer_limits(high=1 if self._tls else 0, low=0)
        before = len(shared.connections)
        shared.connections.add(self)
        shared.nobody_left.clear()
        if before >= shared.limits.max_connections + SPARE_CONNECTIONS:
            transport.abort()
        elif before >= shared.limits.max_connections:
            self._refuse(HttpError(503, "There are too many connections.", [(b"Retry-After", b"1")]))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        if self._state == _BODY:
            self._left -= nbytes
            if self._left:
                self._room = self._room[nbytes:]
                self._low_water.collect(self._left)
                return
            self._low_water.lower()
            request, self._request = self._request, None
            assert request is not None
            self._state = _HEAD
            self._take(request)
            self._settle()
        elif self._state in (_HEAD, _CHUNKED):
            self._inbox.end += nbytes
            self._advance()
        elif self._state == _SKIPPED:
            self._skip(nbytes)
            self._settle()
        else:
            self._drop(nbytes)

    def eof_received(self) -> None:
        self._lose()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose()
        self._answers.end()
        self._shared.leave(self)

    def pause_writing(self) -> None:
        self._answers.paused = True
        self._unsent_bytes = self._transport.get_write_buffer_size()
        self._deadline = self._loop.time() + self._shared.limits.write_timeout_s

    def resume_writing(self) -> None:
        self._answers.resume()
        self._rest()
        self._release()

    # Taking requests out of what has come.

    def _advance(self) -> None:
        """Take all that is whole."""
        inbox, going = self._inbox, True
        while going and inbox.start < inbox.end:
            if self._state == _HEAD:
                going = not self._is_blocked() and self._take_head()
            elif self._state == _CHUNKED:
                going = self._take_chunks()
            elif self._state == _SKIPPED:
                self._skip(inbox.pass_over(self._left))
            else:
                break
        self._settle()

    def _settle(self) -> None:
        """Say where the next bytes go, and whether any shall come now."""
        if self._state in (_HEAD, _CHUNKED):
            self._room = self._inbox.room()
            if self._state == _HEAD and self._is_blocked():
                self._hold()
        elif self._state == _SKIPPED:
            self._room = self._shared.scratch[: self._left]

    def _take_head(self) -> bool:
        """Take a head, and a body if it is there. False if more must come first."""
        waited = self._inbox.waiting
        try:
            head = self._inbox.next_head()
        except HttpError as error:
            self._refuse(error)
            return False
        if head is None:
            if self._inbox.waiting and not waited:
                self._deadline = self._loop.time() + self._shared.limits.head_timeout_s
            return False
        request = Request(head, self._client, self._tls)
        if head.content_length or head.chunked:
            self._begin_body(request)
        else:
            self._take(request)
        return True

    def _begin_body(self, request: Request) -> None:
        """Get ready for a body, and take it if it is there."""
        head = request.head
        try:
            self._chunks = begin_body(self._shared, request)
        except Exception as error:
            self._turn_away(error, request, None if head.chunked or head.expects_continue else head.content_length)
            return
        some_came = self._inbox.start < self._inbox.end
        if head.chunked:
            self._state = _CHUNKED
        else:
            have = self._inbox.move_to(request.body)
            if have == head.content_length:
                self._take(request)
                return
            self._left = head.content_length - have
            self._room = request.body[have:]
            self._state = _BODY
        self._request = request
        self._whole = self._left
        self._begin_clock()
        if head.expects_continue and not some_came:
            self._continue_due = True
            self._continue()

    def _take_chunks(self) -> bool:
        request, chunks = self._request, self._chunks
        assert request is not None
        assert chunks is not None
        try:
            self._inbox.move_to_chunks(chunks)
        except HttpError as error:
            self._turn_away(error, request, None)
            return False
        if not chunks.done:
            return False
        self._state, self._request, self._chunks = _HEAD, None, None
        try:
            end_chunks(self._shared, request, chunks)
        except Exception as error:
            self._turn_away(error, request, 0)
        else:
            self._take(request)
        return True

    def _take(self, request: Request) -> None:
        """Hand a whole request to the handler."""
        if not request.head.keep_alive:
            self._take_no_more()
        answer: Response | Awaitable[Response]
        try:
            if request.head.encoding and request.body:
                answer = self._handle_compressed(request)
            else:
                answer = self._handler(request)
        except Exception as error:
            answer = response_of(error, request)
        self._answers.put(request, answer)

    async def _handle_compressed(self, request: Request) -> Response:
        await make_plain(self._shared, request)
        answer = self._handler(request)
        return answer if isinstance(answer, Response) else await answer

    # Refusing.

    def _turn_away(self, error: Exception, request: Request, unread: int | None) -> None:
        """Answer a request that is not handed on.

        Args:
            error: why.
            request: what was asked.
            unread: bytes of its body that still come; None if that is not known. If they are few, they are read past
                and the connection goes on, since a client that is refused for overload should not have to connect anew.
        """
        answer = response_of(error, request)
        request.lose()
        if unread is None or unread > _SKIP_BYTES or not request.head.keep_alive:
            self._end_with(answer, request.head)
            return
        if unread:
            self._state, self._left = _SKIPPED, unread
            self._whole = unread
            self._begin_clock()
        self._answers.put(Request(request.head, self._client, self._tls), answer)

    def _refuse(self, error: HttpError) -> None:
        """Answer what cannot be read any further, and close."""
        LOGGER.debug("%s is refused: %d %s", self._client, error.status, error.message)
        self._end_with(json_error(error.status, error.message, error.headers), NO_HEAD)

    def _end_with(self, answer: Response, head: Head) -> None:
        """Make this the connection's last answer; no further request is read."""
        self._take_no_more()
        self._linger, self._continue_due = True, False
        self._answers.put(Request(replace(head, keep_alive=False), self._client, self._tls), answer)

    def _skip(self, count: int) -> None:
        self._left -= count
        if not self._left:
            self._state = _HEAD
            self._rest()

    def _drop(self, count: int) -> None:
        self._left += count
        if self._left > _SKIP_BYTES and not self._closing:
            self._hold()

    # What the answers tell.

    def answered(self, keep: bool) -> None:
        if not keep:
            self._finish()
            return
        if self._continue_due:
            self._continue()
        if not self._answers.pending:
            self._rest()
        self._release()

    def between_requests(self) -> bool:
        return self._state == _HEAD and self._inbox.start == self._inbox.end

    # Holding, ending, and the time.

    def _is_blocked(self) -> bool:
        return self._answers.paused or len(self._answers.pending) >= self._shared.limits.max_pipeline

    def _hold(self) -> None:
        if not (self._held or self._closing):
            self._held = True
            self._transport.pause_reading()

    def _release(self) -> None:
        if not self._held or self._closing or self._is_blocked():
            return
        self._held = False
        self._advance()
        if not (self._held or self._closing):
            self._transport.resume_reading()

    def _continue(self) -> None:
        """Ask for the body, once the answers to what came before are written."""
        if not self._answers.pending:
            self._continue_due = False
            self._transport.write(CONTINUE)
            self._begin_clock()

    def _begin_clock(self) -> None:
        self._body_since = self._loop.time()
        self._deadline = self._body_since + self._shared.limits.body_timeout_s

    def _rest(self) -> None:
        if self.between_requests() and not (self._closing or self._answers.paused):
            self._deadline = self._loop.time() + self._shared.limits.idle_timeout_s

    def _take_no_more(self) -> None:
        """Whatever still comes is dropped. A body that is not whole is given up: its memory is not touched again."""
        self._state, self._left = _NOTHING, 0
        self._room = self._shared.scratch
        self._low_water.lower()
        self._inbox.clear()
        if self._request is not None:
            self._request.lose()
            self._request = self._chunks = None

    def _lose(self) -> None:
        """The client is gone, or sends no more, which is taken for the same."""
        self._take_no_more()
        self._answers.lose()
        self._begin_end(self._shared.limits.write_timeout_s)

    def _begin_end(self, wait_s: float) -> None:
        self._closing = True
        self._deadline = self._loop.time() + wait_s

    def _finish(self) -> None:
        """The last answer is written: close, but not before a client that still sends had time to read it."""
        self._take_no_more()
        self._answers.lose()
        if not self._linger or self._transport.is_closing():
            self._begin_end(self._shared.limits.write_timeout_s)
            self._transport.close()
            return
        if self._held:
            self._transport.resume_reading()
        self._begin_end(self._shared.limits.linger_s)
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()
            except OSError:  # asyncio's own transport lets it through that the client is gone already
                self._transport.abort()

    def drain(self) -> None:
        """Close if nothing is under way."""
        if self.between_requests() and not (self._answers.pending or self._answers.paused or self._closing):
            self._finish()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def check(self, now_s: float) -> None:
        """Called several times a second: end what takes too long."""
        if now_s < self._deadline:
            return
        limits = self._shared.limits
        if self._answers.paused:
            unsent = self._transport.get_write_buffer_size()
            if unsent >= self._unsent_bytes:
                self._transport.abort()
            self._unsent_bytes = unsent
            self._deadline = now_s + limits.write_timeout_s
        elif self._closing and not self._transport.is_closing():  # it had its time to read the refusal
            self._transport.close()
            self._begin_end(limits.linger_s)
        elif self._closing:
            self._transport.abort()
        elif self._request is not None or self._state == _SKIPPED:
            self._check_body(now_s)
        elif self._answers.pending:
            self._deadline = now_s + limits.idle_timeout_s
        elif self._inbox.start < self._inbox.end:
            self._refuse(HttpError(408, f"The request's head did not come within {limits.head_timeout_s:g} s."))
        else:
            self._finish()

    def _check_body(self, now_s: float) -> None:
        limits = self._shared.limits
        came = self._whole - self._left + self._low_water.collected_bytes()
        if self._chunks is not None:
            came = len(self._chunks.content)
        self._deadline = self._body_since + limits.body_timeout_s + came / limits.min_body_bytes_per_s
        if self._continue_due:  # the client waits for us, not we for it
            self._begin_clock()
        elif now_s < self._deadline:
            return
        elif self._state == _SKIPPED:  # that request has its answer
            if not self._answers.pending:
                self._finish()
        else:
            self._refuse(HttpError(408, "The request's body comes too slowly."))


def _peer(transport: asyncio.Transport) -> str:
    """The peer's address. One that was gone before it was accepted has none, and is not taken for a local one."""
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return str(peer[0])
    listening = transport.get_extra_info("socket")
    return "unix" if listening is not None and listening.family == socket.AF_UNIX else "unknown"
