"""What goes wrong around an engine's lanes: everybody is told, and the engine goes on or says that it cannot."""

import math
import sys
import threading
import time

import numpy as np
import pytest

from onecard.errors import EngineClosedError, EngineError, UsageError
from onecard.runtime import lane as lane_module
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.future import Answer
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.runtime.staging_cuda import CudaOptions, CudaStage
from tests.unit.runtime.null_specs import ROWS, engine_of, rows_of, twice_and_one
from tests.unit.runtime.simulated_card import SimulatedCard


class Panic(BaseException):
    """What some native libraries raise."""


class Model:
    """Does what a test says with the rows of one tag, and waits for a gate."""

    def __init__(self, act=None) -> None:
        self.act = act
        self.gate = threading.Event()
        self.gate.set()
        self.ran: list[int] = []

    def __call__(self, inputs):
        x = inputs["x"]
        self.ran.append(len(x))
        assert self.gate.wait(30)
        if self.act is not None and bool((x == 7000.0).any()):
            self.act()
        return twice_and_one(inputs)


def raising(error: BaseException):
    def act():
        raise error

    return act


def on_card(model: NullModel, options: EngineOptions) -> CudaStage:
    return CudaStage(model, [{"B": 8}], (), CudaOptions(3, timings=options.timings), card=SimulatedCard(0))


def serves(engine: Engine) -> None:
    np.testing.assert_array_equal(engine.submit({"x": rows_of(1, 2)}).result(30)["y"], rows_of(1, 2) * 2 + 1)
    assert engine.healthy and engine.queued == (0, 0, 0)


def is_released(engine: Engine) -> bool:
    return engine._lanes[0].stage._slab is None


@pytest.fixture
def on_this_thread(monkeypatch):
    """Whatever is handed in with ``run`` is quick enough for the calling thread."""
    monkeypatch.setattr(lane_module, "_QUICK_S", math.inf)


def test_an_answer_that_failed_does_not_begin():
    answer = Answer()
    answer.fail(EngineError("on another lane"))
    assert not answer.begin()
    with pytest.raises(EngineError, match="on another lane"):
        answer.result(0)
    cancelled = Answer()
    assert cancelled.cancel()
    cancelled.fail(EngineError("too late"))
    assert not cancelled.begin() and cancelled.cancelled()


def test_times_that_nobody_took_change_no_prediction():
    options = EngineOptions(policy=BatchPolicy(max_rows=8), timings=False)
    with Engine([NullModel(ROWS, (8,), twice_and_one)], options, None, on_card) as engine:
        before = engine._dispatch._costs.seconds((8,))
        for _ in range(3):
            serves(engine)
        assert engine._dispatch._costs.seconds((8,)) == before


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_request_cancelled_as_it_is_handed_in_is_dropped(lanes, on_this_thread):
    class Late(list):
        """Requests that are cancelled once they were looked at."""

        def __iter__(self):
            yield from list.__iter__(self)
            for work in list.__iter__(self):
                engine.cancel(work)

    with engine_of(lanes=lanes) as engine:
        engine.run(Late([engine.prepare({"x": rows_of(1, 1)}, Answer())]))
        serves(engine)


