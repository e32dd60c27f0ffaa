"""Harm under steady load: nothing is lost, nothing is answered wrongly, and it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.attacks import chaos
from tests.attacks.chaos import Setting, harm, longest_gap_s
from tests.attacks.open_load import Sample

pytestmark = pytest.mark.timeout(240)


def test_sigterm_loses_nothing():
    damage = harm(chaos.terminate, Setting(times=1, every_s=1.5, rate_s=200))
    assert (damage.exit_code, damage.left) == (0, 0), damage
    assert set(damage.counts) == {"answered", "unreachable"}, damage
    assert damage.counts["answered"] >= 200
    assert "Traceback" not in damage.log


def test_a_filled_shared_memory_loses_nothing():
    damage = harm(chaos.fill_shared_memory, Setting(times=1, every_s=0.5, shared_bytes=64 << 20))
    assert set(damage.counts) == {"answered"}, damage
    assert "64 MiB taken" in damage.blows[0].said
    assert not list(Path("/dev/shm").glob(f"onecard-attack-{os.getpid()}"))


@pytest.mark.parametrize(
    ("action", "times", "said"),
    [
        (chaos.kill_engine, 2, "SIGKILL to "),
        (chaos.stop_engine, 1, "SIGSTOP to "),
        (chaos.crash_engine, 1, "status 500"),
        (chaos.reload_model, 5, "status 200"),
        (chaos.load_broken, 2, "status 500"),
        (chaos.load_killing, 1, "status 500"),
    ],
)
def test_a_harmed_engine_loses_nothing(action, times, said):
    damage = harm(action, Setting(times=times, every_s=1.0, rate_s=200))
    assert set(damage.counts) == {"answered"}, damage
    assert all(blow.recovery_s is not None and blow.said.startswith(said) for blow in damage.blows), damage
    assert len(damage.blows) == times
    assert (damage.exit_code, damage.left) == (0, 0), damage
    if action in (chaos.kill_engine, chaos.stop_engine, chaos.crash_engine):
        assert damage.longest_gap_s > 0.2, "the engine was not harmed"


def test_the_gap_is_found():
    def answered(ended_s: float) -> Sample:
        return Sample(0, 0.0, outcome="answered", ended_s=ended_s)

    samples = [answered(1.0), answered(4.0), answered(1.5), Sample(0, 0.0, outcome="lost", ended_s=2.0)]
    assert longest_gap_s(samples) == 2.5
    assert longest_gap_s([]) == 0
