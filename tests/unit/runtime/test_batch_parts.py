"""The batcher's parts by themselves: the policy, classes of lengths, cuts, and the fair queue."""

from __future__ import annotations

import math

import pytest

from onecard.errors import UsageError
from onecard.runtime.cost import Costs
from onecard.runtime.cut import Plan, best_cut, cuts, fill, raised
from onecard.runtime.deadlines import Deadlines
from onecard.runtime.fair import FairQueue
from onecard.runtime.kinds import Kinds
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.work import Work
from tests.unit.runtime.batching import Buckets, Free, linear, symbols


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_delay_s", -1.0),
        ("max_delay_s", math.inf),
        ("margin_s", math.nan),
        ("max_rows", 0),
        ("max_tokens", -5),
        ("queue_items", 0),
        ("queue_wait_s", math.nan),
        ("preferred", (4, 0)),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name):
        BatchPolicy(**{name: value})


def kinds_of(sizes, **policy) -> Kinds:
    return Kinds(sizes, Costs(symbols(sizes), "B", linear(sizes, 1.0, 0.01)), BatchPolicy(**policy))


def test_a_class_knows_its_bounds():
    kinds = kinds_of(Buckets((1, 8, 32), (16, 64)), max_rows=20, max_tokens=640, preferred=(5, 30))
    short, long = kinds.of((9,)), kinds.of((17,))
    assert (short.lengths, short.limit, short.cuts) == ((16,), 20, (1, 5, 8))
    assert (long.lengths, long.limit, long.cuts) == ((64,), 10, (1, 5, 8))
    assert kinds.of((16,)) is short
    assert long.takes(short)
    assert not short.takes(long)
    assert short.fit(9)[0] == {"B": 32, "S": 16}
    assert short.row_s() == short.seconds(20) / 20


def test_when_a_request_ends():
    kind = kinds_of(Free(8)).of(())
    full_s = 1.0 + 0.08
    assert kind.end_s(0.0, 3) == pytest.approx(1.03)
    assert kind.end_s(4 * full_s / 8, 3) == pytest.approx(1.07)  # shares the next batch
    assert kind.end_s(8 * full_s / 8, 3) == pytest.approx(2 * full_s)
    assert kind.end_s(0.0, 17) == pytest.approx(3 * full_s)


def test_what_ran_out_of_memory_bounds_all_that_is_as_large():
    kinds = kinds_of(Free(64, has_lengths=True))
    seen = kinds.of((32,))
    assert kinds.shrink({"B": 64, "S": 32})
    assert [kinds.of((length,)).limit for length in (31, 32, 33)] == [64, 32, 32]
    assert seen.limit == 32
    rows = 32
    while kinds.shrink({"B": rows, "S": 32}):
        rows = kinds.of((32,)).limit
    assert rows == 1


def drawn(kinds: Kinds, *works: Work):
    for work in works:
        work.kind = kinds.of(work.lengths)
        work.row_s = work.kind.row_s()
    return [(work, 0, work.rows, None, (0, at)) for at, work in enumerate(works)]


def test_fill_prefers_the_same_class_and_stops_at_the_limit():
    kinds = kinds_of(Buckets((1, 4), (16, 32, 64)))
    window = drawn(kinds, *(Work(1, (length,)) for length in (32, 16, 64, 32, 16, 32)))
    assert fill(window, kinds.of((32,))) == Plan(kinds.of((32,)), [0, 3, 5, 1], 4)
    assert fill(window, kinds.of((16,))) == Plan(kinds.of((16,)), [1, 4], 2)


def test_raising_keeps_all_that_was_there_and_is_not_cut_away():
    sizes = Buckets((1, 2, 4), (16, 64))
    kinds = Kinds(sizes, Costs(("B", "S"), "B", linear(sizes, 1.0, 0.0001)), BatchPolicy())
    window = drawn(kinds, Work(1, (16,)), Work(1, (64,)), Work(1, (64,)))
    plan = raised(window, fill(window, kinds.of((16,))))
    assert (plan.kind.lengths, list(plan.picks), plan.rows, plan.least) == ((64,), [0, 1, 2], 3, 2)
    assert cuts(plan) == [2, 3]


def test_raising_never_lets_rows_fall_out():
    kinds = kinds_of(Buckets((1, 2, 4, 8), (16, 64)), max_tokens=128)
    window = drawn(kinds, Work(3, (16,)), Work(1, (64,)))
    plan = fill(window, kinds.of((16,)))
    assert raised(window, plan) is plan  # only two rows of 64 may run together


def test_the_cut_with_most_rows_per_second_wins():
    sizes = Buckets((1, 8, 16, 64))
    costs = Costs(("B",), "B", [({"B": 1}, 0.5), ({"B": 8}, 1.0), ({"B": 16}, 1.5), ({"B": 64}, 6.0)])
    kinds = Kinds(sizes, costs, BatchPolicy())
    kind = kinds.of(())
    for rows, best in ((1, 1), (3, 3), (9, 8), (12, 12), (16, 16), (17, 16), (63, 16), (64, 64), (70, 64)):
        window = drawn(kinds, Work(rows))
        plan = fill(window, kind)
        chosen = best_cut(window, plan, cuts(plan), 0.0)
        rates = {count: count / kind.seconds(count) for count in cuts(plan)}
        assert rates[chosen] * 1.02 >= max(rates.values())
        assert chosen == best or rates[best] == pytest.approx(rates[chosen], rel=0.02)


def test_the_fair_queue_restores_its_order():
    kinds = kinds_of(Free(8))
    queue = FairQueue(10)
    works = [Work(1, client=client, priority=priority) for priority in (1, 0) for client in "aabbc"]
    for each in drawn(kinds, *works):
        each[0].queued = 1
        queue.push(each[0])
    first = list(queue.draw(0.0))
    queue.settle(first, [0] * len(first), 0.0)
    again = list(queue.draw(0.0))
    assert [each[0] for each in first] == [each[0] for each in again]
    assert [each[0].priority for each in first] == [0] * 5 + [1] * 5
    assert [each[0].client for each in first[:5]] == ["a", "b", "c", "a", "b"]
    queue.settle(again, [1] * 5 + [0] * 5, 1.0)
    assert queue.queued_s(0) == 0.0
    assert queue.queued_s() == pytest.approx(5 * kinds.of(()).row_s())


def test_deadlines_pass_over_who_left_and_clear_their_garbage():
    deadlines = Deadlines()
    works = [Work(1, deadline=float(i), queued=1) for i in range(300)]
    for work in works:
        deadlines.enter(work)
    deadlines.enter(works[5])  # as after being put back
    assert deadlines.first() == 0.0
    for work in works[10:]:
        work.queued = 0
        deadlines.leave()
    assert len(deadlines._heap) < 200
    for work in works[:10]:
        assert deadlines.first_work() is work
        work.queued = 0
        deadlines.leave()
    assert deadlines.first() == math.inf
