"""What all threads of an engine share: the queue behind one lock, and who is to be woken when."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from onecard.errors import DeadlineError, EngineClosedError, EngineError, OnecardError, UsageError
from onecard.runtime.batcher import Batcher
from onecard.runtime.cost import Costs
from onecard.runtime.faults import again, explained
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.request import Request
from onecard.runtime.served import Served
from onecard.runtime.work import Batch, Work
from onecard.spec import Bucket

_LEAD_S = 0.0005  # waking a thread up and launching a batch
_WEIGHT = 0.2  # of a new copy-in time in the mean


@dataclass(slots=True)
class _LaneState:
    """What one lane is at: when its batches under way began, until when by prediction, what it must run before all.

    ``lent`` while another thread than its own runs it.
    """

    began: dict[Batch, float] = field(default_factory=dict)
    busy_until: float = 0.0
    lead_s: float = _LEAD_S
    retries: deque[Batch] = field(default_factory=deque)
    lent: bool = False

    @property
    def under_way(self) -> int:
        return len(self.began)


class Dispatch:
    """The batcher made safe for threads.

    No future is ever resolved under the lock: its callbacks are the callers' own code, and may come back in here.

    While a lane's device is busy, a batch that is not full is formed only just before the device is free: it starts
    no later for it, and all that comes meanwhile shares it.

    Args:
        served: says what may share a batch.
        policy: delays and bounds.
        costs: predicted seconds of each size.
        lanes: how many there are.
    """

    def __init__(self, served: Served, policy: BatchPolicy, costs: Costs, lanes: int) -> None:
        self._served = served
        self._costs = costs
        self._policy = policy
        self._batcher = Batcher(served, costs, policy, lanes)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._lanes = [_LaneState() for _ in range(lanes)]
        self._too_large: list[Bucket] = []
        self._closing = False
        self._broken: EngineError | None = None
        self._full_rows = self._find_full_rows()

    # for callers

    def put(self, work: Work) -> None:
        """Queue a request, and have the lanes look at it.

        Raises:
            QueueFullError: too much is waiting.
            DeadlineError: it could not be answered in time.
            EngineClosedError: nothing is taken on any more.
            EngineError: the device was lost.
        """
        with self._lock:
            self._check_open()
            if not work.gone:
                self._batcher.put(work, work.arrived)
            self._wake.notify(len(self._lanes))  # one alone might be a lane that is busy, and would sleep on

    def wake(self) -> None:
        """Have the lanes look at what :meth:`put_all` queued."""
        with self._lock:
            self._wake.notify(len(self._lanes))

    def cancel(self, work: Work) -> None:
        """Take a request out of the queue."""
        with self._lock:
            self._batcher.cancel(work)
            _forget(work)

    def predicted_wait_s(self, priority: int) -> float:
        """How long a request that came now would wait for its turn."""
        with self._lock:
            now = time.monotonic()
            free_in_s = min(max(0.0, lane.busy_until - now) if lane.under_way else 0.0 for lane in self._lanes)
            return free_in_s + self._batcher.predicted_wait_s(priority) / len(self._lanes)

    @property
    def queued(self) -> tuple[int, int, int]:
        """Requests, rows and bytes that wait."""
        return self._batcher.queued_items, self._batcher.queued_rows, self._batcher.queued_bytes

    @property
    def under_way(self) -> int:
        """Batches that are staged or run."""
        return sum(lane.under_way for lane in self._lanes)

    @property
    def running_s(self) -> float:
        """For how long the oldest batch that is under way has been; 0.0 if none is."""
        with self._lock:
            oldest = min((began for lane in self._lanes for began in lane.began.values()), default=None)
        return 0.0 if oldest is None else time.monotonic() - oldest

    @property
    def broken(self) -> EngineError | None:
        """Why nothing can be answered any more, if so."""
        return self._broken

    # for lanes

    def take(self, number: int, room: threading.Semaphore | None = None) -> Batch | None:
        """Wait for something to run.

        Args:
            number: of the lane that asks.
            room: counts the batches that the lane may still have under way; one is taken with the batch. None for a
                lane that has one at a time anyway.

        Returns:
            A batch, or None when the engine closes and nothing waits any more.
        """
        if room is not None:
            room.acquire()
        while True:
            batch, late, done = self._next(self._lanes[number])
            for work in late:
                fail(
                    work,
                    DeadlineError(f"its deadline passed after {time.monotonic() - work.arrived:.3f} s of waiting."),
                )
            if batch is None and not done:
                continue
            if batch is None and room is not None:
                room.release()
            return batch

    def put_all(self, works: Sequence[Work], number: int | None, most_s: float = 0.0) -> Batch | None:
        """Queue requests that came together, or form a batch of them past the queue.

        Past it they go if nothing waits, the lane is idle, they make one batch, and that will be quick: whatever the
        order of the queue would be, it would be over at once. As of :meth:`lend` the calling thread then has the lane.

        Args:
            works: none of them put before; one that is refused fails, and one cancelled meanwhile is dropped.
            number: of the lane, which has one batch at a time and is the only one; None to queue them all.
            most_s: see :meth:`lend`.

        Returns:
            What to run; None if they were queued, and :meth:`wake` or :meth:`lend` is to follow.

        Raises:
            EngineClosedError: nothing is taken on any more; none of them was.
            EngineError: the device was lost; likewise.
        """
        refused: list[tuple[Work, Exception]] = []
        with self._lock:
            self._check_open()
            batch = None if number is None else self._at_once(works, self._lanes[number], most_s)
            if batch is None:
                for work in works:
                    if work.gone:
                        continue
                    try:
                        self._batcher.put(work, work.arrived)
                    except Exception as error:  # whatever the model's sizes raise: the others are queued already
                        refused.append((work, error))
        for work, refusal in refused:
            fail(work, refusal if isinstance(refusal, OnecardError) else explained(refusal))
        return batch

    def _at_once(self, works: Sequence[Work], lane: _LaneState, most_s: float) -> Batch | None:
        """Under the lock: a batch of requests that need not be queued."""
        if lane.lent or lane.began or lane.retries or any([work.gone for work in works]):
            return None
        now = time.monotonic()
        batch = self._batcher.at_once(works, now, most_s)
        if batch is None:
            return None
        lane.lent = True
        self._begin(lane, batch, now)
        return batch

    def lend(self, number: int, most_s: float, again: bool) -> Batch | None:
        """Form the next batch of an idle lane for another thread than the lane's to run, if that will be quick.

        The thread that runs it is to ask again until there is none: until then the lane's own is kept waiting.

        Args:
            number: of the lane, which has one batch at a time.
            most_s: a batch that is predicted to take longer is left to the lane's own thread.
            again: whether the calling thread got the lane's last batch, too.

        Returns:
            None if the lane is at something, or nothing is due. Then the lane sees to what waits.
        """
        lane = self._lanes[number]
        with self._lock:
            if lane.lent and not again:
                return None  # whoever has it asks again
            lane.lent = False
            if lane.began:
                return None
            now = time.monotonic()
            batch = None
            if not (lane.retries or self._closing or self._batcher.has_late(now)):
                batch = self._batcher.next(now)
            if batch is not None:
                if self._costs.seconds(self._costs.key(batch.size)) <= most_s:
                    lane.lent = True
                    self._begin(lane, batch, now)
                    return batch
                lane.retries.append(batch)
            if lane.retries or self._closing or self._batcher.queued_items:
                self._wake.notify(len(self._lanes))
            return None

    def recall(self, number: int) -> None:
        """The thread that a lane is lent to will not ask again: the lane's own goes on."""
        with self._lock:
            self._lanes[number].lent = False
            self._wake.notify_all()

    def stopped(self, number: int, batch: Batch) -> None:
        """A batch of a lane ended, with answers or without; nothing if it is known to have."""
        with self._lock:
            self._stop(self._lanes[number], batch)

    def ran(self, number: int, batch: Batch, seconds: float, lead_s: float) -> None:
        """A batch was answered.

        Args:
            number: of the lane.
            batch: what was run.
            seconds: that the device was at it; ``nan`` if nobody measured.
            lead_s: what went before, from forming the batch to its being on the device.
        """
        with self._lock:
            self._batcher.observe(batch.size, seconds)
            lane = self._lanes[number]
            lane.lead_s += _WEIGHT * (lead_s + _LEAD_S - lane.lead_s)
            self._stop(lane, batch)

    def put_back(self, batch: Batch) -> None:
        """A batch did not run; its rows are the first again."""
        with self._lock:
            self._batcher.put_back(batch)
            self._wake.notify_all()

    def retry(self, number: int, batches: Sequence[Batch]) -> None:
        """Run these on a lane before anything else."""
        with self._lock:
            self._lanes[number].retries.extend(batches)
            self._wake.notify_all()

    def shrink(self, size: Bucket) -> bool:
        """A size does not fit in memory; False if there is none that is smaller."""
        with self._lock:
            smaller = self._batcher.shrink(size)
            if smaller:
                self._too_large.append(size)
            return smaller

    def runs(self, size: Bucket) -> bool:
        """Whether a size may still be run."""
        return not any(all(size[name] >= n for name, n in other.items()) for other in self._too_large)

    def know(self, size: Bucket, seconds: float) -> None:
        """How long a size takes, before anything is queued."""
        with self._lock:
            self._batcher.observe(size, seconds)

    # from the outside

    def reconfigure(self, policy: BatchPolicy) -> None:
        """Go on by another policy.

        Raises:
            UsageError: requests are waiting.
        """
        with self._lock:
            if self._batcher.queued_items:
                raise UsageError("the policy cannot change while requests wait.", "Wait for their answers first.")
            self._batcher = Batcher(self._served, self._costs, policy, len(self._lanes), self._batcher.places)
            for size in self._too_large:
                self._batcher.shrink(size)
            self._policy = policy
            self._full_rows = self._find_full_rows()

    def break_off(self, error: EngineError) -> None:
        """The device is lost: nothing is taken on, and all that waits fails."""
        with self._lock:
            self._broken = error
        for work in self.abandon():
            fail(work, again(error))

    def close(self) -> None:
        """Take nothing on any more; what waits is still run."""
        with self._lock:
            self._closing = True
            self._wake.notify_all()

    def abandon(self) -> list[Work]:
        """Take all that waits out of the queue."""
        with self._lock:
            left = self._batcher.clear()
            for lane in self._lanes:
                left += [piece.work for batch in lane.retries for piece in batch.slices]
                lane.retries.clear()
            self._wake.notify_all()
            return left

    def _next(self, lane: _LaneState) -> tuple[Batch | None, Sequence[Work], bool]:
        """Wait for a batch, deadlines that passed, or the end of all."""
        with self._lock:
            while True:
                now = time.monotonic()
                if lane.lent:
                    self._wake.wait()
                    continue
                late = self._batcher.expire(now, min([self._busy_s(each, now) for each in self._lanes]))
                hold_until = self._hold(lane, now)
                batch = None
                if lane.retries:
                    batch = lane.retries.popleft()
                elif hold_until <= now:
                    batch = self._batcher.next(now, self._busy_s(lane, now))
                if batch is not None:
                    self._begin(lane, batch, now)
                done = (
                    self._closing and not self._batcher.queued_items and (self._is_idle() or self._broken is not None)
                )
                if batch is not None or late or done:
                    return batch, late, done
                wake_at = max(self._batcher.wake_at(now), hold_until) if self._batcher.queued_items else math.inf
                self._wake.wait(None if wake_at == math.inf else max(0.0, wake_at - now))

    def _check_open(self) -> None:
        """Under the lock: raise why nothing is taken on any more, if so."""
        if self._broken is not None:
            raise again(self._broken)
        if self._closing:
            raise EngineClosedError("this engine is closed.", "Open it again.")

    def _is_idle(self) -> bool:
        """Whether no lane has anything that could still come back to be run again."""
        return not any(lane.under_way or lane.retries for lane in self._lanes)

    def _hold(self, lane: _LaneState, now: float) -> float:
        """Until when a batch that is not full would only wait on the device, and had better grow here."""
        if not lane.under_way or self._batcher.queued_rows >= self._full_rows:
            return now
        return lane.busy_until - lane.lead_s

    def _busy_s(self, lane: _LaneState, now: float) -> float:
        return max(0.0, lane.busy_until - now) if lane.under_way else 0.0

    def _begin(self, lane: _LaneState, batch: Batch, now: float) -> None:
        seconds = self._costs.seconds(self._costs.key(batch.size))
        lane.busy_until = now + self._busy_s(lane, now) + seconds
        lane.began[batch] = now

    def _stop(self, lane: _LaneState, batch: Batch) -> None:
        lane.began.pop(batch, None)
        if not lane.under_way:
            lane.busy_until = 0.0
        if not lane.lent:
            self._wake.notify_all()

    def _find_full_rows(self) -> int:
        spec = self._served.spec
        largest = tuple(n for name, n in spec.largest().items() if name != spec.batch_symbol)
        rows = self._served.max_rows(self._served.lengths_of(largest))
        return min(rows, self._policy.max_rows or rows)


def fail(work: Work, error: BaseException) -> None:
    """Answer a request with an error, unless it is answered already."""
    work.gone = True
    request: Request | None = work.request
    if request is None:  # cancelled a moment ago, and forgotten
        return
    request.receiver.fail(error)
    _forget(work)


def _forget(work: Work) -> None:
    """Let go of the inputs of a request that is over: the queue drops its entry only when it comes upon it."""
    if not work.taken:  # else a batch may be reading them
        work.request = None
