"""What a process around an engine asks of it: when a request starts, how long a batch runs, memory read in place."""

import threading
import time

import numpy as np
import pytest

from onecard.errors import DeadlineError, EngineClosedError, EngineError
from onecard.runtime import lane as lane_module
from onecard.runtime.card import Holders
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.null import NullModel
from onecard.runtime.staging import CpuStage
from tests.unit.runtime.null_specs import ROWS, engine_of, policy, rows_of, twice_and_one


class Caller:
    """Receives one answer, and keeps account of what it hears."""

    def __init__(self, heard: list, waits: bool = True) -> None:
        self.heard = heard
        self.waits = waits
        self.over = threading.Event()

    def begin(self) -> bool:
        self.heard.append("start")
        self.thread = threading.current_thread().name
        return self.waits

    def solve(self, outputs, timing) -> None:
        self.outputs, self.timing = outputs, timing
        self.over.set()

    def fail(self, error) -> None:
        self.error = error
        self.over.set()


def hand_in(engine: Engine, *rows: np.ndarray, heard: list, **how) -> list[Caller]:
    callers = [Caller(heard) for _ in rows]
    engine.run([engine.prepare({"x": x}, caller, **how) for x, caller in zip(rows, callers, strict=True)])
    return callers


def test_a_request_says_that_it_starts_once_and_before_its_batch_runs():
    order = []

    def compute(inputs):
        order.append(f"run {len(inputs['x'])}")
        time.sleep(0.001)  # too long for the calling thread
        return twice_and_one(inputs)

    with engine_of(compute=compute, options=policy(max_rows=4)) as engine:
        order.clear()
        (caller,) = hand_in(engine, rows_of(1, 10), heard=order)
        assert caller.over.wait(30)
        assert order == ["start", "run 4", "run 4", "run 2"] and caller.thread.startswith("onecard-launch")
        np.testing.assert_array_equal(caller.outputs["y"], rows_of(1, 10) * 2 + 1)
        assert caller.timing.batches == 3


def test_what_is_over_in_no_time_runs_on_the_calling_thread_and_together(monkeypatch):
    monkeypatch.setattr(lane_module, "_QUICK_S", 0.1)  # no time, even on a busy machine
    sizes = []

    def compute(inputs):
        sizes.append(len(inputs["x"]))
        return twice_and_one(inputs)

    with engine_of(compute=compute) as engine:
        for _ in range(50):  # until the prediction has forgotten the first runs
            hand_in(engine, rows_of(0, 1), heard=[])[0].over.wait(30)
        for _ in range(200):
            sizes.clear()
            callers = hand_in(engine, *[rows_of(i, 2) for i in range(3)], heard=[])
            assert all(caller.over.wait(30) for caller in callers)
            for i, caller in enumerate(callers):
                np.testing.assert_array_equal(caller.outputs["y"], rows_of(i, 2) * 2 + 1)
            if callers[0].thread == threading.current_thread().name:
                break
        else:
            pytest.fail("never on this thread")
        assert sizes == [6]
        assert engine.queued == (0, 0, 0) and engine.running_s == 0.0


def test_threads_that_hand_in_at_once_all_get_their_own_answers():
    """Each of them may find the lane idle, lent to another one, or busy."""
    rng = np.random.default_rng(3)
    slow = rng.random(64) < 0.2

    def compute(inputs):
        if slow[int(inputs["x"].sum()) % 64]:
            time.sleep(0.0005)
        return twice_and_one(inputs)

    def work(thread: int) -> None:
        for i in range(150):
            rows = [rows_of(1000 * thread + i + k, 1 + k % 2) for k in range(1 + i % 4)]
            how = {"timeout_s": 300.0} if i % 3 else {}
            for x, caller in zip(rows, hand_in(engine, *rows, heard=[], **how), strict=True):
                assert caller.over.wait(30), "lost"
                np.testing.assert_array_equal(caller.outputs["y"], x * 2 + 1)
        done.append(thread)

    done: list[int] = []
    with engine_of(compute=compute) as engine:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(100):  # beside those that wait for futures
            np.testing.assert_array_equal(engine.infer({"x": rows_of(5, 3)})["y"], rows_of(5, 3) * 2 + 1)
        for thread in threads:
            thread.join(120)
        assert sorted(done) == [0, 1, 2, 3]
        assert engine.queued == (0, 0, 0)


