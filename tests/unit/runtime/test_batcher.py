"""The batcher's decisions, one by one: when a batch runs, and what it takes."""

from __future__ import annotations

import math

import pytest

from onecard.errors import DeadlineError, QueueFullError, UsageError
from onecard.runtime.batcher import Batcher
from onecard.runtime.cost import Costs
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.work import Work
from tests.unit.runtime.batching import Buckets, Free, batcher, linear, rows_of

EIGHT = Buckets((1, 2, 4, 8))


def test_without_delay_what_is_there_runs():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0))
    a, b = Work(1, arrived=0.0), Work(2, arrived=0.5)
    queue.put(a, 0.0)
    queue.put(b, 0.5)
    assert queue.wake_at(0.5) == 0.5
    batch = queue.next(0.5)
    assert rows_of(batch) == [(a, 0, 1), (b, 0, 2)]
    assert (batch.rows, batch.lengths, batch.size) == (3, (), {"B": 4})
    assert queue.next(0.5) is None
    assert queue.wake_at(0.5) == math.inf


def test_a_large_request_comes_in_slices_and_shares_its_last_batch():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0))
    large, small = Work(19), Work(2)
    queue.put(large, 0.0)
    queue.put(small, 0.0)
    found = [rows_of(queue.next(0.0)) for _ in range(3)]
    assert found == [[(large, 0, 8)], [(large, 8, 8)], [(large, 16, 3), (small, 0, 2)]]
    assert queue.next(0.0) is None


def test_a_batch_waits_for_its_delay_and_no_longer():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0), max_delay_s=0.5)
    queue.put(Work(1, arrived=10.0), 10.0)
    assert queue.next(10.0) is None
    assert queue.wake_at(10.0) == 10.5
    queue.put(Work(1, arrived=10.3), 10.3)
    assert queue.next(10.4) is None
    assert queue.wake_at(10.4) == 10.5
    assert queue.next(10.5).rows == 2


def test_the_oldest_decides_though_another_goes_first():
    queue = batcher(EIGHT, linear(EIGHT, 0.01, 0.0), max_delay_s=0.5)
    old, urgent = Work(1, arrived=1.0), Work(1, arrived=1.4, deadline=9.0)
    queue.put(old, 1.0)
    queue.put(urgent, 1.4)
    assert queue.next(1.4) is None
    assert rows_of(queue.next(1.5)) == [(urgent, 0, 1), (old, 0, 1)]


def test_a_full_batch_does_not_wait():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0), max_delay_s=5.0)
    for _ in range(7):
        queue.put(Work(1), 0.0)
        assert queue.next(0.0) is None
    queue.put(Work(1), 0.0)
    assert queue.next(0.0).rows == 8


def test_tokens_fill_a_batch():
    sizes = Free(64, has_lengths=True)
    queue = batcher(sizes, max_delay_s=5.0, max_tokens=1000)
    for _ in range(9):
        queue.put(Work(1, (100,)), 0.0)
        assert queue.next(0.0) is None
    queue.put(Work(1, (100,)), 0.0)
    assert queue.next(0.0).rows == 10
    queue.put(Work(2, (2000,)), 0.0)  # longer than any batch may be: alone, row by row
    assert [queue.next(0.0).rows for _ in range(2)] == [1, 1]


def test_a_deadline_ends_the_waiting_in_time():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0), max_delay_s=50.0, margin_s=0.1)
    queue.put(Work(1), 0.0)
    assert queue.next(0.0) is None
    queue.put(Work(1, deadline=10.0), 0.0)
    queue.put(Work(1, deadline=12.0), 0.0)
    assert queue.next(0.0) is None
    assert queue.wake_at(0.0) == pytest.approx(10.0 - 1.0 - 0.1)
    assert queue.next(8.9).rows == 3


