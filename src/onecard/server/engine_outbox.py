"""Messages from the engine to one front. Who sends never waits: a front that does not read must not hold up a lane."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
from collections import deque

from onecard.ipc import packets
from onecard.ipc.messages import MOST_IN_PACKET, PACKET_BYTES, packet

PATIENCE_S = 10.0
"""A front that reads nothing for so long, while there is something to read, is dropped."""

_AT_ONCE = int(socket.MSG_DONTWAIT) | int(socket.MSG_NOSIGNAL)
_LOGGER = logging.getLogger(__name__)


class Outbox:
    """Sends messages in order, from any thread; a thread of its own sends what the socket did not take at once.

    What is put, and not sent, goes with the next that is sent, or with :meth:`flush`: answers of one batch come to the
    front together, which wakes it up once.

    Args:
        sock: connected and blocking. It is shut down if the front stops reading; closing it is left to its owner.
        patience_s: see :data:`PATIENCE_S`.
    """

    def __init__(self, sock: socket.socket, patience_s: float = PATIENCE_S) -> None:
        self._sock = sock
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._backlog: deque[bytes] = deque()
        self._put: list[bytes] = []
        self._put_bytes = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def send(self, data: bytes) -> None:
        """Send a message; it is dropped if the front is gone.

        Raises:
            EngineError: the message is too large.
        """
        with self._lock:
            self._add(data)
            self._send_put()

    def put(self, data: bytes) -> None:
        """Have a message sent soon: whoever puts one is to flush."""
        with self._lock:
            self._add(data)

    def flush(self) -> None:
        """Send what was put."""
        if self._put:
            with self._lock:
                self._send_put()

    @property
    def is_empty(self) -> bool:
        """Whether the socket took everything."""
        return not self._backlog and not self._put

    def close(self) -> None:
        """Send nothing any more, and wake up who waits for the socket."""
        with self._lock:
            self._closed = True
            self._backlog.clear()
            self._put.clear()
            self._wake.notify()
        with contextlib.suppress(OSError):  # the other side closed it
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _add(self, data: bytes) -> None:
        """Under the lock: to the next packet, or after it if there is no room."""
        if len(self._put) == MOST_IN_PACKET or self._put_bytes + len(data) > PACKET_BYTES:
            self._send_put()
        self._put.append(data)
        self._put_bytes += len(data)

    def _send_put(self) -> None:
        """Under the lock: send the packet, or leave it to the thread."""
        if not self._put:
            return
        data = packet(self._put)
        self._put.clear()
        self._put_bytes = 0
        if self._closed or (not self._backlog and self._sent(data)):
            return
        self._backlog.append(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_backlog, name="onecard-outbox", daemon=True)
            self._thread.start()
        self._wake.notify()

    def _sent(self, data: bytes) -> bool:
        """Under the lock: whether the socket took it; one whose other side is gone takes everything."""
        try:
            self._sock.send(data, _AT_ONCE)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                packets.send(self._sock, data)  # says how long a message may be
        return True

    def _send_backlog(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._backlog or self._closed)
            if not self._closed and not poller.poll(self._patience_s * 1000):
                _LOGGER.error("a front has read nothing for %g s: its connection is closed", self._patience_s)
                self.close()
            with self._lock:
                if self._closed:
                    return
                while self._backlog and self._sent(self._backlog[0]):
                    self._backlog.popleft()
