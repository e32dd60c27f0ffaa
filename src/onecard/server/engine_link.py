"""One connection to an engine: its socket, the segment of its answers, and what could not be sent at once."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecard.errors import EngineError
from onecard.ipc import packets
from onecard.ipc.messages import VERSION, Hello, Message, Sent, ToFront, decode_to_front, encode
from onecard.ipc.segment import Segment
from onecard.server.engine_request import EngineRequest

_MOST_AT_ONCE = 64
"""Packets received before the loop does something else."""


class EngineLink:
    """One connection to an engine; nothing that is done with it blocks.

    Args:
        path: of the engine's socket.
        requests: the segment of requests.
        answer_bytes: of the segment of answers, made for this connection.
        receive: called with each message; what it raises is the engine's fault and ends the connection.
        lost: called once with the reason when the connection ends by itself.

    Attributes:
        answers: the segment of answers.

    Raises:
        OSError: nobody listens there.
        EngineError: another user's process does.
        OnecardError: no memory for the answers.
    """

    def __init__(
        self,
        path: Path,
        requests: Segment,
        answer_bytes: int,
        receive: Callable[[ToFront], None],
        lost: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._receive, self._lost = receive, lost
        self._outgoing: deque[Message | EngineRequest] = deque()
        self._released: deque[int] = deque()
        self._releasing = self._closed = False
        self._sock = packets.connect(path)
        try:
            if not packets.same_user(self._sock):
                raise EngineError(f"the process that listens at {path} is another user's.")
            self.answers = Segment.create("onecard-answers", answer_bytes)
        except BaseException:
            self._sock.close()
            raise
        try:
            hello = Hello(VERSION, os.getpid(), requests.nbytes, answer_bytes)
            packets.send(self._sock, encode(hello), (requests.fd, self.answers.fd))
            self._sock.setblocking(False)
            self._loop.add_reader(self._sock.fileno(), self._on_readable)
        except BaseException:
            self.close()
            raise

    def send(self, item: Message | EngineRequest) -> None:
        """Send a message, or a request as it is once it can be sent."""
        if self._closed:
            return
        if not self._outgoing:
            try:
                if self._send_now(item):
                    return
            except ConnectionError:  # what it sent before it went is still to be read, and then its end
                return
            except (OSError, EngineError) as error:
                # In the loop's next round: who sends does not expect that all changes under its hands.
                self._loop.call_soon(self._end, f"it takes no messages: {error}")
                return
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        self._outgoing.append(item)

    def give_back(self, offset: int) -> None:
        """Tell the engine that a part of the segment of answers is free; from any thread, in the middle of anything."""
        self._released.append(offset)
        if self._releasing or self._closed:
            return
        self._releasing = True
        try:
            if threading.get_ident() == self._thread:
                self._loop.call_soon(self._send_released)
            else:
                self._loop.call_soon_threadsafe(self._send_released)
        except RuntimeError:  # the loop is closed, and nobody sends anything any more
            return

    def close(self) -> None:
        """End the connection. Answers that came over it stay as they are."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        if self._outgoing:
            self._loop.remove_writer(self._sock.fileno())
            self._outgoing.clear()
        self._sock.close()
        self.answers.close()

    def _send_now(self, item: Message | EngineRequest) -> bool:
        """Send one message; False if the socket is full."""
        message = item.message() if isinstance(item, EngineRequest) else item
        if message is None:
            return True
        try:
            packets.send(self._sock, encode(message))
        except BlockingIOError:
            return False
        if isinstance(item, EngineRequest):
            item.sent = True
        return True

    def _on_writable(self) -> None:
        try:
            while self._outgoing and self._send_now(self._outgoing[0]):
                self._outgoing.popleft()
        except ConnectionError:
            self._outgoing.clear()
        except (OSError, EngineError) as error:
            self._end(f"it takes no messages: {error}")
            return
        if not self._outgoing:
            self._loop.remove_writer(self._sock.fileno())

    def _on_readable(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                data, _ = packets.receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, EngineError) as error:
                self._end(f"it cannot be heard: {error}")
                return
            if not data:
                self._end("it closed the connection")
                return
            try:
                self._receive(decode_to_front(data))
            except (msgspec.MsgspecError, ValueError, TypeError, KeyError, EngineError) as error:
                self._end(f"it sent what cannot be understood: {error!r}")
                return
            if self._closed:
                return

    def _send_released(self) -> None:
        self._releasing = False  # before they are taken: what comes from now on is sent next time
        offsets = []
        while self._released:
            offsets.append(self._released.popleft())
        if offsets:
            self.send(Sent(tuple(offsets)))

    def _end(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._lost(reason)
