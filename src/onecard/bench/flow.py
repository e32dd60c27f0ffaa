"""Requests on their way to a target: sent as soon as there is room, noted when they end."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from onecard.bench.records import ANSWERED, Records
from onecard.bench.target import Target

_LOOK_S = 0.02


class Flow:
    """Sends the requests of one run.

    More than ``most`` are never under way. What comes beyond waits its turn in here, and waits at the target's expense:
    latency counts from when a request was due.

    Args:
        target: where to.
        requests: prepared ones, sent in turn.
        most: under way at once.
        on_end: told the number of each query that ends, and whether it was answered.

    Attributes:
        records: of the queries.
        waited: requests that had to wait for room.
        peak: most requests that were under way or waiting.
        ended: queries whose answers are all there, or that failed.
    """

    def __init__(
        self,
        target: Target,
        requests: Sequence[Any],
        most: int,
        on_end: Callable[[int, bool], None] = lambda number, answered: None,
    ) -> None:
        self._target = target
        self._requests = requests
        self._most = most
        self._on_end = on_end
        self._waiting: deque[int] = deque()
        self._under_way = 0
        self._next = 0
        self._is_over = False
        self.records = Records()
        self.waited = 0
        self.peak = 0
        self.ended = 0

    @property
    def open(self) -> int:
        """Requests under way or waiting."""
        return self._under_way + len(self._waiting)

    def ask(self, due: float, requests: int = 1) -> None:
        """Make a query that is due now, of one or more requests."""
        number = self.records.add(due, requests)
        self.records.taken[number] = time.perf_counter()
        for _ in range(requests):
            if self._under_way < self._most:
                self._send(number)
            else:
                self.waited += 1
                self._waiting.append(number)
        self.peak = max(self.peak, self.open)

    async def drain(self, limit_s: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until everything is answered, or for so long; after it nothing is sent or noted any more."""
        end = time.perf_counter() + limit_s
        while self.open and not stopped() and time.perf_counter() < end:
            await asyncio.sleep(_LOOK_S)
        self.give_up()

    def give_up(self) -> None:
        """Forget what is not answered: it stays :data:`onecard.bench.records.OPEN`."""
        self._is_over = True
        self._waiting.clear()

    def _send(self, number: int) -> None:
        self._under_way += 1
        request = self._requests[self._next]
        self._next = (self._next + 1) % len(self._requests)
        self.records.sent[number] = time.perf_counter()
        self._target.send(request, partial(self._end, number))

    def _end(self, number: int, outcome: str, when: float) -> None:
        self._under_way -= 1
        if self._is_over:
            return
        is_whole = self.records.end(number, outcome, when)
        if self._waiting:
            self._send(self._waiting.popleft())
        if is_whole:
            self.ended += 1
            self._on_end(number, self.records.outcomes[number] == ANSWERED)