def test_a_batch_on_the_calling_thread_that_fails_is_run_again_one_by_one():
    def compute(inputs):
        if (inputs["x"] == 7).any():
            raise ValueError("no seven")
        return twice_and_one(inputs)

    with engine_of(compute=compute) as engine:
        for _ in range(50):
            hand_in(engine, rows_of(0, 1), heard=[])[0].over.wait(30)
        for _ in range(20):
            good, bad = hand_in(engine, rows_of(0, 1), np.full((1, 3), 7, np.float32), heard=[])
            assert good.over.wait(30) and bad.over.wait(30)
            np.testing.assert_array_equal(good.outputs["y"], rows_of(0, 1) * 2 + 1)
            assert "no seven" in str(bad.error)


def test_a_request_that_is_run_again_alone_has_started_before():
    heard = []

    def compute(inputs):
        if len(inputs["x"]) == 2 and (inputs["x"] > 500).any():
            raise ValueError("not together")
        return twice_and_one(inputs)

    with engine_of(compute=compute, options=policy(max_delay_s=0.2, max_rows=2)) as engine:
        callers = hand_in(engine, rows_of(1, 1), rows_of(2, 1), heard=heard)
        for i, caller in zip((1, 2), callers, strict=True):
            assert caller.over.wait(30)
            np.testing.assert_array_equal(caller.outputs["y"], rows_of(i, 1) * 2 + 1)
    assert heard == ["start", "start"]


def test_what_never_runs_never_starts():
    gate, started = threading.Event(), []

    def compute(inputs):
        assert gate.wait(30)
        return twice_and_one(inputs)

    gate.set()
    with engine_of(compute=compute) as engine:
        gate.clear()
        first = Caller([])
        engine.submit({"x": rows_of(0, 1)})
        while not engine.running_s:
            time.sleep(0.001)
        work = engine.prepare({"x": rows_of(1, 1)}, Caller(started))
        never = engine.prepare({"x": rows_of(1, 1)}, Caller(started))
        engine.cancel(never)
        engine.run([work, never, engine.prepare({"x": rows_of(0, 1)}, first)])
        engine.cancel(work)
        (late,) = hand_in(engine, rows_of(1, 1), heard=started, timeout_s=0.05)
        time.sleep(0.1)
        gate.set()
        assert first.over.wait(30) and late.over.wait(30)
        assert isinstance(late.error, DeadlineError)
    assert started == []


def test_a_closed_engine_has_none_of_them():
    engine = engine_of()
    works = [engine.prepare({"x": rows_of(i, 1)}, Caller([])) for i in range(2)]
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.run(works)


def test_the_time_of_the_oldest_batch_under_way():
    gate, entered = threading.Event(), threading.Semaphore(0)

    def compute(inputs):
        entered.release()
        assert gate.wait(30)
        return twice_and_one(inputs)

    gate.set()
    with engine_of(compute=compute, lanes=2) as engine:
        assert engine.running_s == 0.0
        gate.clear()
        while entered.acquire(blocking=False):  # warming up
            pass
        began = time.monotonic()
        first = engine.submit({"x": rows_of(0, 1)})
        assert entered.acquire(timeout=30)
        time.sleep(0.1)
        second = engine.submit({"x": rows_of(0, 1)})
        assert entered.acquire(timeout=30)
        running_s = engine.running_s
        assert 0.1 <= running_s <= time.monotonic() - began
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
