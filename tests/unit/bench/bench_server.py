"""A small HTTP server of known behaviour, on a thread of its own: one worker of fixed speed, stalls, refusals."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

METADATA = {"name": "m", "versions": ["1"], "platform": "x",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}], "outputs": []}  # fmt: skip


@dataclass
class Behaviour:
    """How the server answers.

    Args:
        service_s: of each request; the one worker serves them in their order.
        stall_at_s: after the first request, the answers stop ...
        stall_s: ... for so long.
        most_waiting: more requests are refused with 429; every request if 0.
        hang: never answers an inference.
        chunked: answers in chunks.
    """

    service_s: float = 0.0
    stall_at_s: float = 0.0
    stall_s: float = 0.0
    most_waiting: int = 1_000_000
    hang: bool = False
    chunked: bool = False


class _Server:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self._free = self._first = 0.0
        self._waiting = 0
        self.answered = self.refused = 0
        self.bodies: list[bytes] = []
        self.paths: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length"))
                body = await reader.readexactly(length)
                status, answer = await self._answer(lines[0].split()[1], body)
                writer.write(self._wire(status, answer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        self.paths.append(path)
        if path == "/v2":
            return 200, json.dumps({"name": "known", "version": "7"}).encode()
        if path == "/v2/repository/index":
            return 200, b'[{"name": "m", "version": "1", "state": "READY"}]'
        if path == "/v2/models/m":
            return 200, json.dumps(METADATA).encode()
        if path != "/v2/models/m/infer":
            return 404, b'{"error": "no such model"}'
        self.bodies = [*self.bodies[-200:], body]
        return await self._infer()

    async def _infer(self) -> tuple[int, bytes]:
        if self.behaviour.hang:
            await asyncio.Event().wait()
        now = time.perf_counter()
        self._first = self._first or now
        if self._waiting >= self.behaviour.most_waiting:
            self.refused += 1
            return 429, b'{"error": "too much is waiting"}'
        self._free = max(self._free, now) + self.behaviour.service_s  # exact, however late the timer is
        stall = self._first + self.behaviour.stall_at_s
        if self.behaviour.stall_s and stall <= self._free < stall + self.behaviour.stall_s:
            self._free = stall + self.behaviour.stall_s
        self._waiting += 1
        try:
            if self._free > now:
                await asyncio.sleep(self._free - now)
        finally:
            self._waiting -= 1
        self.answered += 1
        return 200, b"x" * 100

    def _wire(self, status: int, body: bytes) -> bytes:
        if self.behaviour.chunked:
            half = len(body) // 2
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]))
            return b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % (status, chunks)
        return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


@contextmanager
def known_server(behaviour: Behaviour | None = None) -> Iterator[tuple[str, _Server]]:
    """The server's address without a model, and itself."""
    known = _Server(behaviour or Behaviour())
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(known.serve, "127.0.0.1", 0, backlog=1000))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", known
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
