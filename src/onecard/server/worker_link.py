"""One end of the connection between the main process and a worker: messages both ways, and calls with their answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from onecard.errors import EngineClosedError, EngineError, OnecardError
from onecard.ipc import packets
from onecard.server.http_types import LOGGER, HttpError
from onecard.server.worker_messages import AnyMessage, Ended, decode, encode, error_of, failure_of

PIECE_BYTES = 64 << 10
"""A message goes in packets of at most so many bytes, which any kernel takes."""

MOST_MESSAGE_BYTES = 256 << 20
_MORE, _LAST = b"+", b"."  # the first byte of a packet: whether the message goes on in the next one
_MOST_AT_ONCE = 64  # packets received before the loop does something else

Hear = Callable[[AnyMessage, list[int]], None]
"""Called with each message that is no answer, and the descriptors that came with it, which are the callee's."""


class WorkerLink:
    """One end; nothing that is done with it blocks. Made in a running event loop, and for it alone.

    Args:
        sock: connected, of the kind SOCK_SEQPACKET; it belongs to this from now on.
        hear: see :data:`Hear`.
        lost: called once with the reason when the connection ends by itself.
    """

    def __init__(self, sock: socket.socket, hear: Hear, lost: Callable[[str], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock, self._hear, self._lost = sock, hear, lost
        self._outgoing: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._received: list[bytes] = []
        self._descriptors: list[int] = []
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._blocked = self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def send(self, message: AnyMessage, descriptors: Sequence[int] = ()) -> None:
        """Send a message, with copies of descriptors; it is dropped if the other side is gone."""
        if self.closed:
            return
        copies = tuple(map(os.dup, descriptors))
        data = encode(message)
        pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
        for piece in pieces[:-1]:
            self._outgoing.append((_MORE + piece, ()))
        self._outgoing.append((_LAST + pieces[-1], copies))
        if not self._blocked:
            self._send_outgoing()

    def call(self, make: Callable[[int], AnyMessage], descriptors: Sequence[int] = ()) -> asyncio.Future[bytes]:
        """Send a message that is answered.

        Args:
            make: the message, from the call's number.
            descriptors: as for :meth:`send`.

        Returns:
            The body of the answer to be. It raises what the other side raised; EngineClosedError, if it goes before.
        """
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self.closed:
            future.set_exception(_gone())
            return future
        number = next(self._numbers)
        self._calls[number] = future
        self.send(make(number), descriptors)
        return future

    def carry_out(self, call: int, work: Awaitable[bytes | None]) -> None:
        """Do what the other side asked for, and answer with what came of it."""
        task = self._loop.create_task(self._carry_out(call, work))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    def close(self) -> None:
        """End the connection; calls that wait fail."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        if self._blocked:
            self._loop.remove_writer(self._sock.fileno())
        for _, copies in self._outgoing:
            _close_all(copies)
        _close_all(self._descriptors)
        self._outgoing.clear()
        self._sock.close()
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(_gone())
                future.exception()  # it may be that nobody waits for it any more

    async def _carry_out(self, call: int, work: Awaitable[bytes | None]) -> None:
        try:
            body = await work
        except OnecardError as error:
            self.send(Ended(call, failure=failure_of(error)))
        except Exception:
            LOGGER.exception("what another front asked for failed")
            self.send(Ended(call, failure=failure_of(HttpError(500, "Internal error; the server's log tells more."))))
        else:
            self.send(Ended(call, body or b""))

    def _send_outgoing(self) -> None:
        """Send what waits until the socket is full."""
        try:
            while self._outgoing:
                data, copies = self._outgoing[0]
                packets.send(self._sock, data, copies)
                self._outgoing.popleft()
                _close_all(copies)
        except BlockingIOError:
            if not self._blocked:
                self._blocked = True
                self._loop.add_writer(self._sock.fileno(), self._send_outgoing)
            return
        except (OSError, EngineError):  # what it sent before it went is still to be read, and then its end
            for _, copies in self._outgoing:
                _close_all(copies)
            self._outgoing.clear()
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._sock.fileno())

    def _on_readable(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                data, descriptors = packets.receive(self._sock, 1)
            except BlockingIOError:
                return
            except (OSError, EngineError) as error:
                self._end(f"it cannot be heard: {error}")
                return
            self._descriptors += descriptors
            if not data:
                self._end("it closed the connection")
                return
            try:
                self._take(data)
            except (msgspec.MsgspecError, EngineError) as error:
                self._end(f"it sent what cannot be understood: {error}")
                return
            if self.closed:
                return
        # There may be more, and uvloop ends a reader whose socket has an error: nothing might call this again.
        self._loop.call_soon(self._hear_on)

    def _hear_on(self) -> None:
        if not self.closed:
            self._on_readable()

    def _take(self, data: bytes) -> None:
        """Take a packet: the message's last one makes it whole."""
        self._received.append(data[1:])
        if data[:1] == _MORE:
            if len(self._received) * PIECE_BYTES > MOST_MESSAGE_BYTES:
                raise EngineError(f"a message of more than {MOST_MESSAGE_BYTES:,} bytes")
            return
        whole, self._received = b"".join(self._received), []
        descriptors, self._descriptors = self._descriptors, []
        try:
            message = decode(whole)
        except BaseException:
            _close_all(descriptors)
            raise
        if not isinstance(message, Ended):
            self._hear(message, descriptors)
            return
        _close_all(descriptors)
        future = self._calls.pop(message.call, None)
        if future is None or future.done():
            return
        if message.failure is None:
            future.set_result(message.body)
        else:
            future.set_exception(error_of(message.failure))

    def _end(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._lost(reason)


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a new connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _gone() -> EngineClosedError:
    return EngineClosedError("the other process of the server is gone.", "Try again in a moment.")
