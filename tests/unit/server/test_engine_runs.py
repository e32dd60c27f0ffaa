"""One request within the engine's process: when it ends."""

import time
from types import SimpleNamespace

import pytest

from onecard.errors import DeadlineError
from onecard.ipc.messages import Infer, Refused, decode_to_front, packet
from onecard.server.counters import Counters
from onecard.server.engine_run import Run


class Engine:
    """Its oldest batch began at a moment of the test's choice; None is none."""

    spec = None

    def __init__(self) -> None:
        self.oldest: float | None = None

    @property
    def running_s(self) -> float:
        return 0.0 if self.oldest is None else time.monotonic() - self.oldest

    def prepare(self, inputs, receiver, **_):
        self.receiver = receiver
        return object()


@pytest.fixture
def parts():
    engine, sent = Engine(), []
    engine.marks = []
    serving = SimpleNamespace(engine=engine, counters=Counters(), as_tensors=False, version="1")
    front = SimpleNamespace(
        models=SimpleNamespace(find=lambda name: serving, check=lambda serving: None),
        requests=SimpleNamespace(mark=engine.marks.append),
        outbox=SimpleNamespace(send=sent.append),
        gate=SimpleNamespace(leave=lambda: None),
        forget=lambda run: None,
    )
    run = Run(front, Infer(7, "m", 0, ()), time.monotonic())
    assert run.prepare(None) is serving
    return engine, sent


def wait_for(sent: list[bytes]) -> Refused:
    end = time.monotonic() + 30
    while not sent:
        assert time.monotonic() < end
        time.sleep(0.002)
    (message,) = decode_to_front(packet(sent))
    return message


def test_one_that_never_ran_is_refused_at_once(parts):
    engine, sent = parts
    engine.oldest = time.monotonic() - 1  # of others
    engine.receiver.fail(DeadlineError("late"))
    assert (wait_for(sent).id, len(sent)) == (7, 1)


def test_one_that_was_refused_begins_no_more(parts):
    engine, sent = parts
    engine.receiver.fail(DeadlineError("late"))
    wait_for(sent)
    assert not engine.receiver.begin(), "a batch of another lane"
    assert engine.marks == [], "its memory may be another request's by now"


def test_one_that_fails_just_as_it_begins_is_refused_behind_that_batch(parts):
    engine, sent = parts
    run = engine.receiver

    def fail_meanwhile(offset):
        engine.oldest = time.monotonic() - 1
        run.fail(DeadlineError("late"))
        assert not sent, "the mark is not written yet"

    run._front.requests.mark = fail_meanwhile
    assert run.begin()
    engine.oldest = None
    wait_for(sent)


def test_one_that_ran_is_refused_when_no_batch_of_its_time_runs_any_more(parts):
    engine, sent = parts
    assert engine.receiver.begin()
    engine.oldest = time.monotonic() - 1
    engine.receiver.fail(DeadlineError("late"))
    time.sleep(0.1)
    assert not sent, "a batch may still be reading its inputs"
    engine.oldest = time.monotonic()  # a later one reads others
    assert wait_for(sent).kind == "DeadlineError"
    time.sleep(0.05)
    assert len(sent) == 1