def test_the_last_moment_counts_what_is_in_flight():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0), max_delay_s=50.0, margin_s=0.1)
    queue.put(Work(1, deadline=10.0), 0.0)
    assert queue.next(0.0, in_flight_s=2.0) is None
    assert queue.wake_at(0.0) == pytest.approx(10.0 - 1.0 - 0.1 - 2.0)
    assert queue.next(7.0) is None  # the device came free meanwhile
    assert queue.wake_at(7.0) == pytest.approx(8.9)
    assert queue.next(8.9).rows == 1


def test_a_busier_device_brings_the_last_moment_forward():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0), max_delay_s=50.0, margin_s=0.0)
    queue.put(Work(1, deadline=10.0), 0.0)
    assert queue.next(0.0) is None
    assert queue.next(1.0) is None
    assert queue.next(1.0, in_flight_s=8.0) is not None


def test_a_preferred_count_runs_at_once_and_the_rest_waits():
    queue = batcher(Free(64), max_delay_s=5.0, preferred=(4, 8))
    queue.put(Work(3), 0.0)
    assert queue.next(0.0) is None
    long = Work(3)
    queue.put(long, 0.0)
    assert rows_of(queue.next(0.0))[-1] == (long, 0, 1)
    assert queue.next(0.0) is None
    assert queue.queued_rows == 2
    assert queue.next(5.0).rows == 2


def test_it_does_not_pad_where_two_runs_are_cheaper():
    sizes = Buckets((1, 8, 16))
    cheap = batcher(sizes, [({"B": 1}, 1.0), ({"B": 8}, 4.0), ({"B": 16}, 8.0)])
    cheap.put(Work(9), 0.0)
    assert [cheap.next(0.0).rows for _ in range(2)] == [8, 1]
    dear = batcher(sizes, [({"B": 1}, 3.0), ({"B": 8}, 4.0), ({"B": 16}, 4.2)])
    dear.put(Work(9), 0.0)
    assert dear.next(0.0).rows == 9


def test_two_runs_are_not_made_of_one_for_noise():
    sizes = Buckets((8, 16))
    queue = batcher(sizes, [({"B": 8}, 4.0), ({"B": 16}, 8.05)])
    queue.put(Work(16), 0.0)
    assert queue.next(0.0).rows == 16


def test_a_cut_that_costs_a_deadline_is_not_made():
    sizes = Buckets((1, 8, 16))
    measured = [({"B": 1}, 3.0), ({"B": 8}, 8.0), ({"B": 16}, 10.0)]
    rows = {}
    for start in (9.0, 9.6, 10.5):
        queue = batcher(sizes, measured)
        for _ in range(8):
            queue.put(Work(1, deadline=20.0), 0.0)
        queue.put(Work(1, deadline=20.5), 0.0)
        rows[start] = queue.next(start).rows
    # From 9.6 the ninth alone would end at 20.6; from 10.5 all nine would, so eight are saved instead.
    assert rows == {9.0: 8, 9.6: 9, 10.5: 8}


def test_strict_priorities_and_what_is_left_is_filled():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0))
    low, high = Work(6, priority=5), Work(4, priority=-1)
    queue.put(low, 0.0)
    queue.put(high, 0.0)
    assert rows_of(queue.next(0.0)) == [(high, 0, 4), (low, 0, 4)]
    assert queue.predicted_wait_s(4) == 0.0
    assert queue.predicted_wait_s(5) == pytest.approx(2 / 8)


def test_within_a_client_the_earliest_deadline_then_arrival():
    queue = batcher(Free(1))
    works = [Work(1, arrived=float(i), deadline=d) for i, d in enumerate((math.inf, 90.0, 50.0, 90.0, math.inf))]
    for work in works:
        queue.put(work, work.arrived)
    order = [queue.next(5.0).slices[0].work for _ in works]
    assert [works.index(work) for work in order] == [2, 1, 3, 0, 4]


