"""The sampler: newest and history, failures that do not end it, energy from power, the end, and what it may cost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest

from onecard.errors import UsageError
from onecard.telemetry.card_nvidia import NvidiaReader
from onecard.telemetry.card_reader import read_card
from onecard.telemetry.card_sample import CardSample, energy_between
from onecard.telemetry.sampler import MOST_OF_A_CORE, Sampler, pause_s
from tests.unit.telemetry.card_fake_nvml import FakeNvml

pytestmark = pytest.mark.timeout(200)


class Readings:
    """A reader that says what it is told to, and counts."""

    def __init__(self, answer: Callable[[int], CardSample]) -> None:
        self._answer = answer
        self.count = 0
        self.closed = 0

    def read(self) -> CardSample:
        self.count += 1
        return self._answer(self.count)

    def close(self) -> None:
        self.closed += 1


def numbered(count: int) -> CardSample:
    return CardSample(time_s=float(count), kind="nvidia", name="a card", power_w=100.0)


def eventually(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def test_newest_and_history():
    reader = Readings(numbered)
    with Sampler(reader, period_s=0.001, history=3) as sampler:
        eventually(lambda: reader.count > 6)
        times = [sample.time_s for sample in sampler.history]
        assert times == [times[0], times[0] + 1, times[0] + 2]
        assert sampler.newest.time_s >= times[2]
    assert reader.closed == 1


def test_there_is_none_before_the_first():
    gate = threading.Event()

    def slow(count: int) -> CardSample:
        gate.wait(60)
        return numbered(count)

    with Sampler(Readings(slow)) as sampler:
        assert sampler.newest is None
        assert sampler.history == ()
        gate.set()
        eventually(lambda: sampler.newest is not None)


def test_the_end_does_not_wait_for_the_next_reading():
    reader = Readings(numbered)
    sampler = Sampler(reader, period_s=3600.0)
    eventually(lambda: sampler.newest is not None)
    sampler.close()
    sampler.close()
    assert "onecard-card-sampler" not in [thread.name for thread in threading.enumerate()]
    assert (reader.count, reader.closed) == (1, 1)
    assert sampler.newest.time_s == 1.0  # still there to be told


def test_a_reader_that_raises_does_not_end_it(caplog):
    def failing(count: int) -> CardSample:
        if 2 <= count <= 5:
            raise RuntimeError("no luck")
        return numbered(count)

    reader = Readings(failing)
    with caplog.at_level(logging.WARNING), Sampler(reader, period_s=0.001) as sampler:
        eventually(lambda: len(sampler.history) > 2)
        assert [sample.time_s for sample in sampler.history][:3] == [1.0, 6.0, 7.0]
    assert [record.getMessage() for record in caplog.records] == [
        "the card's sensors cannot be read: no luck",
        "The card's sensors can be read again.",
    ]


def test_a_reader_that_cannot_be_closed(caplog):
    class Stuck(Readings):
        def close(self) -> None:
            raise OSError("stuck")

    with caplog.at_level(logging.WARNING):
        Sampler(Stuck(numbered)).close()
    assert "cannot be closed: stuck" in caplog.text


def test_a_lost_card_is_said_once_and_is_the_newest_sample(caplog):
    lib = FakeNvml()
    with caplog.at_level(logging.WARNING), Sampler(NvidiaReader(lib, "card0"), period_s=0.001) as sampler:
        eventually(lambda: sampler.newest is not None and sampler.newest.power_w is not None)
        lib.fail["nvmlDeviceGetMemoryInfo"] = lib.NVML_ERROR_GPU_IS_LOST
        eventually(lambda: len([each for each in sampler.history if each.lost]) > 3)
        assert sampler.newest.power_w is None
        lib.fail.clear()
        eventually(lambda: sampler.newest.lost is None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("NVIDIA H200: the GPU is lost")
    assert lib.open_event_sets == 0


def test_a_card_without_a_counter_gets_its_energy_from_power():
    lib = FakeNvml()
    lib.fail["nvmlDeviceGetTotalEnergyConsumption"] = lib.NVML_ERROR_NOT_SUPPORTED
    started = time.monotonic()
    with Sampler(NvidiaReader(lib, "card0"), period_s=0.01) as sampler:
        eventually(lambda: len(sampler.history) > 10)
    joules = [sample.energy_j for sample in sampler.history]
    assert joules == sorted(set(joules))
    energy = energy_between(sampler.history[0], sampler.history[-1])
    assert energy.source == "power"
    assert 612.345 * 0.01 * 10 <= energy.joules <= 612.345 * (time.monotonic() - started)


def test_a_real_processor():
    with Sampler(read_card("cpu"), period_s=0.05) as sampler:
        eventually(lambda: len(sampler.history) > 2)
        assert sampler.newest.memory_used_bytes > 0
        assert 0 <= sampler.newest.utilisation <= 1


@pytest.mark.parametrize(
    ("reading_s", "cost_s", "pause"),
    [(0.002, 0.002, 0.998), (0.05, 0.001, 0.95), (0.05, 0.05, 4.95), (3.0, 0.002, 0.0)],
)
def test_it_takes_no_more_than_its_share_of_a_core(reading_s, cost_s, pause):
    assert pause_s(1.0, reading_s, cost_s) == pytest.approx(pause)
    assert cost_s / (reading_s + pause) <= MOST_OF_A_CORE + 1e-9


def test_costly_readings_are_made_less_often():
    def costly(count: int) -> CardSample:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            sum(range(100))
        return numbered(count)

    reader = Readings(costly)
    started = time.monotonic()
    with Sampler(reader, period_s=0.01):
        eventually(lambda: reader.count == 3)
        assert time.monotonic() - started > 1.5  # the second one was counted, and the third had to wait 100 times that


@pytest.mark.parametrize(("period_s", "history"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
def test_nonsense_is_refused(period_s, history):
    with pytest.raises(UsageError, match="above 0"):
        Sampler(Readings(numbered), period_s, history)