@pytest.mark.parametrize("error", [Panic("native"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["host", "card"])
def test_whatever_a_model_raises_only_its_callers_hear_of_it(stage, error):
    model = Model(raising(error))
    options = EngineOptions(policy=BatchPolicy(max_rows=8))
    made = [NullModel(ROWS, (8,), model)]
    with Engine(made, options, None, on_card) if stage == "card" else Engine(made, options) as engine:
        with pytest.raises(EngineError, match=type(error).__name__):
            engine.submit({"x": rows_of(7, 2)}).result(30)
        serves(engine)


def test_what_is_found_out_late_fails_its_callers_alone_too():
    stages = []

    def make_stage(model, options):
        stages.append(on_card(model, options))
        return stages[0]

    with Engine([NullModel(ROWS, (8,), twice_and_one)], EngineOptions(), None, make_stage) as engine:
        launch = stages[0].launch

        def launch_once(*arguments):
            stages[0].launch = launch
            flight = launch(*arguments)
            flight.wait = raising(Panic("native"))
            return flight

        stages[0].launch = launch_once
        with pytest.raises(EngineError, match="Panic"):
            engine.submit({"x": rows_of(7, 2)}).result(30)
        serves(engine)


@pytest.mark.parametrize("stage", ["host", "card"])
def test_sizes_that_raise_fail_all_that_waits(stage, caplog):
    class NoSeven(NullModel):
        def fit(self, rows, lengths):
            if rows == 7:
                raise ValueError("seven rows")
            return super().fit(rows, lengths)

    made = [NoSeven(ROWS, (), twice_and_one)]
    options = EngineOptions(policy=BatchPolicy(max_rows=8))
    with Engine(made, options, None, on_card) if stage == "card" else Engine(made, options) as engine:
        with pytest.raises(EngineError, match="itself failed: ValueError: seven rows"):
            engine.submit({"x": rows_of(1, 7)}).result(30)
        with pytest.raises(EngineError, match="itself failed"):
            engine.submit({"x": rows_of(1, 1)})
        assert not engine.healthy
    assert "failed" in caplog.text


def test_sizes_that_raise_on_the_calling_thread_do_so_too(on_this_thread, monkeypatch, caplog):
    def raises_once(*_):
        monkeypatch.undo()
        raise ValueError("no size")

    with engine_of() as engine:
        batcher = engine._dispatch._batcher
        monkeypatch.setattr(batcher, "at_once", lambda *_: None)
        monkeypatch.setattr(batcher, "next", raises_once)
        answer = Answer()
        engine.run([engine.prepare({"x": rows_of(1, 1)}, answer)])
        with pytest.raises(EngineError, match="itself failed: ValueError: no size"):
            answer.result(30)
        assert not engine.healthy
    assert "failed" in caplog.text


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_goes_on_once_everybody_was_told(error, others, on_this_thread):
    with engine_of(compute=Model(raising(error))) as engine:
        hit, spared = Answer(), [Answer() for _ in range(others)]
        works = [engine.prepare({"x": rows_of(7, 1)}, hit)]
        works += [engine.prepare({"x": rows_of(1, 2)}, answer) for answer in spared]
        with pytest.raises(type(error)):
            engine.run(works)
        with pytest.raises(EngineError, match=type(error).__name__):
            hit.result(30)
        for answer in spared:  # run again one by one, on the lane's own thread
            np.testing.assert_array_equal(answer.result(30)["y"], rows_of(1, 2) * 2 + 1)
        serves(engine)


def test_an_interrupt_of_the_engines_own_code_goes_on_too(on_this_thread, monkeypatch, caplog):
    with engine_of() as engine:
        monkeypatch.setattr(engine._lanes[0], "_launch", lambda batch: raising(KeyboardInterrupt())())
        answer = Answer()
        with pytest.raises(KeyboardInterrupt):
            engine.run([engine.prepare({"x": rows_of(1, 1)}, answer)])
        with pytest.raises(EngineError, match="itself failed"):
            answer.result(30)
        assert engine.running_s == 0.0, "who gives memory back waits for that"
    assert "failed" in caplog.text


@pytest.mark.parametrize("name", ["prepare", "submit", "infer"])
def test_a_timeout_that_is_no_number(name):
    with engine_of() as engine:
        arguments = ({"x": rows_of(1, 1)}, Answer()) if name == "prepare" else ({"x": rows_of(1, 1)},)
        with pytest.raises(UsageError, match="timeout_s is nan, but must be a number of seconds"):
            getattr(engine, name)(*arguments, timeout_s=math.nan)
        serves(engine)


def test_what_is_left_of_a_request_that_failed_is_not_run():
    model = Model(raising(ValueError("no")))
    with engine_of(compute=model, batches=(8,)) as engine:
        model.ran.clear()
        answer = engine.submit({"x": rows_of(7, 200)})
        with pytest.raises(EngineError, match="no"):
            answer.result(30)
        assert engine.queued == (0, 0, 0)
        serves(engine)
        assert model.ran == [8, 8], "the first of its batches, and another request's"


def test_answers_that_do_not_fit_end_a_request_whole():
    ran = []

    def odd(inputs):
        ran.append(len(inputs["x"]))
        return {"other": inputs["x"]} if bool((inputs["x"] == 7000.0).any()) else twice_and_one(inputs)

    with engine_of(compute=odd, batches=(8,)) as engine:
        ran.clear()
        with pytest.raises(EngineError):
            engine.submit({"x": rows_of(7, 200)}).result(30)
        serves(engine)
        assert len(ran) == 2


def test_closing_that_was_interrupted_can_be_gone_on_with(monkeypatch):
    engine = engine_of()
    before = sys.getswitchinterval()
    with monkeypatch.context() as patch:
        patch.setattr(engine._lanes[0], "join", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    assert not is_released(engine) and not engine.healthy
    engine.close()
    assert is_released(engine)
    engine.close()
    assert sys.getswitchinterval() >= before


def _interrupted(timeout_s=None):
    raise KeyboardInterrupt


def test_who_closes_it_meanwhile_waits_for_the_end():
    model = Model()
    engine = engine_of(compute=model)
    model.gate.clear()
    answer = engine.submit({"x": rows_of(1, 1)})
    closing = [threading.Thread(target=engine.close) for _ in range(2)]
    for thread in closing:
        thread.start()
    closing[1].join(0.1)
    assert all(thread.is_alive() for thread in closing)
    model.gate.set()
    for thread in closing:
        thread.join(30)
    assert answer.done() and is_released(engine)


def closed_by(engine: Engine, heard: list[object]):
    def close(_):
        try:
            heard.append(engine.close())
        except BaseException as error:
            heard.append(error)

    return close


def until_released(engine: Engine) -> None:
    end = time.monotonic() + 30
    while not is_released(engine):
        assert time.monotonic() < end, "never released"
        time.sleep(0.005)


def test_an_answers_callback_may_close_the_engine():
    model, heard = Model(), []
    engine = engine_of(compute=model)
    model.gate.clear()
    answer = engine.submit({"x": rows_of(1, 1)})
    answer.add_done_callback(closed_by(engine, heard))
    behind = engine.submit({"x": rows_of(2, 1)})
    model.gate.set()
    until_released(engine)
    assert heard == [None] and behind.done()


def test_also_on_the_thread_that_handed_in(on_this_thread):
    engine, heard, answer = engine_of(), [], Answer()
    answer.add_done_callback(closed_by(engine, heard))
    engine.run([engine.prepare({"x": rows_of(1, 1)}, answer)])
    assert answer.done()
    until_released(engine)
    assert heard == [None]


def test_also_when_it_fails_because_the_engine_closes():
    model, heard = Model(), []
    engine = engine_of(compute=model)
    model.gate.clear()
    engine.submit({"x": rows_of(1, 1)})
    while not engine.running_s:
        time.sleep(0.001)
    waiting = engine.submit({"x": rows_of(2, 1)})
    waiting.add_done_callback(lambda _: model.gate.set())
    waiting.add_done_callback(closed_by(engine, heard))
    engine.close(0.0)
    with pytest.raises(EngineClosedError):
        waiting.result(0)
    assert heard == [None] and is_released(engine)
