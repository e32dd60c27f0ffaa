"""Open-loop load on an engine: requests come at random times that do not wait for answers, as they do from a network.

A request's latency counts from the moment at which it was due, not from when it was sent. A sender that waits for a
stalled engine, and so leaves out the requests that would have fared worst, flatters it (coordinated omission; Tene,
"How NOT to Measure Latency").
"""

from __future__ import annotations

import functools
import math
import threading
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from onecard.arrivals import poisson_times
from onecard.errors import EngineError
from onecard.evidence import quantile
from onecard.models.wording import first_line
from onecard.runtime.engine import Engine
from onecard.runtime.future import Answer

Inputs = Mapping[str, Any]

_LONGEST_SLEEP_S = 0.05  # between two looks at the backlog
_PATIENCE_S = 60.0  # without an answer, before the engine counts as stuck


@dataclass(frozen=True)
class Load:
    """One run of the load generator.

    Args:
        rows_per_s: offered on average.
        rows: of each request.
        requests: how many.
        seed: equal seeds give equal arrival times.
        limit_s: of the p99; the run ends as soon as it cannot be kept any more. ``inf`` runs to the end.
    """

    rows_per_s: float
    rows: int
    requests: int
    seed: int = 0
    limit_s: float = math.inf

    @property
    def planned_s(self) -> float:
        """How long the requests take to come."""
        return self.requests * self.rows / self.rows_per_s


class LoadResult(NamedTuple):
    """What a run gave.

    Args:
        latencies_s: of each request, from when it was due to its answer; ``inf`` for one that was refused or failed.
            Those that were not sent, or not answered when the run was ended, are not in it.
        rows_per_s: answered, from when the first request was due to the last answer.
        late_s: how late the sender itself was, p99. Where it comes near the limit, it is the sender that is measured.
        ended: whether the run was ended because the limit could not be kept any more.
        error: the first thing that went wrong with a request, or empty.
    """

    latencies_s: list[float]
    rows_per_s: float
    late_s: float
    ended: bool
    error: str

    def quantile_ms(self, q: float) -> float:
        """Of the latencies; ``inf`` where it falls among those that failed, NaN where there are none."""
        value = 1e3 * quantile(self.latencies_s, q)
        return math.inf if math.isnan(value) and self.latencies_s else value

    def keeps(self, limit_s: float) -> bool:
        """Whether the p99 is within a limit."""
        return not self.ended and self.quantile_ms(0.99) <= 1e3 * limit_s


def arrivals(load: Load) -> list[float]:
    """When each request is due, in seconds from the start: a Poisson process."""
    return poisson_times(load.rows_per_s / load.rows, load.requests, load.seed)


def allowed_late(requests: int) -> int:
    """How many requests may be later than a limit while their p99 can still be within it."""
    return requests - 1 - math.floor(0.99 * (requests - 1))


def run_load(engine: Engine, requests: Sequence[Inputs], load: Load) -> LoadResult:
    """Send requests at random times, and wait for their answers.

    Args:
        engine: idle; it is idle again afterwards.
        requests: inputs of ``load.rows`` rows each, sent in turn; they are not changed.
        load: how many, and when.

    Raises:
        EngineError: the engine is broken, or stopped answering.
    """
    run = _Run(arrivals(load), load.limit_s)
    try:
        run.send(engine, requests)
        run.drain()
    except BaseException:
        run.give_up()
        raise
    if not engine.healthy:
        raise EngineError(f"the engine cannot go on: {run.error or 'its device is lost'}.")
    return run.result(load.rows)


class _Run:
    """The requests of one run: when they are due, which are under way, how late the others were.

    Args:
        due: seconds from the start, ascending.
        limit_s: see :class:`Load`.
    """

    def __init__(self, due: Sequence[float], limit_s: float) -> None:
        self._due = due
        self._limit_s = limit_s
        self._allowed = allowed_late(len(due)) if limit_s < math.inf else len(due)
        self._start = 0.0
        self._last = 0.0
        self._lock = threading.Lock()
        self._answered = threading.Event()  # set by every answer
        self._under_way: dict[int, Answer] = {}
        self._latencies_s: list[float] = []
        self._late = 0
        self._sent_late_s: list[float] = []
        self._ended = False
        self.error = ""

    def send(self, engine: Engine, requests: Sequence[Inputs]) -> None:
        """Send each when it is due; return early once too many are late."""
        self._start = time.perf_counter()
        for number, due in enumerate(self._due):
            while (wait_s := self._start + due - time.perf_counter()) > 0:
                if self._is_lost():
                    return
                time.sleep(min(wait_s, _LONGEST_SLEEP_S))
            if self._is_lost():
                return
            self._send(engine, requests[number % len(requests)], number)
            self._sent_late_s.append(time.perf_counter() - self._start - due)

    def drain(self) -> None:
        """Wait for the answers that are under way; once too many are late, only for those that are being run."""
        end = time.perf_counter() + _PATIENCE_S
        while self._under_way:
            if self._is_lost():
                self.give_up()
            self._answered.clear()
            if self._under_way and self._answered.wait(_LONGEST_SLEEP_S):
                end = time.perf_counter() + _PATIENCE_S
            elif self._under_way and time.perf_counter() > end:
                raise EngineError(f"{len(self._under_way)} requests: no answer for {_PATIENCE_S:.0f} s.")

    def give_up(self) -> None:
        """Take what waits out of the queue."""
        self._ended = True
        for answer in list(self._under_way.values()):
            answer.cancel()

    def result(self, rows: int) -> LoadResult:
        good = sum(s < math.inf for s in self._latencies_s)
        rate = good * rows / (self._last - self._due[0]) if good else 0.0
        return LoadResult(self._latencies_s, rate, quantile(self._sent_late_s, 0.99), self._ended, self.error)

    def _send(self, engine: Engine, inputs: Inputs, number: int) -> None:
        try:
            answer = engine.submit(inputs)
        except EngineError as error:  # refused: the queue is full, say
            self._add(math.inf, error)
            return
        self._under_way[number] = answer
        answer.add_done_callback(functools.partial(self._done, number))

    def _done(self, number: int, answer: Any) -> None:
        """On a thread of the engine, or on this one for an answer that was cancelled."""
        if answer.cancelled():
            self._under_way.pop(number, None)
            return
        error = answer.exception()
        now = time.perf_counter() - self._start
        self._add(now - self._due[number] if error is None else math.inf, error)
        self._under_way.pop(number, None)
        self._answered.set()

    def _add(self, latency_s: float, error: BaseException | None) -> None:
        with self._lock:
            self._last = max(self._last, time.perf_counter() - self._start)
            self._latencies_s.append(latency_s)
            self._late += latency_s > self._limit_s or latency_s == math.inf
            if error is not None and not self.error:
                self.error = first_line(error)

    def _is_lost(self) -> bool:
        """Whether the p99 cannot be kept any more, whatever comes.

        Of the requests that were due longer ago than the limit, those without an answer are late too. Any answer may
        be one of them, so that at least the difference is.
        """
        overdue = bisect_right(self._due, time.perf_counter() - self._start - self._limit_s)
        late = self._late + max(0, overdue - len(self._latencies_s))
        self._ended = self._ended or late > self._allowed
        return self._ended