def test_same_lengths_come_first_then_shorter_ones():
    sizes = Buckets((1, 4), (16, 32, 64))
    queue = batcher(sizes, linear(sizes, 1.0, 0.0))
    first, short, same, long = Work(1, (30,)), Work(1, (9,)), Work(1, (17,)), Work(1, (60,))
    for work in (first, short, long, same):
        queue.put(work, 0.0)
    batch = queue.next(0.0)
    # All cost the same here, so the longer one comes along, and all run at its class.
    assert rows_of(batch) == [(first, 0, 1), (same, 0, 1), (short, 0, 1), (long, 0, 1)]
    assert (batch.lengths, batch.size) == ((60,), {"B": 4, "S": 64})


def test_the_class_is_not_raised_where_it_costs_rows_per_second():
    sizes = Buckets((1, 2, 4), (16, 64))
    queue = batcher(sizes, linear(sizes, 0.0, 0.01))
    short, long = Work(2, (16,)), Work(1, (60,))
    queue.put(short, 0.0)
    queue.put(long, 0.0)
    batch = queue.next(0.0)
    assert rows_of(batch) == [(short, 0, 2)]
    assert batch.size == {"B": 2, "S": 16}
    assert rows_of(queue.next(0.0)) == [(long, 0, 1)]


def test_lengths_that_do_not_join_stay_apart_and_keep_their_turn():
    queue = batcher(Free(4, has_lengths=True))
    works = [Work(1, (length,)) for length in (5, 7, 5, 9, 7)]
    for work in works:
        queue.put(work, 0.0)
    found = [[work.lengths[0] for work, _, _ in rows_of(queue.next(0.0))] for _ in range(3)]
    assert found == [[5, 5], [7, 7], [9]]


def test_a_full_batch_of_other_lengths_does_not_wait_behind_one_that_may():
    queue = batcher(Free(4, has_lengths=True), max_delay_s=5.0)
    queue.put(Work(1, (5,)), 0.0)
    assert queue.next(0.0) is None
    queue.put(Work(4, (7,)), 0.0)
    assert queue.next(0.0).lengths == (7,)
    assert queue.next(0.0) is None
    assert queue.wake_at(0.0) == 5.0


def test_but_not_if_the_first_would_miss_its_deadline_by_it():
    sizes = Free(4, has_lengths=True)
    measured = [({"B": b, "S": s}, 1.0) for b in range(1, 5) for s in (5, 7)]
    queue = batcher(sizes, measured, max_delay_s=5.0)
    queue.put(Work(1, (5,), deadline=1.9), 0.0)
    assert queue.next(0.0) is None
    queue.put(Work(4, (7,)), 0.0)
    assert queue.next(0.0).lengths == (5,)
    assert queue.next(0.0).lengths == (7,)


def test_many_lengths_do_not_wait():
    queue = batcher(Free(4, has_lengths=True), max_delay_s=5.0)
    for length in range(1, 9):
        queue.put(Work(1, (length,)), 0.0)
        assert queue.next(0.0) is None
    queue.put(Work(1, (9,)), 0.0)
    assert queue.next(0.0).lengths == (1,)
    for length in range(10, 10 + 100):
        queue.put(Work(1, (length,)), 0.0)
    assert queue.next(0.0).lengths == (2,)


def test_put_back_rows_are_first_again_in_order_and_after_a_shrink_in_smaller_batches():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0))
    a, b, later = Work(10), Work(6), Work(4, deadline=99.0)
    queue.put(a, 0.0)
    queue.put(b, 0.0)
    first, second = queue.next(0.0), queue.next(0.0)
    queue.put(later, 0.0)
    assert (queue.queued_items, queue.queued_rows) == (1, 4)
    assert queue.shrink(first.size)
    queue.put_back(second)
    queue.put_back(first)
    assert (queue.queued_items, queue.queued_rows) == (3, 20)
    found = [rows_of(queue.next(0.0)) for _ in range(5)]
    assert found == [[(a, 0, 4)], [(a, 4, 4)], [(a, 8, 2), (b, 0, 2)], [(b, 2, 4)], [(later, 0, 4)]]
    assert (queue.queued_items, queue.queued_rows) == (0, 0)


