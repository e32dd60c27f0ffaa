"""How much of a body the kernel collects before it wakes us: the low-water mark of a TCP socket (``SO_RCVLOWAT``).

Over a network a body comes in many pieces, and to be woken for each costs more than all else that a front does for it.
"""

from __future__ import annotations

import asyncio
import socket
import sys

_MOST_BYTES = 256 << 10  # more saves little, is copied out later than it could be, and fills the kernel's memory
_LEAST_BYTES = 64 << 10  # what comes last, and is not worth a system call


class LowWater:
    """The mark of one connection.

    It is never above what is still to come, so that nobody is waited for who has sent all. The stream's end, and a
    receive buffer that is full, wake us below it too.

    Args:
        transport: the connection's. Only plain TCP has a mark: over TLS other bytes come than are handed on, and
            Unix-domain sockets wake us for whatever is there.
    """

    __slots__ = ("_mark_bytes", "_socket", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        tls = transport.get_extra_info("sslcontext") is not None
        peer: socket.socket | None = None if tls else transport.get_extra_info("socket")
        is_tcp = peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6)
        self._transport = transport
        self._socket = peer if is_tcp else None
        self._mark_bytes = 1

    def collect(self, left: int) -> None:
        """Of a body that comes in pieces, so many bytes are still to come."""
        if self._socket is not None:
            self._set(min(left, _MOST_BYTES) if left >= _LEAST_BYTES else 1)

    def lower(self) -> None:
        """Whatever comes next shall wake us."""
        if self._mark_bytes > 1 and not self._transport.is_closing():
            self._set(1)

    def collected_bytes(self) -> int:
        """What has come and did not wake us."""
        if self._mark_bytes == 1 or self._socket is None:
            return 0
        from fcntl import ioctl  # neither is there on Windows
        from termios import FIONREAD

        return int.from_bytes(ioctl(self._socket.fileno(), FIONREAD, bytes(4)), sys.byteorder)

    def _set(self, mark_bytes: int) -> None:
        if mark_bytes == self._mark_bytes or self._socket is None:
            return
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark_bytes)
        except OSError:  # this kernel has no marks
            self._socket = None
        else:
            self._mark_bytes = mark_bytes
