"""Load that does not wait for answers: tagged requests at Poisson times over as many connections as it takes.

Each arrival takes a connection at rest, or opens one, or (once there are too many) stands in line on a busy one. So a
request that waits does not hold back the next, as it would not if each came from a client of its own.
"""

from __future__ import annotations

import asyncio
import collections
import random
import select
import time
from dataclasses import dataclass
from typing import Literal, cast

from tests.attacks.wire import Answer, AnswerReader, MalformedAnswer, fault_of, infer

Outcome = Literal["open", "answered", "refused", "lost", "unreachable", "wrong"]
_ONE_ROW = 1


@dataclass(slots=True)
class Sample:
    """One request's fate.

    Args:
        tag: its own.
        due_s: when it was to be sent, by ``time.monotonic``.
        sent_s: when it was.
        outcome: ``lost`` is one that was sent and never answered; ``unreachable`` found nobody that listened, or
            nobody who took the connection before the listener closed.
        status: of the answer.
        ended_s: when the answer came, or the connection went.
        retry_after: whether the answer said when to come back.
    """

    tag: int
    due_s: float
    sent_s: float = 0.0
    outcome: Outcome = "open"
    status: int = 0
    ended_s: float = 0.0
    retry_after: bool = False

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.sent_s

    def take(self, answer: Answer) -> None:
        """Note the answer."""
        self.ended_s = time.monotonic()
        self.status = answer.status
        self.retry_after = b"retry-after" in answer.headers
        self.outcome = "refused"
        if answer.status == 200:
            self.outcome = "wrong" if fault_of(answer, self.tag, _ONE_ROW) else "answered"

    def end(self, outcome: Outcome) -> None:
        """Note that there is no answer."""
        self.outcome, self.ended_s = outcome, time.monotonic()


class _Peer(asyncio.Protocol):
    """One connection; it goes back among those at rest when its last answer has come."""

    def __init__(self, load: OpenLoad) -> None:
        self._load = load
        self._reader = AnswerReader()
        self.pending: collections.deque[Sample] = collections.deque()
        self.open = False
        self._is_known = False  # an answer came: the server has this connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.open = True

    def send(self, sample: Sample, wire: bytes) -> None:
        sample.sent_s = time.monotonic()
        self.pending.append(sample)
        self.transport.write(wire)

    def is_usable(self) -> bool:
        """Whether the server has not ended it, which this process, if it was held up, may not have been told yet."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return self.open and not self.transport.is_closing() and not poll.poll(0)

    def data_received(self, data: bytes) -> None:
        try:
            answers = self._reader.feed(data)
        except MalformedAnswer:
            self._wrong()
            return
        for answer in answers:
            if not self.pending:
                self._wrong()
                return
            self._is_known = True
            self.pending.popleft().take(answer)
            self.open = self.open and not answer.closes
        if self.open and not self.pending:
            self._load.rest(self)

    def _wrong(self) -> None:
        for sample in self.pending:
            sample.end("wrong")
        self.pending.clear()
        self._load.malformed += 1
        self.transport.abort()

    def eof_received(self) -> None:
        self.open = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        # A reset says that nobody read what was sent; where none ever did, the kernel alone had taken the connection.
        never_taken = isinstance(exc, ConnectionResetError) and not self._is_known
        for sample in self.pending:
            sample.end("unreachable" if never_taken else "lost")
        self.pending.clear()
        self._load.leave(self)


class OpenLoad:
    """A source of requests.

    Args:
        port: of the server, on this machine.
        rate_s: arrivals per second, on average.
        timeout_us: deadline of each request, in microseconds; 0 for none.
        seed: of the arrival times.
        most: connections.

    Attributes:
        samples: of all requests so far.
        malformed: connections on which something came that was no answer.
    """

    def __init__(self, port: int, rate_s: float, timeout_us: int = 0, seed: int = 1, most: int = 900) -> None:
        self._port = port
        self._rate_s = rate_s
        self._timeout_us = timeout_us
        self._chance = random.Random(seed)
        self._most = most
        self._idle: list[_Peer] = []
        self._peers: list[_Peer] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._next_tag = 0
        self.samples: list[Sample] = []
        self.malformed = 0

    async def run(self, seconds: float) -> None:
        """Send for so long; what is not answered by then stays open: see :meth:`settle`."""
        due_s = time.monotonic()
        end_s = due_s + seconds
        while due_s < end_s:
            due_s += self._chance.expovariate(self._rate_s)
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            self._send(due_s)

    async def settle(self, limit_s: float) -> None:
        """Wait for the answers that are still to come; those that do not are lost. Closes all connections."""
        end_s = time.monotonic() + limit_s
        while any(peer.pending for peer in self._peers) or self._connecting:
            if time.monotonic() > end_s:
                break
            await asyncio.sleep(0.02)
        for peer in self._peers:
            peer.transport.abort()
        await asyncio.sleep(0.05)
        for sample in self.samples:
            if sample.outcome == "open":
                sample.end("lost")

    def rest(self, peer: _Peer) -> None:
        """Told by a connection: it is free."""
        self._idle.append(peer)

    def leave(self, peer: _Peer) -> None:
        """Told by a connection: it is gone."""
        if peer in self._peers:
            self._peers.remove(peer)

    def _send(self, due_s: float) -> None:
        sample = Sample(self._next_tag, due_s)
        self._next_tag = (self._next_tag + 1) % 4_000_000
        self.samples.append(sample)
        wire = infer(sample.tag, _ONE_ROW, timeout_us=self._timeout_us)
        while self._idle:
            peer = self._idle.pop()
            if peer.is_usable():
                peer.send(sample, wire)
                return
        if len(self._peers) + len(self._connecting) >= self._most:
            busy = [peer for peer in self._chance.sample(self._peers, min(4, len(self._peers))) if peer.open]
            if busy:
                min(busy, key=lambda peer: len(peer.pending)).send(sample, wire)
                return
        task = asyncio.ensure_future(self._connect(sample, wire))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, sample: Sample, wire: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, peer = await loop.create_connection(lambda: _Peer(self), "127.0.0.1", self._port)
        except OSError:
            sample.sent_s = sample.due_s
            sample.end("unreachable")
            return
        self._peers.append(peer)
        if peer.open:
            peer.send(sample, wire)
        else:
            sample.end("unreachable")


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def outcomes(samples: list[Sample]) -> dict[str, int]:
    """How often each outcome was, with the statuses of the refusals."""
    found = collections.Counter(f"refused {s.status}" if s.outcome == "refused" else s.outcome for s in samples)
    return dict(sorted(found.items()))
