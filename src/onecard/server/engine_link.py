"""One connection to an engine: its socket, the segment of its answers, and what could not be sent at once."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from onecard.errors import EngineError
from onecard.ipc import packets
from onecard.ipc.messages import (
    MOST_IN_PACKET,
    PACKET_BYTES,
    VERSION,
    Answered,
    Hello,
    Infer,
    Message,
    Refused,
    Sent,
    decode_to_front,
    encode,
    packet,
)
from onecard.ipc.segment import Segment
from onecard.server.engine_request import EngineRequest

_MOST_AT_ONCE = 64
"""Full packets received before the loop does something else."""

_QUICK_S = 0.001
"""An engine that answers within so long is not sent each request by itself: see :meth:`EngineLink.send`."""

_GATHER_S = 0.001  # what uvloop can tell from none
_WEIGHT = 0.1  # of the last answer in the mean


class EngineLink:
    """One connection to an engine; nothing that is done with it blocks.

    Args:
        path: of the engine's socket.
        requests: the segment of requests.
        answer_bytes: of the segment of answers, made for this connection.
        hear: by type: takes the messages; what it raises is the engine's fault and ends the connection.
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
        hear: Mapping[type, Callable[[Any], None]],
        lost: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._hear, self._lost = hear, lost
        self._outgoing: deque[Message | EngineRequest] = deque()
        self._sending = self._blocked = False
        self._gathering: asyncio.TimerHandle | None = None
        self._unanswered = 0
        self._answer_s = 2 * _QUICK_S
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
            packets.send(self._sock, packet([encode(hello)]), (requests.fd, self.answers.fd))
            self._sock.setblocking(False)
            self._loop.add_reader(self._sock.fileno(), self._on_readable)
        except BaseException:
            self.close()
            raise

    def send(self, item: Message | EngineRequest) -> None:
        """Send a message, or a request as it is then: all that comes in one round of the loop goes together.

        While an engine that is quick has not answered all that it was sent, what comes goes after its next answer, a
        millisecond later at most: both processes then wake up once for several requests.
        """
        if self._closed:
            return
        self._outgoing.append(item)
        if self._sending or self._blocked or self._gathering is not None:
            return
        if self._unanswered and self._answer_s < _QUICK_S:
            self._gathering = self._loop.call_later(_GATHER_S, self._send_gathered)
        else:
            self._sending = True
            self._loop.call_soon(self._send_outgoing)

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
        if self._blocked:
            self._loop.remove_writer(self._sock.fileno())
        if self._gathering is not None:
            self._gathering.cancel()
        self._outgoing.clear()
        self._sock.close()
        self.answers.close()

    def _send_gathered(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if not self._blocked:
            self._send_outgoing()

    def _send_outgoing(self) -> None:
        """Send what waits, in packets, until the socket is full."""
        self._sending = False
        if self._closed:
            return
        try:
            while self._outgoing:
                if not self._send_packet():
                    if not self._blocked:
                        self._blocked = True
                        self._loop.add_writer(self._sock.fileno(), self._send_outgoing)
                    return
        except ConnectionError:  # what it sent before it went is still to be read, and then its end
            self._outgoing.clear()
        except (OSError, EngineError) as error:
            self._end(f"it takes no messages: {error}")
            return
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._sock.fileno())

    def _send_packet(self) -> bool:
        """Send the next messages in one packet; False if the socket is full."""
        encoded: list[bytes] = []
        nbytes = taken = asked = 0
        for item in self._outgoing:
            message = item.message() if isinstance(item, EngineRequest) else item
            if message is not None:
                data = encode(message)
                if encoded and (len(encoded) == MOST_IN_PACKET or nbytes + len(data) > PACKET_BYTES):
                    break
                encoded.append(data)
                nbytes += len(data)
                asked += type(message) is Infer
            taken += 1
        try:
            if encoded:
                packets.send(self._sock, packet(encoded))
        except BlockingIOError:
            return False
        for _ in range(taken):
            item = self._outgoing.popleft()
            if isinstance(item, EngineRequest):
                item.sent = True
        self._unanswered += asked
        return True

    def _on_readable(self) -> None:
        """Hear one packet, and more behind a full one: what is left unread makes the loop call this again."""
        try:
            for _ in range(_MOST_AT_ONCE):
                if self._hear_packet() < MOST_IN_PACKET:
                    return
        except ConnectionResetError:  # uvloop ends a reader whose socket has an error: nothing would call this again
            while self._hear_packet():
                pass

    def _hear_packet(self) -> int:
        """Hear the messages of the next packet, or the end of the connection.

        Returns:
            How many there were; 0 if there is no more to hear.

        Raises:
            ConnectionResetError: the engine is gone; what it sent before is still to be heard.
        """
        try:
            data = packets.receive_view(self._sock)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            raise
        except (OSError, EngineError) as error:
            self._end(f"it cannot be heard: {error}")
            return 0
        if not data:
            self._end("it closed the connection")
            return 0
        try:
            messages = decode_to_front(data)
            for message in messages:
                if type(message) is Answered:
                    self._unanswered -= 1
                    self._answer_s += _WEIGHT * (message.total_s - self._answer_s)
                elif type(message) is Refused:
                    self._unanswered -= 1
                self._hear[type(message)](message)
        except (msgspec.MsgspecError, ValueError, TypeError, KeyError, EngineError) as error:
            self._end(f"it sent what cannot be understood: {error!r}")
            return 0
        if self._closed:
            return 0
        if self._gathering is not None:
            self._send_gathered()
        return len(messages)

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
