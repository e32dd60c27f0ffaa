"""Requests become batches: the queue of one model, and what to run of it now. No threads, clock or tensors in here.

Every method that depends on it takes the time as ``now``, in seconds of ``time.monotonic``; all must be called under
one lock. The engine calls :meth:`Batcher.expire` and then :meth:`Batcher.next` whenever a batch could start, and again
when a request was put or at :meth:`Batcher.wake_at`.

The order of the queue is told in :mod:`onecard.runtime.fair`, which of its rows go together in
:mod:`onecard.runtime.cut`, and when they run in :mod:`onecard.runtime.due`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onecard.runtime.cost import Costs
from onecard.runtime.cut import Plan
from onecard.runtime.deadlines import Deadlines
from onecard.runtime.due import Rest, decide
from onecard.runtime.fair import Drawn, FairQueue
from onecard.runtime.kinds import Kind, Kinds, Sizes
from onecard.runtime.limits import BatchPolicy, Bounds, check_deadline
from onecard.runtime.work import Batch, Slice, Work

_MOST_OTHERS = 64  # requests of other lengths that are looked at for one batch


class Batcher:
    """The queue of one model, and its batches.

    Args:
        sizes: what the model takes.
        costs: what its runs take.
        policy: delays, preferred counts and bounds.
        lanes: how many batches run side by side, each at the predicted speed; what waits is over so much sooner.
        places: how many requests began with the queue that this one replaces, and may yet be put back.
    """

    def __init__(
        self, sizes: Sizes, costs: Costs, policy: BatchPolicy | None = None, lanes: int = 1, places: int = 0
    ) -> None:
        self._policy = policy or BatchPolicy()
        self._lanes = lanes
        self._costs = costs
        self._kinds = Kinds(sizes, costs, self._policy)
        self._queue = FairQueue(self._policy.max_clients)
        self._deadlines = Deadlines()
        self._bounds = Bounds(self._policy)
        self._rest = Rest(self._policy, until=-math.inf)
        self._busy_until = -math.inf
        self.places = places  # given out so far, one to each request that began

    @property
    def queued_items(self) -> int:
        """Requests that wait, wholly or in part."""
        return self._bounds.items

    @property
    def queued_bytes(self) -> int:
        """Bytes of the inputs of these requests, each counted whole."""
        return self._bounds.nbytes

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._bounds.rows

    def predicted_wait_s(self, priority: int = 0) -> float:
        """Predicted device seconds of all that waits in a priority and above it: of all lanes, none in flight."""
        return self._queue.queued_s(priority)

    def put(self, work: Work, now: float) -> None:
        """Let a new request wait.

        An idle engine refuses nothing for a prediction: one that is never tried would never be put right. Nor does
        the run of lengths that were never measured count against a deadline.

        Args:
            work: the request; never put before.
            now: the time.

        Raises:
            QueueFullError: requests, bytes or predicted wait would be above their bound; ``retry_after_s`` is when
                they are predicted to be within it.
            DeadlineError: its deadline has passed, or is predicted to pass before its answer; by how much.
            UsageError: it has more bytes than may wait at all.
        """
        kind = self._kinds.of(work.lengths)
        work.kind = kind
        work.row_s = kind.row_s()
        self._admit(work, kind, now)
        self._enter(work, work.rows)
        self._queue.push(work)
        if self._rest.until > now:
            self._rest.stir(work)

    def at_once(self, works: Sequence[Work], now: float, most_s: float) -> Batch | None:
        """A batch of new requests that are not queued, for an idle device; None if any reason to queue them is there.

        Args:
            works: in their order; none of them put before.
            now: the time.
            most_s: that the batch may take by prediction.
        """
        policy = self._policy
        if self._bounds.items or policy.max_delay_s or policy.max_tokens is not None:
            return None
        kind = self._kinds.of(works[0].lengths)
        rows = nbytes = 0
        for work in works:
            if work.deadline <= now or (work.lengths is not works[0].lengths and work.lengths != works[0].lengths):
                return None
            rows += work.rows
            nbytes += work.nbytes
        if rows > kind.limit or nbytes > policy.queue_bytes or not (rows in kind.cuts or rows <= kind.uncut):
            return None
        if kind.seconds(rows) > most_s:
            return None
        row_s = kind.row_s()
        for work in works:
            work.kind, work.row_s, work.taken = kind, row_s, work.rows
            work.place = self.places = self.places + 1
        slices = [Slice(work, 0, work.rows) for work in works]
        return Batch(slices, rows, works[0].lengths, dict(kind.fit(rows)[0]))

    def next(self, now: float, in_flight_s: float = 0.0) -> Batch | None:
        """The batch to run now.

        Args:
            now: the time.
            in_flight_s: how long the device is predicted to be busy with batches given out before.

        Returns:
            The batch, its rows taken from the queue; None if nothing waits or it is better to wait for more.
        """
        self._busy_until = now + in_flight_s
        rest = self._rest
        if not self._bounds.rows or now + max(0.0, in_flight_s - rest.in_flight_s) < rest.until:
            return None
        window: list[Drawn] = []
        batch: Batch | None = None
        run_s = 0.0
        try:
            crowded = self._look(window, now)
            dated = self._deadlines.waiting > 0
            decided = decide(window, crowded, dated, self._policy, now, in_flight_s)
            if isinstance(decided, Rest):
                self._rest = decided
            else:
                run_s = decided[0].kind.seconds(decided[1])
                batch, taken = self._make(window, *decided)
        finally:  # what was drawn is not lost, even if the model's sizes raise
            self._queue.settle(window, [0] * len(window) if batch is None else taken, run_s)
        if batch is not None:
            self._take(batch)
            self._busy_until += run_s
            self._rest.until = -math.inf
        return batch

    def wake_at(self, now: float) -> float:
        """When :meth:`next` or :meth:`expire` may have something, though nothing comes.

        Args:
            now: the time.

        Returns:
            The moment: ``now`` if at once, ``inf`` if never.
        """
        if not self._bounds.rows:
            return math.inf
        return max(now, min(self._rest.until, self._deadlines.first()))

    def cancel(self, work: Work) -> None:
        """Nobody waits for a request any more: its rows that no batch has are not run, and count no more."""
        work.gone = True
        if work.queued:
            self._queue.forget(work, self._bounds.items - 1)
            self._bounds.rows -= work.queued
            work.queued = 0
            self._leave(work)

    def expire(self, now: float, in_flight_s: float = 0.0) -> list[Work]:
        """Give up the requests that wait, wholly or in part, though their deadline has passed.

        Where more waits than one batch takes, those go too that would be late even if they were run next and alone:
        their place is another's that is still in time. Behind the first that is in time none is looked for.

        Args:
            now: the time.
            in_flight_s: how long every device is predicted to be busy with batches given out before.

        Returns:
            These requests, the earliest deadline first, each once.
        """
        given_up: list[Work] = []
        first = self._deadlines.first_work()
        crowded = first is not None and self._bounds.items > 1 and self._bounds.rows > first.kind.limit
        while first is not None and first.deadline <= (now + in_flight_s + first.kind.least_s() if crowded else now):
            self.cancel(first)
            given_up.append(first)
            first = self._deadlines.first_work()
        return given_up

    def has_late(self, now: float) -> bool:
        """Whether :meth:`expire` might give something up."""
        return self._deadlines.waiting > 0 and self._deadlines.first() <= now

    def clear(self) -> list[Work]:
        """Give up all that waits, for an engine that closes.

        Returns:
            The requests, in no order, each once.
        """
        waiting = {id(work): work for work in (*self._queue.works(), *self._deadlines.works())}
        for work in waiting.values():
            self.cancel(work)
        return list(waiting.values())

    def put_back(self, batch: Batch) -> None:
        """A batch did not run: its rows are the first of their priority again.

        Of all rows that were put back, those of the request whose first rows ran first come first, in their order.
        Nothing is refused for it, though the bounds may then be passed.

        Args:
            batch: from :meth:`next`, put back once. Rows of requests that are gone by now are dropped.
        """
        for work, start, rows in batch.slices:
            if not work.gone:
                self._queue.push_back(work, start, rows)
                self._enter(work, rows)
        self._rest.until = -math.inf

    def shrink(self, size: Mapping[str, int]) -> bool:
        """A size ran out of memory: it, and any at least as large in every symbol, is not made again.

        Where any row count runs as it is, at most half as many rows are run from now on.

        Args:
            size: what was run, padding included.

        Returns:
            False if there is nothing smaller for its lengths: such rows cannot be run here.
        """
        self._rest.until = -math.inf
        return self._kinds.shrink(size)

    def observe(self, size: Mapping[str, int], seconds: float) -> None:
        """Take in how long a run took.

        Args:
            size: what was run, padding included.
            seconds: of the device.
        """
        self._costs.observe(size, seconds)
        if self._rest.deadline != math.inf:
            self._rest.until = -math.inf

    def _admit(self, work: Work, kind: Kind, now: float) -> None:
        """Refuse what is too much, or would be too late."""
        policy, bounds = self._policy, self._bounds
        busy_s = max(0.0, self._busy_until - now)
        if bounds.full_for(work):
            bounds.refuse(work, busy_s + self._queue.queued_s() / self._lanes)
        dated = work.deadline != math.inf
        if dated or policy.queue_wait_s != math.inf:
            ahead_s = self._queue.wait_s(work) / self._lanes
            wait_s = busy_s + ahead_s
            if dated and (wait_s > 0 or work.deadline <= now):
                check_deadline(work, now, wait_s, busy_s + kind.end_s(ahead_s, work.rows))
            if wait_s > policy.queue_wait_s:
                bounds.refuse_wait(wait_s)

    def _enter(self, work: Work, rows: int) -> None:
        """Rows begin to wait."""
        if not work.queued:
            self._bounds.items += 1
            self._bounds.nbytes += work.nbytes
            if work.deadline != math.inf:
                self._deadlines.enter(work)
        self._bounds.rows += rows
        work.queued += rows

    def _take(self, batch: Batch) -> None:
        """The rows of a batch wait no more."""
        self._bounds.rows -= batch.rows
        for work, _, rows in batch.slices:
            if work.place < 0:
                work.place = self.places = self.places + 1
            work.queued -= rows
            if work.queued == 0:
                self._leave(work)

    def _leave(self, work: Work) -> None:
        """A request waits no more."""
        self._bounds.items -= 1
        self._bounds.nbytes -= work.nbytes
        if work.deadline != math.inf:
            self._deadlines.leave()

    def _look(self, window: list[Drawn], now: float) -> bool:
        """Draw the next rows in order, as many as one batch needs; whether more wait than are looked at."""
        first: Kind | None = None
        rows = others = 0
        for drawn in self._queue.draw(now):
            window.append(drawn)
            kind: Kind = drawn[0].kind
            if kind.stamp != self._kinds.stamp:
                self._kinds.refresh(kind)
            if first is None:
                first = kind
            if kind is first:
                rows += drawn[2]
                if rows >= kind.limit:
                    break
            else:
                others += 1
                if others >= _MOST_OTHERS:
                    return True
        return False

    def _make(self, window: Sequence[Drawn], plan: Plan, rows: int) -> tuple[Batch, list[int]]:
        """A batch of a plan's first rows, and how many rows of each of the drawn are in it."""
        slices: list[Slice] = []
        taken = [0] * len(window)
        lengths = window[plan.picks[0]][0].lengths
        left = rows
        for at in plan.picks:
            work, start, count, _, _ = window[at]
            if work.lengths is not lengths:
                lengths = tuple(map(max, lengths, work.lengths))
            if count >= left:  # what is beyond stays in the queue
                slices.append(Slice(work, start, left))
                taken[at] = left
                break
            slices.append(Slice(work, start, count))
            taken[at] = count
            left -= count
        return Batch(slices, rows, lengths, dict(plan.kind.fit(rows)[0])), taken
