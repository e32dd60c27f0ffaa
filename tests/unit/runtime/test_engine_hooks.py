"""What a process around an engine asks of it: when a request starts, how long a batch runs, memory read in place."""

import threading
import time

import numpy as np
import pytest

from onecard.errors import EngineError
from onecard.runtime.card import Holders
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.null import NullModel
from onecard.runtime.staging import CpuStage
from tests.unit.runtime.null_specs import ROWS, engine_of, policy, rows_of, twice_and_one


def test_a_request_says_that_it_starts_once_and_before_its_batch_runs():
    order = []

    def compute(inputs):
        order.append(f"run {len(inputs['x'])}")
        return twice_and_one(inputs)

    with engine_of(compute=compute, options=policy(max_rows=4)) as engine:
        order.clear()
        names = []
        answer = engine.submit({"x": rows_of(1, 10)}, on_start=lambda: (order.append("start"), names.append(name())))
        answer.result(30)
        assert order == ["start", "run 4", "run 4", "run 2"] and names[0].startswith("onecard-launch")


def test_a_request_that_is_run_again_alone_has_started_before():
    started = []

    def compute(inputs):
        if len(inputs["x"]) == 2 and (inputs["x"] > 500).any():
            raise ValueError("not together")
        return twice_and_one(inputs)

    with engine_of(compute=compute, options=policy(max_delay_s=0.2, max_rows=2)) as engine:
        answers = [engine.submit({"x": rows_of(i, 1)}, on_start=lambda i=i: started.append(i)) for i in (1, 2)]
        for i, answer in zip((1, 2), answers, strict=True):
            np.testing.assert_array_equal(answer.result(30)["y"], rows_of(i, 1) * 2 + 1)
    assert sorted(started) == [1, 2]


def test_what_never_runs_never_starts():
    gate, started = threading.Event(), []

    def compute(inputs):
        assert gate.wait(30)
        return twice_and_one(inputs)

    gate.set()
    with engine_of(compute=compute) as engine:
        gate.clear()
        running = threading.Event()
        first = engine.submit({"x": rows_of(0, 1)}, on_start=running.set)
        assert running.wait(30)
        cancelled = engine.submit({"x": rows_of(1, 1)}, on_start=lambda: started.append("cancelled"))
        late = engine.submit({"x": rows_of(1, 1)}, timeout_s=0.05, on_start=lambda: started.append("late"))
        assert cancelled.cancel()
        time.sleep(0.1)
        gate.set()
        first.result(30)
        assert late.exception(30) is not None
    assert started == []


def test_a_callback_that_fails_costs_nobody_anything(caplog):
    def fails() -> None:
        raise RuntimeError("mine alone")

    with engine_of() as engine:
        answer = engine.submit({"x": rows_of(1, 2)}, on_start=fails)
        np.testing.assert_array_equal(answer.result(30)["y"], rows_of(1, 2) * 2 + 1)
        engine.infer({"x": rows_of(1, 2)})
    assert "mine alone" in caplog.text


def test_the_time_of_the_oldest_batch_under_way():
    gate = threading.Event()

    def compute(inputs):
        assert gate.wait(30)
        return twice_and_one(inputs)

    gate.set()
    with engine_of(compute=compute, lanes=2) as engine:
        assert engine.running_s == 0.0
        gate.clear()
        first = engine.submit({"x": rows_of(0, 1)})
        time.sleep(0.1)
        second = engine.submit({"x": rows_of(0, 1)})
        time.sleep(0.02)
        assert 0.05 < engine.running_s < 10
        gate.set()
        first.result(30), second.result(30)
        end = time.monotonic() + 20
        while engine.running_s:
            assert time.monotonic() < end


def test_a_batch_that_fails_is_under_way_no_more():
    def compute(inputs):
        if (inputs["x"] == 7).all():
            raise ValueError("no seven")
        return twice_and_one(inputs)

    with engine_of(compute=compute) as engine:
        with pytest.raises(EngineError, match="no seven"):
            engine.infer({"x": np.full((1, 3), 7, np.float32)})
        end = time.monotonic() + 20
        while engine.running_s:
            assert time.monotonic() < end


class Recording(CpuStage):
    """Says what memory it was told of."""

    takes = True

    def __init__(self, model, sizes) -> None:
        super().__init__(model, sizes)
        self.registered: list[np.ndarray] = []

    def register(self, memory) -> bool:
        self.registered.append(memory)
        return self.takes

    def unregister(self, memory) -> None:
        self.registered.remove(memory)


def test_memory_is_registered_with_every_lane():
    stages = []

    def make_stage(model, options):
        stages.append(Recording(model, model.sizes()))
        return stages[-1]

    memory = np.zeros(64, np.uint8)
    engine = Engine([NullModel(ROWS) for _ in range(2)], EngineOptions(), make_stage=make_stage)
    assert engine.register(memory)
    assert [len(stage.registered) for stage in stages] == [1, 1]
    engine.unregister(memory)
    assert [len(stage.registered) for stage in stages] == [0, 0]
    stages[0].takes = False
    assert not engine.register(memory)
    engine.close()
    assert not engine.register(memory)
    with engine_of() as plain:
        assert not plain.register(memory), "of no use on a CPU"
        plain.unregister(memory)


def test_memory_that_several_hold_is_registered_once_and_until_the_last_lets_go():
    holders, calls = Holders(), []
    place = (4096, 64)
    assert not holders.join(place, lambda: False)
    for _ in range(3):
        assert holders.join(place, lambda: calls.append("register") or True)
    for _ in range(5):
        holders.leave(place, lambda: calls.append("unregister"))
        calls.append("left")
    assert calls == ["register", "left", "left", "unregister", "left", "left", "left"]


def name() -> str:
    return threading.current_thread().name
