"""One run: the load's queries at their times, or one after another, on a target.

Open loops (server, offline) send when a request is due, whatever became of those before it, and latency counts from
then: a sender that waits for a stalled server leaves out the requests that would have fared worst (coordinated
omission; Tene, "How NOT to Measure Latency"). The streams of MLPerf, and the closed loop, wait by definition.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.bench.flow import Flow
from onecard.bench.load import Load, due_times
from onecard.bench.pacer import Pacer
from onecard.bench.records import Records
from onecard.bench.slo import Slo
from onecard.bench.target import Target

_HEAD_START_S = 0.02
_BURST = 32  # sent in one turn of the loop; then answers are looked at
_PAUSE_S = 0.01  # of a stream after a failure: not to hammer on a server that is down
_LOOK_S = 0.02
_ENOUGH_LATE = 3  # requests, before a run is given up


@dataclass
class Stop:
    """Whether to end early; set by Ctrl-C."""

    is_set: bool = False


@dataclass(frozen=True)
class Run:
    """What a run left behind, raw.

    Args:
        load: that was asked for.
        records: of the queries.
        start: of the schedule, by ``time.perf_counter``.
        end: when the last answer was there, or nobody waited any more.
        planned: queries that the schedule has; 0 where that depends on the answers.
        waited: requests for which there was no room when they were due.
        peak: most requests under way or waiting.
        given_up: whether it was ended since its objective was lost.
        interrupted: whether Ctrl-C ended it.
    """

    load: Load
    records: Records
    start: float
    end: float
    planned: int
    waited: int
    peak: int
    given_up: bool = False
    interrupted: bool = False


Observe = Callable[[int, int, float], None]
"""Told now and then: queries made, queries ended, seconds since the start."""


async def run_load(
    target: Target,
    requests: Sequence[Any],
    load: Load,
    stop: Stop,
    observe: Observe = lambda made, ended, seconds: None,
    give_up: Slo | None = None,
) -> Run:
    """Put a load on a target.

    Args:
        target: it answers, or refuses.
        requests: prepared by it, sent in turn.
        load: what to send when.
        stop: ends it early.
        observe: told of the progress.
        give_up: an open loop ends as soon as this objective cannot be kept any more.
    """
    made = _OpenLoop(target, requests, load, give_up) if load.is_open else _Streams(target, requests, load)
    flow = made.flow
    start = time.perf_counter() + _HEAD_START_S
    made.begin(start)
    while not made.is_done and not stop.is_set:
        await asyncio.sleep(_LOOK_S)
        made.look()
        observe(len(flow.records), flow.ended, time.perf_counter() - start)
    made.close()
    given_up = made.is_lost
    await flow.drain(load.drain_s, lambda: stop.is_set)
    return Run(
        load, flow.records, start, time.perf_counter(), made.planned, flow.waited, flow.peak, given_up, stop.is_set
    )


class _OpenLoop:
    """Requests at the times of a schedule.

    Args:
        target: where to.
        requests: sent in turn.
        load: with the schedule.
        objective: ends the run once it is lost.
    """

    def __init__(self, target: Target, requests: Sequence[Any], load: Load, objective: Slo | None) -> None:
        self._due = due_times(load)
        self._length_s = load.duration_s if load.scenario == "server" and not load.requests else 0.0
        self._objective = objective
        self._allowed = objective.allowed_late(len(self._due)) + _ENOUGH_LATE if objective else 0
        self._late = 0
        self._next = 0
        self._start = 0.0
        self._pacer = Pacer(asyncio.get_running_loop(), self._send)
        self.flow = Flow(target, requests, load.most_in_flight, self._note)
        self.planned = len(self._due)
        self.is_done = False
        self.is_lost = False

    def begin(self, start: float) -> None:
        self._start = start
        self._pacer.set(start + (self._due[0] if self._due else self._length_s))

    def close(self) -> None:
        self._pacer.close()

    def look(self) -> None:
        """End the run if too many are late: those that were, and those still without an answer that are overdue."""
        if self._objective is None:
            return
        now_s = time.perf_counter() - self._start
        overdue = bisect_right(self._due, now_s - self._objective.limit_s, hi=self._next) - self.flow.ended
        self.is_lost = self._late + max(0, overdue) > self._allowed
        if self.is_lost:
            self.is_done = True

    def _send(self) -> None:
        if self.is_done:
            return
        start, due = self._start, self._due
        last = min(self._next + _BURST, len(due))
        while self._next < last and start + due[self._next] <= time.perf_counter():
            self._next += 1
            self.flow.ask(start + due[self._next - 1])
        if self._next < len(due):
            self._pacer.set(start + due[self._next])
        elif (end := start + self._length_s) > time.perf_counter():
            self._pacer.set(end)
        else:
            self.is_done = True

    def _note(self, number: int, answered: bool) -> None:
        records = self.flow.records
        if self._objective is not None:
            late_s = records.ended[number] - records.due[number]
            self._late += not answered or late_s > self._objective.limit_s


class _Streams:
    """Queries one after another, on one stream or several.

    Args:
        target: where to.
        requests: sent in turn.
        load: how many streams, and requests a query.
    """

    planned = 0
    is_lost = False

    def __init__(self, target: Target, requests: Sequence[Any], load: Load) -> None:
        self._streams = load.concurrency if load.scenario == "closed-loop" else 1
        self._samples = load.samples if load.scenario == "multi-stream" else 1
        self._left = load.requests or -1  # queries to be made
        self._length_s = load.duration_s
        self._end = 0.0
        self._loop = asyncio.get_running_loop()
        self.flow = Flow(target, requests, max(load.most_in_flight, self._samples, self._streams), self._note)
        self.is_done = False

    def begin(self, start: float) -> None:
        self._end = start + self._length_s
        for _ in range(self._streams):
            self._loop.call_later(start - time.perf_counter(), self._ask)

    def close(self) -> None:
        self._left = 0

    def look(self) -> None:
        if time.perf_counter() >= self._end:
            self.is_done = True

    def _ask(self) -> None:
        now = time.perf_counter()
        if self._left == 0 or now >= self._end or self.is_done:
            self.is_done = True
            return
        self._left -= 1
        self.flow.ask(now, self._samples)

    def _note(self, number: int, answered: bool) -> None:
        if answered:
            self._ask()
        else:
            self._loop.call_later(_PAUSE_S, self._ask)