def test_rows_put_back_twice_stay_in_order():
    queue = batcher(EIGHT)
    large, high = Work(8, priority=1), Work(1)
    queue.put(large, 0.0)
    queue.put_back(queue.next(0.0))
    queue.put(high, 0.0)
    mixed = queue.next(0.0)
    assert rows_of(mixed) == [(high, 0, 1), (large, 0, 7)]
    queue.put_back(mixed)
    queue.cancel(high)
    assert rows_of(queue.next(0.0)) == [(large, 0, 7), (large, 7, 1)]


def test_put_back_yields_to_a_higher_priority():
    queue = batcher(Free(4))
    low, high = Work(4, priority=1), Work(4, priority=0)
    queue.put(low, 0.0)
    batch = queue.next(0.0)
    queue.put(high, 0.0)
    queue.put_back(batch)
    assert [queue.next(0.0).slices[0].work for _ in range(2)] == [high, low]


def test_put_back_drops_who_is_gone_and_expires_who_is_late():
    queue = batcher(EIGHT)
    gone, late, live = Work(2), Work(2, nbytes=5, deadline=3.0), Work(2)
    for work in (gone, late, live):
        queue.put(work, 0.0)
    batch = queue.next(0.0)
    queue.cancel(gone)
    queue.put_back(batch)
    assert (queue.queued_items, queue.queued_rows, queue.queued_bytes) == (2, 4, 5)
    assert queue.wake_at(0.0) == 0.0
    assert queue.expire(3.0) == [late]
    assert rows_of(queue.next(3.0)) == [(live, 0, 2)]


def test_shrink_says_when_nothing_smaller_is_left():
    queue = batcher(EIGHT)
    assert [queue.shrink({"B": rows}) for rows in (8, 4, 2, 1)] == [True, True, True, False]
    free = batcher(Free(64))
    free.put(Work(100), 0.0)
    assert free.shrink({"B": 64})
    assert free.next(0.0).rows == 32
    assert free.shrink({"B": 1}) is False
    assert free.next(0.0).rows == 32


def test_shrink_holds_for_longer_lengths_too():
    sizes = Buckets((1, 4, 8), (16, 32, 64))
    queue = batcher(sizes, linear(sizes, 1.0, 0.0))
    assert queue.shrink({"B": 8, "S": 32})
    rows = []
    for length in (16, 32, 64):
        queue.put(Work(8, (length,)), 0.0)
        rows.append(queue.next(0.0).rows)
        while queue.next(0.0):
            pass
    assert rows == [8, 4, 4]


def test_a_shrink_reaches_rows_that_wait():
    queue = batcher(EIGHT, max_delay_s=5.0)
    queue.put(Work(4), 0.0)
    assert queue.next(0.0) is None
    queue.shrink({"B": 4})
    assert queue.next(0.0).rows == 2


def test_cancel_and_expire_give_back_at_once():
    queue = batcher(Free(2), queue_items=2, queue_bytes=100)
    a, b = Work(3, nbytes=60), Work(1, nbytes=40, deadline=5.0)
    queue.put(a, 0.0)
    queue.put(b, 0.0)
    assert rows_of(queue.next(0.0)) == [(b, 0, 1), (a, 0, 1)]
    assert (queue.queued_items, queue.queued_bytes, queue.queued_rows) == (1, 60, 2)
    queue.cancel(a)
    assert (queue.queued_items, queue.queued_bytes, queue.queued_rows) == (0, 0, 0)
    assert queue.next(0.0) is None
    queue.cancel(a)
    queue.cancel(b)
    assert queue.queued_items == 0
    c = Work(1, nbytes=100, deadline=5.0)
    queue.put(c, 1.0)
    assert queue.expire(4.9) == []
    assert queue.next(5.0) is None  # too late to run, even if expire was not called
    assert queue.wake_at(5.0) == 5.0
    assert queue.expire(5.0) == [c]
    assert c.gone
    assert queue.wake_at(5.0) == math.inf


