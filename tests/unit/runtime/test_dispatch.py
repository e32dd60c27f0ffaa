"""What the lanes of an engine share: its queue, asked without any thread."""

import math
import time

import pytest

from onecard.errors import EngineError
from onecard.runtime.cost import Costs
from onecard.runtime.dispatch import Dispatch
from onecard.runtime.future import Answer
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.runtime.request import Request
from onecard.runtime.work import Work
from tests.unit.runtime.null_specs import ROWS


def dispatch(lanes: int = 2, seconds: float = 100.0) -> Dispatch:
    measured = [({"B": 1}, seconds), ({"B": 4}, seconds)]
    return Dispatch(NullModel(ROWS, (1, 4)), BatchPolicy(), Costs(("B",), "B", measured), lanes)


def work(rows: int, within_s: float = math.inf, **more) -> Work:
    made = Work(rows, request=Request({}, Answer(), True), **more)
    made.arrived = time.monotonic()
    made.deadline = made.arrived + within_s
    return made


def test_a_busy_lane_gives_nothing_up_that_another_has_time_for():
    queue = dispatch()
    dated = work(5, within_s=150.0)
    queue.put(dated)
    queue.put(work(4, priority=-1))
    first = queue.take(0)
    assert first is not None and first.rows == 4
    queue.put(work(1))
    second = queue.take(0)  # by when it is free, it is too late; the other lane is free now
    assert second is not None and second.slices[0].work is dated
    assert not dated.gone


def test_what_began_under_another_policy_is_put_back_in_its_order():
    queue = dispatch()
    first, second = work(2), work(2)
    queue.put(first)
    before = queue.take(0)
    queue.reconfigure(BatchPolicy())
    queue.put(second)
    after = queue.take(1)
    assert before is not None and after is not None
    queue.put_back(after)
    queue.put_back(before)
    again = queue.take(0)
    assert again is not None and [piece.work for piece in again.slices] == [first, second]


def test_what_is_cancelled_before_it_is_queued_never_waits():
    queue = dispatch(lanes=1)
    gone, kept = work(1), work(1)
    queue.cancel(gone)
    assert queue.put_all([gone], 0, math.inf) is None
    queue.put(gone)
    assert queue.put_all([gone, kept], 0, math.inf) is None
    assert queue.queued[0] == 1
    batch = queue.take(0)
    assert batch is not None and [piece.work for piece in batch.slices] == [kept]


def test_every_caller_gets_an_error_of_its_own():
    queue = dispatch()
    queue.break_off(EngineError("the device was lost.", "Open it again."))
    raised = []
    for _ in range(3):
        with pytest.raises(EngineError, match=r"the device was lost\. Open it again\.") as caught:
            queue.put(work(1))
        raised.append(caught.value)
    assert len({id(error) for error in (*raised, queue.broken)}) == 4
    assert queue.broken is not None and queue.broken.__traceback__ is None
    assert all(error.__cause__ is queue.broken for error in raised)
