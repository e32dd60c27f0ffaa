"""Messages over a Unix socket that keeps them apart (SOCK_SEQPACKET): one a packet, with descriptors if need be."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from onecard.errors import EngineError, StorageError, UsageError

MOST_BYTES = 1 << 20
"""Of a message; the kernel may take less, down to 416 KiB with Linux's own ``net.core.wmem_max``."""

MOST_PATH_BYTES = 107
"""Of a socket's path: ``sun_path`` of unix(7), less the zero behind it."""

BACKLOG = 64
"""Connections that may wait to be accepted."""

_INT = struct.Struct("i")
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid

Ancillary: TypeAlias = tuple[int, int, bytes]

# As plain numbers: the enumeration's own operators cost more than the system call. Not every system has them.
_NO_SIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_TELL_LENGTH = int(socket.MSG_TRUNC)  # asked for, it has the kernel say how long a message was that it cut
_CUT = int(socket.MSG_TRUNC) | int(socket.MSG_CTRUNC)


def listen(path: Path) -> socket.socket:
    """Listen on a new socket that only this user may connect to.

    Raises:
        UsageError: the path is too long or taken, or this is not Linux.
        StorageError: the socket cannot be made there.
    """
    sock = _new_socket(path)
    try:
        os.fchmod(sock.fileno(), 0o600)  # before it has a name: the file is made with this mode
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"There is a file at {path} already.", "Remove it, or choose another path.") from error
        raise StorageError(f"No socket can be made at {path}: {error}.", "Choose a folder that is yours.") from error
    return sock


def accept(listener: socket.socket) -> socket.socket:
    """Take the next connection, waiting for it or not as the listener does; the socket is blocking."""
    sock, _ = listener.accept()
    _raise_send_buffer(sock)
    return sock


def connect(path: Path) -> socket.socket:
    """Connect to what listens there; the socket is blocking.

    Raises:
        UsageError: the path is too long, or this is not Linux.
        FileNotFoundError: nobody has listened there yet.
        ConnectionError: nobody listens there any more.
    """
    sock = _new_socket(path)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


def same_user(sock: socket.socket) -> bool:
    """Whether the process that connected, or listened, is of this process's user."""
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(user == os.geteuid())


def send(sock: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one message, all of it or nothing.

    Args:
        sock: blocking or not.
        data: the message, 1 to :data:`MOST_BYTES` bytes.
        descriptors: to give to the peer, which gets its own copies.

    Raises:
        BlockingIOError: the socket does not block, and the peer has too much unread.
        ConnectionResetError: the peer is gone.
        EngineError: the message is too large for us or for the kernel.
        ValueError: it is empty, which would be read as the connection's end.
    """
    if not data:
        raise ValueError("an empty message would be read as the end of the connection")
    if len(data) > MOST_BYTES:
        raise EngineError(f"A message has at most {MOST_BYTES:,} bytes, not {len(data):,}.", "Put data in a segment.")
    try:
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            sock.sendmsg([data], ancillary, _NO_SIGNAL)
        else:
            sock.send(data, _NO_SIGNAL)
    except (BrokenPipeError, ConnectionRefusedError) as error:
        raise ConnectionResetError(errno.ECONNRESET, "the peer is gone") from error
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        kept = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        raise EngineError(
            f"The kernel takes no message of {len(data):,} bytes with a send buffer of {kept:,}.",
            f"Raise its limit: sysctl net.core.wmem_max={MOST_BYTES}.",
        ) from error


def receive(sock: socket.socket, descriptors: int = 0) -> tuple[bytes, list[int]]:
    """Receive one message.

    What the peer sent before it went is still received, then its end.

    Args:
        sock: blocking or not.
        descriptors: how many may come with the message.

    Returns:
        The message, empty at the end of the connection; and the descriptors, which are the caller's to close and not
        inherited by programs that are started.

    Raises:
        BlockingIOError: the socket does not block, and there is no message.
        EngineError: the message was longer than :data:`MOST_BYTES`, or more descriptors came; all of it is dropped.
    """
    buffer = _buffers.of_this_thread
    try:
        nbytes, ancillary, flags = _receive_into(sock, buffer, descriptors)
    except ConnectionResetError:  # said once, if the peer went without reading all; its last messages come after it
        nbytes, ancillary, flags = _receive_into(sock, buffer, descriptors)
    received = _descriptors_in(ancillary) if ancillary else []
    if flags & _CUT:
        for fd in received:
            os.close(fd)
        raise EngineError(f"The peer sent more than {MOST_BYTES:,} bytes or {descriptors} descriptors in a message.")
    return bytes(buffer[:nbytes]), received


def receive_view(sock: socket.socket) -> memoryview:
    """Receive one message without a copy, where no descriptors are expected; those that come are closed unseen.

    Args:
        sock: blocking or not.

    Returns:
        The message, empty at the end of the connection. The next one that this thread receives is written over it.

    Raises:
        BlockingIOError: the socket does not block, and there is no message.
        ConnectionResetError: the peer went without reading all. It is said once; the peer's last messages come after.
        EngineError: the message was longer than :data:`MOST_BYTES`; all of it is dropped.
    """
    buffer = _buffers.of_this_thread
    nbytes = sock.recv_into(buffer, 0, _TELL_LENGTH)
    if nbytes > MOST_BYTES:
        raise EngineError(f"The peer sent more than {MOST_BYTES:,} bytes in a message.")
    return buffer[:nbytes]


class _Buffers(threading.local):
    """Where messages arrive: to make room for the longest one each time would cost more than to receive a short one."""

    def __init__(self) -> None:
        self.of_this_thread = memoryview(bytearray(MOST_BYTES))


_buffers = _Buffers()


def _receive_into(sock: socket.socket, buffer: memoryview, descriptors: int) -> tuple[int, list[Ancillary], int]:
    room = socket.CMSG_LEN(descriptors * _INT.size) if descriptors else 0
    nbytes, ancillary, flags, _ = sock.recvmsg_into([buffer], room, _CLOSE_ON_EXEC)
    return nbytes, ancillary, flags


def _descriptors_in(ancillary: list[Ancillary]) -> list[int]:
    received = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(data[: len(data) // _INT.size * _INT.size])
    return received.tolist()


def _new_socket(path: Path) -> socket.socket:
    if not sys.platform.startswith("linux"):
        raise UsageError(f"The server's processes talk over sockets that need Linux, and this is {sys.platform}.")
    length = len(os.fsencode(path))
    if length > MOST_PATH_BYTES:
        raise UsageError(
            f"A socket's path has at most {MOST_PATH_BYTES} bytes, and {path} has {length}.", "Choose a shorter folder."
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _raise_send_buffer(sock)
    return sock


def _raise_send_buffer(sock: socket.socket) -> None:
    """As far as the kernel lets us: a message has to fit in it, and many short ones wait there."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