def test_where_many_wait_the_hopeless_make_room_for_those_still_in_time():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0))
    soon, later = Work(8, deadline=1.5), Work(8, deadline=3.0)
    queue.put(soon, 0.0)
    assert queue.expire(0.6) == []  # it waits alone: it is tried
    queue.put(later, 0.6)
    assert queue.expire(0.4) == []
    assert queue.expire(0.6) == [soon]  # any run takes a second
    assert queue.expire(1.0, in_flight_s=0.9) == []
    assert rows_of(queue.next(1.0)) == [(later, 0, 8)]


def test_the_hopeless_are_told_by_what_runs_before_them():
    queue = batcher(EIGHT, linear(EIGHT, 1.0, 0.0))
    first, second = Work(8, deadline=4.0), Work(8, deadline=9.0)
    for work in (first, second):
        queue.put(work, 0.0)
    assert queue.expire(1.0, in_flight_s=1.9) == []
    assert queue.expire(1.0, in_flight_s=2.0) == [first]


def test_nobody_is_hopeless_for_what_another_would_take():
    sizes = Free(4, has_lengths=True)
    queue = batcher(sizes, [({"B": 1, "S": 1}, 0.001), ({"B": 1, "S": 64}, 0.4)])
    long = Work(1, (64,), deadline=0.5)
    short = [Work(1, (1,), deadline=0.6) for _ in range(8)]
    for work in (long, *short):
        queue.put(work, 0.0)
    assert queue.expire(0.2) == [long]
    assert queue.expire(0.2) == []
    assert queue.queued_items == 8 and not any(work.gone for work in short)
    assert queue.expire(0.6) == short


def test_what_was_never_measured_counts_for_nothing():
    queue = batcher(EIGHT, [])
    for deadline in (1.0, 2.0):
        queue.put(Work(8, deadline=deadline), 0.0)
    assert queue.expire(0.999) == []


def test_bounds_are_refused_with_when_to_try_again():
    queue = batcher(Free(1), [({"B": 1}, 2.0)], queue_items=4, queue_bytes=100)
    for _ in range(4):
        queue.put(Work(1, nbytes=10), 0.0)
    with pytest.raises(QueueFullError, match="4 requests wait") as caught:
        queue.put(Work(1, nbytes=10), 0.0)
    assert caught.value.retry_after_s == pytest.approx(2.0)  # one of four is done
    queue.next(0.0)
    with pytest.raises(QueueFullError, match="20 above what may") as caught:
        queue.put(Work(1, nbytes=90), 1.0)
    assert caught.value.retry_after_s == pytest.approx(20 / 30 * (3 * 2.0 + 1.0))  # one is half done
    with pytest.raises(UsageError, match="101 bytes, but no more than 100"):
        queue.put(Work(1, nbytes=101), 1.0)
    assert (queue.queued_items, queue.queued_bytes) == (3, 30)


def test_the_predicted_wait_is_bounded():
    queue = batcher(Free(1), [({"B": 1}, 2.0)], queue_wait_s=5.0)
    for _ in range(3):
        queue.put(Work(1), 0.0)
    with pytest.raises(QueueFullError, match="wait 6 s, 1 s more") as caught:
        queue.put(Work(1), 0.0)
    assert caught.value.retry_after_s == pytest.approx(1.0)
    queue.put(Work(1, priority=-1), 0.0)  # none of its priority waits


def test_a_deadline_that_cannot_be_met_is_refused_at_once():
    queue = batcher(Free(1), [({"B": 1}, 2.0)])
    with pytest.raises(DeadlineError, match=r"passed 0\.5 s before"):
        queue.put(Work(1, deadline=0.5), 1.0)
    queue.put(Work(1, deadline=1.5), 1.0)  # idle: the prediction is put to the test
    with pytest.raises(DeadlineError, match=r"take 4 s, which is 0\.5 s after its deadline; work of 2 s is"):
        queue.put(Work(1, deadline=4.5), 1.0)
    queue.put(Work(1, deadline=5.0), 1.0)
    assert queue.next(1.0).slices[0].work.deadline == 1.5
    with pytest.raises(DeadlineError, match=r"take 5 s, which is 1 s after its deadline"):
        queue.put(Work(1, deadline=6.0), 2.0)  # one waits, and one runs for another second
    assert queue.queued_items == 1


