"""Who runs beside whom: the gate alone, and with threads."""

import math
import random
import threading
import time

import pytest

from onecard.errors import EngineClosedError
from onecard.server.engine_gate import Gate


class Call:
    """Something that takes a turn."""

    def __init__(self, gate: Gate, alone: bool = False, deadline: float = math.inf, fails: bool = False) -> None:
        self.gate, self.alone, self.deadline, self.fails = gate, alone, deadline, fails
        self.entered = gate.enter(self)
        self.expired = False

    def start(self) -> None:
        self.entered = True
        if self.fails:
            self.gate.leave()

    def expire(self) -> None:
        self.expired = True


def test_one_that_runs_alone_waits_for_all_and_all_wait_for_it():
    gate = Gate()
    first, second = Call(gate), Call(gate)
    alone = Call(gate, alone=True)
    third = Call(gate)
    assert [c.entered for c in (first, second, alone, third)] == [True, True, False, False]
    gate.leave()
    assert not alone.entered
    gate.leave()
    assert alone.entered and not third.entered and gate.held == 1
    fourth = Call(gate)
    assert not fourth.entered
    gate.leave()
    assert third.entered and fourth.entered and gate.held == 0


def test_those_that_run_alone_go_one_by_one_and_first():
    gate = Gate()
    lone = [Call(gate, alone=True) for _ in range(3)]
    other = Call(gate)
    for number in range(3):
        assert [c.entered for c in lone] == [i <= number for i in range(3)]
        assert not other.entered
        gate.leave()
    assert other.entered


def test_a_withdrawn_one_holds_nobody_up():
    gate = Gate()
    running = Call(gate)
    alone, other = Call(gate, alone=True), Call(gate)
    assert gate.withdraw(alone)
    assert other.entered
    assert not gate.withdraw(alone) and not gate.withdraw(running)


def test_what_is_held_back_expires():
    gate = Gate()
    Call(gate)
    alone, other = Call(gate, alone=True, deadline=5.0), Call(gate, deadline=7.0)
    gate.expire(4.9)
    assert not alone.expired and not other.entered
    gate.expire(5.0)
    assert alone.expired and not alone.entered and other.entered and not other.expired


def test_thousands_that_fail_as_they_start_need_no_deep_stack():
    gate = Gate()
    Call(gate)
    calls = [Call(gate, alone=True, fails=True) for _ in range(5000)]
    gate.leave()
    assert all(c.entered for c in calls) and Call(gate).entered


def test_a_closed_gate_lets_nobody_in_but_those_who_wait():
    gate = Gate()
    Call(gate)
    alone = Call(gate, alone=True)
    gate.close()
    with pytest.raises(EngineClosedError):
        Call(gate)
    gate.leave()
    assert alone.entered


@pytest.mark.timeout(60)
def test_with_threads_nothing_ever_runs_beside_one_that_runs_alone():
    gate, lock, running, wrong, done = Gate(), threading.Lock(), [], [], []

    class Threaded:
        deadline = math.inf

        def __init__(self, alone: bool) -> None:
            self.alone = alone
            self.over = threading.Event()

        def expire(self) -> None:
            raise AssertionError

        def start(self) -> None:
            threading.Thread(target=self.run, daemon=True).start()

        def run(self) -> None:
            with lock:
                running.append(self)
                if len(running) > 1 and any(other.alone for other in running):
                    wrong.append(self)
            time.sleep(random.random() / 2000)
            with lock:
                running.remove(self)
                done.append(self)
            self.over.set()
            gate.leave()

    def caller(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            turn = Threaded(chance.random() < 0.2)
            if gate.enter(turn):
                turn.run()
            assert turn.over.wait(30)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) == 240 and gate.held == 0
