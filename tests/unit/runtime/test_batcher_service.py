"""The batcher in a simulated service: fairness, deadlines and delays over many batches."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

from onecard.errors import DeadlineError, QueueFullError
from onecard.runtime.batcher import Batcher
from onecard.runtime.work import Work
from tests.unit.runtime.batching import Buckets, Free, batcher, linear


def serve(queue: Batcher, arrivals: Iterable[Work], run_s, cancel=()) -> dict[str, list]:
    """Serve requests on a clock that is only a number: one batch at a time, woken as the batcher asks.

    Args:
        queue: empty.
        arrivals: requests, by their arrival.
        run_s: what a batch really takes.
        cancel: requests that are cancelled half a second after they came.

    Returns:
        ``answered`` (request, start of its last batch, end), ``refused``, ``expired``, ``batches`` (start, batch).
    """
    told: dict[str, list] = {"answered": [], "refused": [], "expired": [], "batches": []}
    events = [(work.arrived, at, work) for at, work in enumerate(arrivals)]
    events += [(work.arrived + 0.5, -1, work) for work in cancel]
    heapq.heapify(events)
    now, free_at, left = 0.0, 0.0, {}
    while events or queue.queued_items:
        wake = max(queue.wake_at(now), free_at) if queue.queued_items else math.inf
        if wake != math.inf and wake <= now and free_at <= now:
            assert queue.queued_items
        now = max(now, min(events[0][0] if events else math.inf, wake))
        while events and events[0][0] <= now:
            _, kind, work = heapq.heappop(events)
            if kind == -1:
                queue.cancel(work)
                continue
            try:
                queue.put(work, now)
                left[id(work)] = work.rows
            except (QueueFullError, DeadlineError):
                told["refused"].append(work)
        told["expired"] += [(work, now) for work in queue.expire(now)]
        if free_at > now:
            continue
        batch = queue.next(now)
        if batch is None:
            continue
        free_at = now + run_s(batch)
        queue.observe(batch.size, free_at - now)
        told["batches"].append((now, batch))
        for work, _, rows in batch.slices:
            left[id(work)] -= rows
            if not left[id(work)]:
                told["answered"].append((work, now, free_at))
    return told


def seconds_by_client(batches) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for seconds, batch in batches:
        for work, _, rows in batch.slices:
            spent[work.client] += seconds * rows / batch.rows
    return spent


def backlogged(queue: Batcher, clients: Iterable[str], run_s) -> list:
    """Batches for as long as each of these clients has something waiting."""
    batches = []
    queued = Counter({client: 0 for client in clients})
    while True:
        batch = queue.next(0.0)
        batches.append((run_s(batch), batch))
        for work, _, _ in batch.slices:
            queued[work.client] += work.queued == 0
        if any(queued[client] >= total for client, total in clients.items()):
            return batches


def test_a_few_of_one_client_are_served_evenly_with_the_many_of_another():
    sizes = Buckets((1, 2, 4))
    queue = batcher(sizes, linear(sizes, 0.1, 0.1))
    for _ in range(1000):
        queue.put(Work(1, client="many"), 0.0)
    for _ in range(10):
        queue.put(Work(1, client="few"), 0.0)
    batches = backlogged(queue, {"many": 1000, "few": 10}, lambda batch: 1.0)
    spent = seconds_by_client(batches)
    assert spent["few"] == pytest.approx(spent["many"], abs=1.0)
    assert len(batches) <= 6


def test_device_seconds_are_shared_and_not_requests():
    sizes = Free(1, has_lengths=True)
    queue = batcher(sizes, linear(sizes, 0.0, 0.01))
    for _ in range(400):
        queue.put(Work(1, (4,), client="short"), 0.0)
        queue.put(Work(1, (40,), client="long"), 0.0)
    batches = backlogged(queue, {"short": 400, "long": 400}, lambda batch: 0.01 * batch.size["S"])
    count = Counter(batch.slices[0].work.client for _, batch in batches)
    spent = seconds_by_client(batches)
    assert spent["short"] == pytest.approx(spent["long"], abs=0.4)
    assert count["short"] == pytest.approx(10 * count["long"], abs=10)


def test_large_requests_count_by_their_rows():
    sizes = Buckets((1, 4, 16))
    queue = batcher(sizes, linear(sizes, 0.0, 1.0))
    for _ in range(50):
        queue.put(Work(40, client="large"), 0.0)
    for _ in range(300):
        queue.put(Work(1, client="small"), 0.0)
    batches = backlogged(queue, {"large": 50, "small": 300}, lambda batch: float(batch.size["B"]))
    spent = seconds_by_client(batches)
    assert spent["large"] == pytest.approx(spent["small"], abs=2 * 16)


def test_idleness_saves_nothing_up():
    sizes = Free(1)
    queue = batcher(sizes, [({"B": 1}, 1.0)])
    queue.put(Work(1, client="idler"), 0.0)
    queue.next(0.0)
    for _ in range(100):
        queue.put(Work(1, client="busy"), 0.0)
    for _ in range(40):
        queue.next(0.0)
    for _ in range(100):
        queue.put(Work(1, client="idler"), 0.0)
    served = Counter(queue.next(0.0).slices[0].work.client for _ in range(20))
    assert served == {"busy": 10, "idler": 10}


@pytest.mark.parametrize("seed", range(5))
def test_any_two_backlogged_clients_are_never_further_apart_than_a_batch_each(seed):
    rng = random.Random(seed)
    sizes = Buckets((1, 2, 4, 8), (8, 32))
    run = {tuple(size.values()): seconds for size, seconds in linear(sizes, 0.05, 0.002)}
    queue = batcher(sizes, linear(sizes, 0.05, 0.002))
    longest_s = max(run.values())
    for _ in range(1500):
        queue.put(Work(rng.randint(1, 3), (rng.randint(1, 32),), client=rng.choice("abc")), 0.0)
    spent: dict[str, float] = defaultdict(float)
    left = Counter()
    for _ in range(200):
        batch = queue.next(0.0)
        seconds = run[tuple(batch.size.values())]
        weights = [rows * work.row_s for work, _, rows in batch.slices]
        for (work, _, _), weight in zip(batch.slices, weights, strict=True):
            spent[work.client] += seconds * weight / sum(weights)
            left[work.client] += 1
        assert max(spent.values()) - min(spent[c] for c in "abc") <= 2 * longest_s


def test_high_priority_never_waits_for_more_than_the_batch_that_runs():
    rng = random.Random(1)
    sizes = Buckets((1, 2, 4, 8))
    queue = batcher(sizes, linear(sizes, 0.5, 0.1), queue_items=10_000)
    low = [Work(4, arrived=0.0, priority=1) for _ in range(500)]
    high = [Work(1, arrived=rng.uniform(0, 100), priority=0) for _ in range(40)]
    told = serve(queue, sorted(low + high, key=lambda w: w.arrived), lambda batch: 0.5 + 0.1 * batch.size["B"])
    waits = [start - work.arrived for work, start, _ in told["answered"] if work.priority == 0]
    assert len(waits) == 40
    assert max(waits) <= 1.3 + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_nobody_waits_beyond_the_deadline_plus_one_batch(seed):
    rng = random.Random(seed)
    sizes = Buckets((1, 4, 16), (16, 64))
    true_s = {tuple(size.values()): seconds for size, seconds in linear(sizes, 0.02, 0.001)}
    queue = batcher(sizes, linear(sizes, 0.02, 0.001), max_delay_s=rng.choice([0.0, 0.1]), queue_wait_s=5.0)
    works, now = [], 0.0
    for _ in range(1500):
        now += rng.expovariate(30)  # about twice what it can do
        deadline = now + rng.choice([0.05, 0.3, 1.0, math.inf])
        rows, length, client = rng.randint(1, 20), rng.randint(1, 64), rng.choice("abc")
        works.append(Work(rows, (length,), 10, now, deadline, rng.randint(0, 1), client))
    cancelled = rng.sample(works, 100)
    told = serve(queue, works, lambda batch: true_s[tuple(batch.size.values())] * rng.uniform(0.8, 1.2), cancelled)
    longest_s = 1.2 * max(true_s.values())
    for work, start, end in told["answered"]:
        assert start < work.deadline
        assert end <= work.deadline + longest_s
    for work, when in told["expired"]:
        assert when <= work.deadline + longest_s
    ends = (
        {id(w) for w, _, _ in told["answered"]},
        {id(w) for w, _ in told["expired"]},
        {id(w) for w in told["refused"]},
    )
    assert sum(map(len, ends)) == len(set().union(*ends)), "one end each"
    unheard = {id(work) for work in works} - set().union(*ends)
    assert unheard <= {id(work) for work in cancelled}
    assert told["refused"], "twice the load must be refused"
    late = [work for work, _, end in told["answered"] if end > work.deadline]
    in_time = [work for work, _, end in told["answered"] if end <= work.deadline < math.inf]
    assert len(late) < len(in_time)


def test_under_overload_most_of_what_is_let_in_is_in_time():
    rng = random.Random(7)
    sizes = Buckets((1, 2, 4, 8, 16))
    queue = batcher(sizes, linear(sizes, 0.01, 0.005))
    works, now = [], 0.0
    for _ in range(5000):
        now += rng.expovariate(800)  # four times the most it can do
        works.append(Work(1, arrived=now, deadline=now + 0.5))
    told = serve(queue, works, lambda batch: 0.01 + 0.005 * batch.size["B"])
    good = sum(end <= work.deadline for work, _, end in told["answered"])
    assert good == pytest.approx(len(told["answered"]), rel=0.02)
    rate = good / told["answered"][-1][2]
    assert rate > 0.95 * 16 / 0.09  # rows per second of full batches


@pytest.mark.parametrize("delay", [0.2, 1.0])
def test_on_an_idle_device_no_row_waits_longer_than_the_delay(delay):
    rng = random.Random(3)
    sizes = Buckets((1, 4, 16), (16, 64))
    queue = batcher(sizes, (), max_delay_s=delay)
    works, now = [], 0.0
    for _ in range(800):
        now += rng.expovariate(10)
        works.append(Work(rng.randint(1, 3), (rng.randint(1, 64),), arrived=now))
    told = serve(queue, works, lambda batch: 0.0)
    assert len(told["answered"]) == 800
    assert max(start - work.arrived for work, start, _ in told["answered"]) <= delay + 1e-9
    assert len(told["batches"]) < 800


@pytest.mark.parametrize("priorities", [1, 3])
def test_rare_lengths_are_not_starved_by_common_ones(priorities):
    sizes = Free(4, has_lengths=True)
    queue = batcher(sizes, linear(sizes, 1.0, 0.0))
    for _ in range(4):
        queue.put(Work(1, (8,)), 0.0)
    rare = Work(1, (9,))
    queue.put(rare, 0.0)
    turns = 0
    while not rare.taken:
        for _ in range(4):
            queue.put(Work(1, (8,), priority=priorities - 1), 0.0)
        queue.next(0.0)
        turns += 1
    assert turns <= 2


def test_clients_are_forgotten_when_that_makes_no_difference():
    queue = batcher(Free(1), [({"B": 1}, 1.0)], max_clients=10)
    for i in range(5000):
        queue.put(Work(1, client=f"client {i}"), 0.0)
        queue.next(0.0)
    level = queue._queue._levels[0]
    assert len(level.clients) <= 20


def test_priorities_without_end_are_forgotten():
    queue = batcher(Free(1))
    for i in range(1000):
        queue.put(Work(1, priority=i), 0.0)
        assert queue.next(0.0).slices[0].work.priority == i
    assert len(queue._queue._levels) <= 16


@pytest.mark.parametrize("dated", [False, True])
def test_what_is_cancelled_does_not_pile_up(dated):
    queue = batcher(Free(4), queue_items=100_000)
    keep = [Work(1, deadline=1e6 if dated else math.inf) for _ in range(10)]
    for work in keep:
        queue.put(work, 0.0)
    for i in range(5000):
        work = Work(1, client=str(i % 50), deadline=1e9 + i if dated else math.inf)
        queue.put(work, 0.0)
        queue.cancel(work)
    held = sum(len(client.heap) for client in queue._queue._levels[0].clients.values())
    assert held <= 2 * 10 + 100
    assert len(queue._deadlines._heap) <= 2 * 10 + 100
    assert sum(queue.next(0.0).rows for _ in range(3)) == 10
