"""Whatever happens in whatever order: every row runs once, bounds hold, and the counters are true."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from onecard.errors import DeadlineError, QueueFullError
from onecard.runtime.batcher import Batcher
from onecard.runtime.cost import Costs
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.work import Batch, Work
from tests.unit.runtime.batching import Buckets, Free, check, linear, symbols

SIZES: list[Buckets | Free] = [
    Buckets((1, 2, 4, 8)),
    Buckets((4, 8), (16, 64)),
    Buckets((1, 3, 6), (8, 16, 32, 64)),
    Free(1),
    Free(7),
    Free(5, has_lengths=True),
]
POLICIES = st.builds(
    BatchPolicy,
    max_delay_s=st.sampled_from([0.0, 0.5, 3.0]),
    preferred=st.sampled_from([(), (2,), (3, 5)]),
    max_rows=st.sampled_from([None, 3, 6]),
    max_tokens=st.sampled_from([None, 64, 200]),
    queue_items=st.sampled_from([5, 50]),
    queue_bytes=st.sampled_from([100, 10_000]),
    queue_wait_s=st.sampled_from([4.0, math.inf]),
    max_clients=st.sampled_from([1, 50]),
)


@dataclass(eq=False)
class Known:
    """What the test itself knows of a request: which rows wait, run, and have run."""

    work: Work
    waiting: set[int] = field(default_factory=set)
    running: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)


class Anything(RuleBasedStateMachine):
    """Random calls, with sets of rows kept beside."""

    works = Bundle("works")
    batches = Bundle("batches")

    @initialize(sizes=st.sampled_from(SIZES), policy=POLICIES, measured=st.booleans())
    def start(self, sizes, policy, measured):
        self.sizes, self.policy = sizes, policy
        costs = Costs(symbols(sizes), "B", linear(sizes, 0.2, 0.01) if measured else ())
        self.queue = Batcher(sizes, costs, policy)
        self.now = 100.0
        self.known: dict[int, Known] = {}

    def teardown(self):
        """All that is left runs, and the queue is empty as it was."""
        if not hasattr(self, "queue"):
            return
        self.now += 10.0
        self.expire()
        while batch := self.queue.next(self.now):
            self.account(batch)
        assert all(not each.waiting for each in self.known.values() if not each.work.gone)
        assert (self.queue.queued_items, self.queue.queued_rows, self.queue.queued_bytes) == (0, 0, 0)
        assert self.queue.wake_at(self.now) == math.inf
        assert self.queue.predicted_wait_s(10) < 1e-6

    def account(self, batch: Batch) -> None:
        """Every row of a batch was waiting, and now runs; a request's rows come in order."""
        check(batch, self.sizes, self.policy)
        last: dict[int, int] = {}
        for work, start, rows in batch.slices:
            known = self.known[id(work)]
            assert not work.gone
            assert work.deadline > self.now
            found = set(range(start, start + rows))
            assert found <= known.waiting, "a row runs twice, or was never there"
            assert start > last.get(id(work), -1)
            last[id(work)] = start
            assert min(known.waiting) == start, "a later row of a request overtakes"
            known.waiting -= found
            known.running |= found

    @rule(
        target=works,
        rows=st.integers(1, 20),
        length=st.integers(1, 64),
        nbytes=st.integers(0, 60),
        patience_s=st.sampled_from([math.inf, math.inf, 0.3, 2.0, 8.0]),
        priority=st.integers(0, 2),
        client=st.sampled_from("abc"),
    )
    def put(self, rows, length, nbytes, patience_s, priority, client):
        lengths = (length,) if len(symbols(self.sizes)) == 2 else ()
        work = Work(rows, lengths, nbytes, self.now, self.now + patience_s, priority, client)
        try:
            self.queue.put(work, self.now)
        except (QueueFullError, DeadlineError) as error:
            assert getattr(error, "retry_after_s", 0.0) >= 0.0
            assert self.queue.queued_items or not math.isinf(self.policy.queue_wait_s) or patience_s < math.inf
            work.gone = True
            return work
        self.known[id(work)] = Known(work, set(range(rows)))
        return work

    @rule(target=batches, in_flight_s=st.sampled_from([0.0, 0.7]))
    def next(self, in_flight_s):
        expected = self.policy.max_delay_s == 0 and any(self.live(True))
        batch = self.queue.next(self.now, in_flight_s)
        if batch is None:
            assert not expected, "work-conserving"
            waited = [self.now - each.work.arrived for each in self.live(True)]
            assert all(each < self.policy.max_delay_s for each in waited), "max_delay_s is kept"
            self.queue._rest.until = -math.inf
            assert self.queue.next(self.now, in_flight_s) is None, "it rested though a batch was due"
            return None
        self.account(batch)
        return batch

    def live(self, in_time: bool = False):
        """Requests with rows that wait."""
        for each in self.known.values():
            if each.waiting and not each.work.gone and (not in_time or each.work.deadline > self.now):
                yield each

    @rule(batch=consumes(batches))
    def finish(self, batch):
        if batch is not None:
            for work, start, rows in batch.slices:
                known = self.known[id(work)]
                found = set(range(start, start + rows))
                assert found <= known.running
                known.running -= found
                assert not found & known.done
                known.done |= found
            self.queue.observe(batch.size, 0.3)

    @rule(batch=consumes(batches), out_of_memory=st.booleans())
    def put_back(self, batch, out_of_memory):
        if batch is None:
            return
        if out_of_memory and self.queue.shrink(batch.size):
            # The queue may not make this size again.
            self.sizes = Smaller(self.sizes, batch.size)
        self.queue.put_back(batch)
        for work, start, rows in batch.slices:
            known = self.known[id(work)]
            known.running -= set(range(start, start + rows))
            if not work.gone:
                known.waiting |= set(range(start, start + rows))

    @rule(work=consumes(works))
    def cancel(self, work):
        self.queue.cancel(work)
        assert work.gone
        if id(work) in self.known:
            self.known[id(work)].waiting.clear()

    @rule()
    def expire(self):
        waiting = [each.work for each in self.live()]
        late = {id(work) for work in waiting if work.deadline <= self.now}
        soon_s = max((work.kind.least_s() for work in waiting), default=0.0)
        found = self.queue.expire(self.now)
        assert late <= {id(work) for work in found}
        assert len(found) == len({id(work) for work in found})
        assert all(work.deadline <= self.now + soon_s for work in found), "it could have been in time"
        assert len(waiting) > 1 or len(found) == len(late), "one that is alone is tried"
        assert [work.deadline for work in found] == sorted(work.deadline for work in found)
        for work in found:
            assert work.gone
            self.known[id(work)].waiting.clear()

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.0, 4.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def sleep_until_woken(self):
        at = self.queue.wake_at(self.now)
        assert at >= self.now
        if at < math.inf:
            self.now = at

    @rule()
    def clear(self):
        waiting = {id(each.work) for each in self.live()}
        found = self.queue.clear()
        assert {id(work) for work in found} == waiting
        assert len(found) == len(waiting)
        for work in found:
            self.known[id(work)].waiting.clear()

    @invariant()
    def counters_are_true(self):
        if hasattr(self, "queue"):
            live = list(self.live())
            assert self.queue.queued_items == len(live)
            assert self.queue.queued_rows == sum(len(each.waiting) for each in live)
            assert self.queue.queued_bytes == sum(each.work.nbytes for each in live)
            assert (self.queue.wake_at(self.now) == math.inf) == (not live)


class Smaller:
    """The same sizes, but one must not be made again."""

    def __init__(self, sizes, size):
        self.below, self.size = sizes, size

    def __getattr__(self, name):
        return getattr(self.below, name)

    def fit(self, rows, lengths):
        fits = self.below.fit(rows, lengths)
        assert any(fits[name] < n for name, n in self.size.items()), "a size that ran out of memory"
        return fits


Anything.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnything = Anything.TestCase
