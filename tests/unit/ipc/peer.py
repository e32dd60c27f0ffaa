"""The other process: connects to a socket and does what its second word says.

Usage: ``python peer.py SOCKET ROLE``
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from onecard.ipc import packets
from onecard.ipc.segment import Segment

GREETING = b"written by the peer"


def read(sock: socket.socket) -> None:
    """Answer with what lies in a segment that comes in, and write behind it."""
    message, (fd,) = packets.receive(sock, descriptors=1)
    nbytes, offset, length = map(int, message.split())
    segment = Segment.attach(fd, nbytes)
    found = bytes(segment.view(offset, length))
    segment.view(offset + length, length)[:] = found.upper()
    packets.send(sock, found)


def write(sock: socket.socket) -> None:
    """Send a segment of its own, and end at once."""
    segment = Segment.create("peer", 1 << 16)
    segment.view(100, len(GREETING))[:] = GREETING
    packets.send(sock, b"%d 100" % segment.nbytes, [segment.fd])


def echo(sock: socket.socket) -> None:
    """Send everything back, until the connection ends."""
    while message := packets.receive(sock)[0]:
        packets.send(sock, message)


def count(sock: socket.socket) -> None:
    """Send three messages, say so on standard output, and wait to be killed without reading any."""
    for number in (b"1", b"2", b"3"):
        packets.send(sock, number)
    print("sent", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    with packets.connect(Path(sys.argv[1])) as connected:
        {"read": read, "write": write, "echo": echo, "count": count}[sys.argv[2]](connected)
