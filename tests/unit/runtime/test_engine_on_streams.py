"""The engine over three streams, on a card that runs them as strangely as their events allow."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from onecard.errors import EngineClosedError, EngineError
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.runtime.staging_cuda import CudaOptions, CudaStage
from tests.unit.runtime.null_specs import ROWS, rows_of, twice_and_one
from tests.unit.runtime.simulated_card import SimulatedCard


def engine_on(seed, compute=twice_and_one, depth=3, batches=(1, 8, 32), on_batch=None, **fields):
    def make_stage(model, options):
        sizes = [{"B": b} for b in batches]
        return CudaStage(model, sizes, (), CudaOptions(depth, timings=True), card=SimulatedCard(seed))

    options = EngineOptions(policy=BatchPolicy(max_rows=batches[-1], **fields), depth=depth)
    return Engine([NullModel(ROWS, batches, compute)], options, on_batch, make_stage)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_everyone_gets_their_own_answer(seed, depth):
    rows = [1 + (7 * tag + seed) % 50 for tag in range(60)]
    stats = []
    with engine_on(seed, depth=depth, on_batch=stats.append) as engine, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda tag: engine.infer({"x": rows_of(tag, rows[tag])})["y"], range(len(rows))))
    for tag, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, rows_of(tag, rows[tag]) * 2 + 1)
    assert sum(s.rows for s in stats) == sum(rows)
    assert max(s.in_flight for s in stats) <= depth


def test_a_batch_that_fails_takes_no_slot_along():
    def poisoned(inputs):
        if poisoned.armed:
            raise ValueError("not today")
        return twice_and_one(inputs)

    poisoned.armed = False
    with engine_on(5, poisoned) as engine:
        poisoned.armed = True
        for tag in range(10):
            with pytest.raises(EngineError, match="not today"):
                engine.infer({"x": rows_of(tag, 2)})
        poisoned.armed = False
        for tag in range(10):
            np.testing.assert_array_equal(engine.infer({"x": rows_of(tag, 2)})["y"], rows_of(tag, 2) * 2 + 1)


def test_out_of_memory_while_others_are_under_way():
    def limited(inputs):
        if limited.room < len(inputs["x"]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return twice_and_one(inputs)

    limited.room = 32
    with engine_on(7, limited, max_delay_s=0.01) as engine:
        limited.room = 8
        answers = [engine.submit({"x": rows_of(tag, 20)}) for tag in range(12)]
        for tag, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.result(30)["y"], rows_of(tag, 20) * 2 + 1)


def test_closing_with_batches_under_way():
    held, entered = threading.Event(), threading.Event()
    held.set()

    def slow(inputs):
        entered.set()
        assert held.wait(30)
        return twice_and_one(inputs)

    engine = engine_on(9, slow)
    held.clear(), entered.clear()
    answers = [engine.submit({"x": rows_of(tag, 30)}) for tag in range(8)]
    assert entered.wait(30)
    for answer in answers:  # the first that fails lets on those under way, and none of them earlier
        answer.add_done_callback(lambda _: held.set())
    engine.close(drain_s=0.0)
    outcomes = []
    for tag, answer in enumerate(answers):
        try:
            np.testing.assert_array_equal(answer.result(0)["y"], rows_of(tag, 30) * 2 + 1)
            outcomes.append("answered")
        except EngineClosedError:
            outcomes.append("closed")
    assert outcomes == sorted(outcomes)  # those under way were answered, and those behind them were not
    assert "answered" in outcomes and "closed" in outcomes
