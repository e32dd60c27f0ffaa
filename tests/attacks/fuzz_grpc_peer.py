"""A connection of the gRPC fuzzer without a client's library: sends the frames of a case, and looks at what comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import cast

import grpc

from tests.attacks.fuzz_grpc_frames import RawCase
from tests.attacks.grpc_wire import RST_STREAM, Received, fault_of_message, read_frames

LIMIT_S = 20.0
"""Within which each call must have ended."""
MOMENT_S = 0.25
"""How long a client waits that need not be answered."""
INTERNAL_FAULTS = ("Internal error", "Traceback")
_STATUSES = {code.value[0]: code.name for code in grpc.StatusCode}


class _Peer(asyncio.Protocol):
    """Keeps all that comes, and notes the end."""

    def __init__(self) -> None:
        self._received: list[bytes] = []
        self.news = asyncio.Event()
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self.news.set()

    def received(self) -> Received:
        return read_frames(b"".join(self._received))


async def look(port: int, case: RawCase) -> tuple[str, str]:
    """Send a case on a connection of its own.

    Returns:
        What became of it in a word or two, and what is wrong with that; empty if nothing is.
    """
    try:
        _, peer = await asyncio.get_running_loop().create_connection(_Peer, "127.0.0.1", port)
    except OSError as error:
        return "unreachable", f"no connection: {error}"
    try:
        for part in case.parts:
            peer.transport.write(part)
            if case.pause_s:
                await asyncio.sleep(case.pause_s)
            if not peer.open:
                break
        if case.wanted == "nothing":
            return "left", ""
        received = await _wait(peer, case)
        return _outcome(case, received, peer.open)
    finally:
        peer.transport.abort()


async def _wait(peer: _Peer, case: RawCase) -> Received:
    """Until the call or the connection ends, or the time is over."""
    end = time.monotonic() + (MOMENT_S if case.wanted == "any" else LIMIT_S)
    while peer.open and time.monotonic() < end:
        if case.wanted != "closed" and (received := peer.received()).ended(case.stream):
            return received
        peer.news.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(peer.news.wait(), max(end - time.monotonic(), 0.0))
    return peer.received()


def _outcome(case: RawCase, received: Received, still_open: bool) -> tuple[str, str]:
    status = received.status() if case.first else None
    message = received.message(case.stream)
    if status is not None:
        said = _STATUSES.get(status, str(status))
    elif message and received.ended(case.stream):
        said = "OK"
    elif any(kind == RST_STREAM and stream == case.stream for kind, _, stream, _ in received.frames):
        said = "reset"
    else:
        said = "closed" if not still_open else "sent away" if received.ended(case.stream) else "silence"
    if case.wanted == "right":
        fault = fault_of_message(message, case.tag, case.rows) if message else f"expected the answer, got {said}"
    elif case.wanted == "closed":
        fault = "" if not still_open else f"the connection is still open after {LIMIT_S} s ({said})"
    elif case.wanted == "end":
        fault = f"no end within {LIMIT_S} s" if said == "silence" else ""
        if message and case.tag:
            fault = fault or fault_of_message(message, case.tag, case.rows)
    else:
        fault = ""
    details = b"".join(payload for _, _, _, payload in received.frames)
    if any(word.encode() in details for word in INTERNAL_FAULTS):
        fault = f"an error of the server's own: {details[-300:]!r}"
    return said, fault
