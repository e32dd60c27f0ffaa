"""Nobody sees another's answer: ``python -m tests.attacks.tagged --requests 1000000``.

Clients that keep their connections send requests with a tag of their own each, and hold every answer against it. Now
and then one goes away in the middle of a request, or before its answer, and comes back on a new connection.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import http.client
import math
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from tests.attacks.attacked import Attacked, attacked
from tests.attacks.chaos import Action, Setting, kill_engine, reload_model
from tests.attacks.loops import run
from tests.attacks.null_server import NullBundle
from tests.attacks.wire import (
    MOST_ROWS,
    Answer,
    AnswerReader,
    fault_of,
    infer,
    infer_compressed,
    infer_in_chunks,
    infer_in_json,
)

MOST_TAGS = 4_000_000
"""Of one run: tags are exact in float32 up to here, and none is used twice."""
_MOST_FAULTS = 10


@dataclass
class Counts:
    """What became of the requests.

    Args:
        right: answered with the function of their own tag.
        cancelled: the client went away on purpose.
        refused: by status.
        lost: the connection ended without an answer.
        faults: answers of others, or no answers at all; the first few.
        wrong: how many those were.
    """

    right: int = 0
    cancelled: int = 0
    refused: collections.Counter[int] = field(default_factory=collections.Counter)
    lost: int = 0
    wrong: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Take in what another process counted."""
        self.right += other.right
        self.cancelled += other.cancelled
        self.refused += other.refused
        self.lost += other.lost
        self.wrong += other.wrong
        self.faults += other.faults

    def fault(self, text: str) -> None:
        """Count a wrong answer."""
        self.wrong += 1
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(text)


@dataclass(frozen=True)
class Share:
    """The part of the requests that one process sends.

    Args:
        port: of the server.
        first_tag: of its tags, which are consecutive.
        requests: how many.
        clients: connections at once.
        cancelled: which share of the requests is given up on purpose.
        seed: of all choices.
    """

    port: int
    first_tag: int
    requests: int
    clients: int = 64
    cancelled: float = 0.02
    seed: int = 1


class _Peer(asyncio.Protocol):
    """A connection with one request at a time."""

    def __init__(self) -> None:
        self._reader = AnswerReader()
        self._waiting: asyncio.Future[Answer | None] | None = None
        self.open = False
        self.stray = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        answers = self._reader.feed(data)
        if answers and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answers.pop(0))
        if answers:
            self.stray += answers[0].body

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def send(self, wire: bytes) -> asyncio.Future[Answer | None]:
        """To become the answer; None if the connection ends instead."""
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(wire)
        return self._waiting


class _Client:
    """One client, on one connection after the other."""

    def __init__(self, share: Share, number: int, next_tag: Callable[[], int | None], counts: Counts) -> None:
        self._share = share
        self._chance = random.Random(f"{share.seed}/{share.first_tag}/{number}")
        self._next_tag = next_tag
        self._counts = counts

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        peer: _Peer | None = None
        while (tag := self._next_tag()) is not None:
            if peer is None or not peer.open:
                _, peer = await loop.create_connection(_Peer, "127.0.0.1", self._share.port)
            rows = self._chance.randint(1, MOST_ROWS)
            wire = self._request(tag, rows)
            if self._chance.random() < self._share.cancelled:
                await self._give_up(peer, wire)
            else:
                self._note(tag, rows, await peer.send(wire))
            if peer.stray:
                self._counts.fault(f"an answer that nobody asked for came after {tag}: {peer.stray[:200]!r}")
        if peer is not None:
            peer.transport.abort()

    def _request(self, tag: int, rows: int) -> bytes:
        chance = self._chance.random()
        if chance < 0.85:
            return infer(tag, rows)
        if chance < 0.95:
            return infer_in_json(tag, rows)
        return infer_in_chunks(tag, [20, 30], rows) if chance < 0.98 else infer_compressed(tag, rows)

    async def _give_up(self, peer: _Peer, wire: bytes) -> None:
        """Go away: in the middle of the request, or a little after it."""
        self._counts.cancelled += 1
        whole = self._chance.random() < 0.5
        peer.send(wire if whole else wire[: self._chance.randrange(1, len(wire))])
        await asyncio.sleep(self._chance.choice([0.0, 0.001, 0.003]))
        peer.open = False
        peer.transport.abort()

    def _note(self, tag: int, rows: int, answer: Answer | None) -> None:
        counts = self._counts
        if answer is None:
            counts.lost += 1
        elif answer.status != 200:
            counts.refused[answer.status] += 1
        elif fault := fault_of(answer, tag, rows):
            counts.fault(fault)
        else:
            counts.right += 1