def test_several_lanes_share_what_waits():
    costs = Costs(("B",), "B", [({"B": 1}, 2.0)])
    queue = Batcher(Free(1), costs, BatchPolicy(queue_wait_s=5.0), lanes=4)
    for _ in range(11):
        queue.put(Work(1), 0.0)
    with pytest.raises(QueueFullError, match=r"wait 5\.5 s") as caught:
        queue.put(Work(1), 0.0)
    assert caught.value.retry_after_s == pytest.approx(0.5)


def test_requests_without_a_deadline_do_not_keep_one_with_a_deadline_out():
    queue = batcher(Free(1), [({"B": 1}, 1.0)])
    for _ in range(100):
        queue.put(Work(1), 0.0)
    urgent = Work(1, deadline=1.5)
    queue.put(urgent, 0.0)
    assert queue.next(0.0).slices[0].work is urgent


def test_a_busy_client_does_not_keep_another_out():
    queue = batcher(Free(1), [({"B": 1}, 1.0)], queue_wait_s=50.0)
    for _ in range(50):
        queue.put(Work(1, client="busy"), 0.0)
    with pytest.raises(QueueFullError):
        for _ in range(50):
            queue.put(Work(1, client="busy"), 0.0)
    queue.put(Work(1, client="light", deadline=4.0), 0.0)
    served = [queue.next(float(i)).slices[0].work.client for i in range(2)]
    assert "light" in served


def test_lengths_never_measured_are_not_refused_by_a_guess():
    queue = batcher(Free(4, has_lengths=True), [({"B": 1, "S": 8}, 2.0)])
    queue.put(Work(1, (8,)), 0.0)
    queue.put(Work(1, (800,), deadline=3.0), 0.0)
    with pytest.raises(DeadlineError):
        queue.put(Work(1, (8,), deadline=3.0), 0.0)


def test_clear_gives_all_that_waits_once():
    queue = batcher(Free(2))
    works = [Work(3), Work(1, deadline=1.0), Work(2, priority=3), Work(1, client="x")]
    for work in works:
        queue.put(work, 0.0)
    batch = queue.next(0.0)
    queue.put_back(batch)
    queue.next(2.0)  # drops the late one from the order, not from what waits
    found = queue.clear()
    assert {id(work) for work in found} | {id(work) for work, _, _ in batch.slices} >= {id(work) for work in works[:1]}
    assert len(found) == len({id(work) for work in found})
    assert all(work.gone and work.queued == 0 for work in found)
    assert (queue.queued_items, queue.queued_bytes, queue.queued_rows) == (0, 0, 0)
    assert queue.next(9.0) is None


class Broken(Free):
    """Sizes that fail at 3 rows."""

    def fit(self, rows, lengths):
        if rows == 3:
            raise ZeroDivisionError("no such size")
        return super().fit(rows, lengths)


def test_nothing_is_lost_when_the_models_sizes_raise():
    queue = batcher(Broken(8))
    works = [Work(1), Work(1), Work(1)]
    for work in works:
        queue.put(work, 0.0)
    with pytest.raises(ZeroDivisionError):
        queue.next(0.0)
    assert queue.queued_rows == 3
    queue.put(Work(1), 0.0)
    assert [work for work, _, _ in rows_of(queue.next(0.0))][:3] == works


def test_a_hundred_thousand_requests():
    queue = batcher(Buckets((1, 8, 64)), queue_items=200_000)
    for i in range(100_000):
        queue.put(Work(1, arrived=float(i), client=str(i % 7), deadline=1e9 if i % 3 else math.inf), float(i))
    assert queue.queued_items == 100_000
    seen = 0
    while batch := queue.next(1e6):
        seen += batch.rows
    assert seen == 100_000
    assert (queue.queued_items, queue.queued_rows) == (0, 0)