def send(share: Share) -> Counts:
    """Send one share of the requests, in this process."""
    counts = Counts()
    tags = iter(range(share.first_tag, share.first_tag + share.requests))

    async def main() -> None:
        clients = [_Client(share, number, lambda: next(tags, None), counts) for number in range(share.clients)]
        await asyncio.gather(*(client.run() for client in clients))

    run(main())
    return counts


def send_all(whole: Share, processes: int) -> Counts:
    """Send all requests, spread over processes of their own."""
    each = [whole.requests * (n + 1) // processes - whole.requests * n // processes for n in range(processes)]
    shares = [
        Share(
            whole.port,
            whole.first_tag + sum(each[:n]),
            each[n],
            whole.clients // processes,
            whole.cancelled,
            whole.seed,
        )
        for n in range(processes)
    ]
    counts = Counts()
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(send, shares):
            counts.add(found)
    return counts


@contextlib.contextmanager
def harming(
    server: Attacked, kill_every_s: float, reload_every_s: float, kills: float = math.inf
) -> Iterator[collections.Counter[str]]:
    """Kill the engine and load the model again, time after time, while the ``with`` block runs.

    Args:
        server: attacked.
        kill_every_s: from an engine that answers to its end; 0 for never.
        reload_every_s: from one load to the next; 0 for never.
        kills: at most so many: on a slow machine there is an engine for a small part of the time only.

    Yields:
        What was done, and what came of it.
    """
    done: collections.Counter[str] = collections.Counter()
    over = threading.Event()

    def repeat(action: Action, every_s: float) -> None:
        while not over.wait(every_s):
            if action is kill_engine and done["kill_engine: SIGKILL"] >= kills:
                return
            if action is not kill_engine or _is_ready(server.port):  # or there would never be one
                done[f"{action.__name__}: {action(server, Setting()).partition(' to ')[0]}"] += 1

    harms = ((kill_engine, kill_every_s), (reload_model, reload_every_s))
    threads = [threading.Thread(target=repeat, args=harm) for harm in harms if harm[1]]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.HTTPStatus.OK


def main() -> int:
    """Attack a server of its own, and print the counts."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--requests", type=int, default=1_000_000)
    words.add_argument("--clients", type=int, default=64)
    words.add_argument("--processes", type=int, default=2)
    words.add_argument("--cancelled", type=float, default=0.02)
    words.add_argument("--delay-ms", type=float, default=0.0)
    words.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS", help="the engine; 0 for never")
    words.add_argument("--reload-every", type=float, default=20.0, metavar="SECONDS", help="the model; 0 for never")
    words.add_argument("--seed", type=int, default=1)
    given = words.parse_args()
    if given.requests > MOST_TAGS:
        words.error(f"at most {MOST_TAGS} requests have tags of their own.")
    with attacked({"tag": NullBundle(delay_ms=given.delay_ms)}) as server:
        began = time.monotonic()
        share = Share(server.port, 0, given.requests, given.clients, given.cancelled, given.seed)
        with harming(server, given.kill_every, given.reload_every) as done:
            counts = send_all(share, given.processes)
        alive = server.process.poll() is None
    print(f"{given.requests} requests in {time.monotonic() - began:.0f} s: {counts.right} right, {counts.wrong} wrong, "
          f"{counts.cancelled} cancelled, refused {dict(counts.refused)}, {counts.lost} lost; "
          f"the server {'lives' if alive else 'is dead'}")  # fmt: skip
    print(f"meanwhile {dict(done) or 'nothing else'}")
    for fault in counts.faults:
        print("FAULT", fault)
    return 0 if alive and not (counts.wrong or counts.lost or counts.refused) else 1


if __name__ == "__main__":
    sys.exit(main())
