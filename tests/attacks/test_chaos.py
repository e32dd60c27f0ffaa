"""Harm under steady load: nothing is lost, nothing is answered wrongly, and it goes on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.attacks import chaos
from tests.attacks.chaos import Damage, Setting, harm, longest_gap_s
from tests.attacks.open_load import Sample

pytestmark = pytest.mark.timeout(500)
AT_ONCE = 3
"""Servers that are harmed side by side: most of the time each of them waits."""
PATIENT = Setting(recover_s=150, hang_s=120, gone_s=60)
"""No engine is taken for one that hangs, for a busy machine must not kill what is sound; recovery has its time."""
SETTINGS = {
    "terminate": dataclasses.replace(PATIENT, times=1, every_s=1.5, rate_s=200),
    "fill_shared_memory": dataclasses.replace(PATIENT, times=1, every_s=0.5, shared_bytes=64 << 20),
    "kill_engine": dataclasses.replace(PATIENT, times=2, every_s=1.0, rate_s=200),
    "stop_engine": dataclasses.replace(PATIENT, times=1, every_s=1.0, rate_s=200, hang_s=3),
    "crash_engine": dataclasses.replace(PATIENT, times=1, every_s=1.0, rate_s=200),
    "reload_model": dataclasses.replace(PATIENT, times=5, every_s=0.5, rate_s=200),
    "load_broken": dataclasses.replace(PATIENT, times=2, every_s=0.5, rate_s=200),
    "load_killing": dataclasses.replace(PATIENT, times=1, every_s=0.5, rate_s=200),
}


@pytest.fixture(scope="module")
def harmed(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Damage]]:
    """Gives what came of a harm; those of all tests that were chosen are begun together."""
    chosen = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun: dict[str, Future[Damage]] = {
            name: pool.submit(harm, chaos.ACTIONS[name], setting)
            for name, setting in SETTINGS.items()
            if name in chosen
        }
        yield lambda name: begun[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ["terminate"])
def test_sigterm_loses_nothing(harmed, name):
    damage = harmed(name)
    assert (damage.exit_code, damage.left) == (0, 0), damage
    assert set(damage.counts) == {"answered", "unreachable"}, damage
    assert damage.counts["answered"] >= 20  # in a second and a half, of which a busy machine may leave little
    assert "Traceback" not in damage.log


@pytest.mark.parametrize("name", ["fill_shared_memory"])
def test_a_filled_shared_memory_loses_nothing(harmed, name):
    damage = harmed(name)
    assert set(damage.counts) == {"answered"}, damage
    assert "64 MiB taken" in damage.blows[0].said
    assert not list(Path("/dev/shm").glob(f"onecard-attack-{os.getpid()}"))


def test_a_shared_memory_that_is_full_to_the_last_byte_loses_nothing_and_is_told():
    attack = [sys.executable, "-W", "ignore", "-m", "tests.attacks.chaos", "exhaust_shared_memory"]
    command = [*in_small_shared_memory(), *attack, "--times", "1", "--every", "0.5", "--hang", "120"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=400, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    registered = "registered {'in': 200, 'out': 200, 'none': 400}"
    while_full = "full: in 200, out 507 (No space left on device), load: status 200"
    assert f"{registered}; {while_full}; then in 200, out 200" in done.stdout


def in_small_shared_memory() -> list[str]:
    """What to put before a command so that it has a small ``/dev/shm`` of its own; nothing if that is small anyway."""
    shell = ["sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    for words in (["unshare", "-m"], ["unshare", "-Urm"]):
        command = [*words, *shell]
        if (
            shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ):
            return command
    if shutil.disk_usage("/dev/shm").free > 2 << 30:
        pytest.skip("/dev/shm is large, and a small one of its own is not permitted")
    return []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kill_engine", "SIGKILL to "),
        ("stop_engine", "SIGSTOP to "),
        ("crash_engine", "status 500"),
        ("reload_model", "status 200"),
        ("load_broken", "status 500"),
        ("load_killing", "status 500"),
    ],
)
def test_a_harmed_engine_loses_nothing(harmed, name, said):
    damage = harmed(name)
    assert set(damage.counts) == {"answered"}, damage
    assert all(blow.recovery_s is not None and blow.said.startswith(said) for blow in damage.blows), damage
    assert len(damage.blows) == SETTINGS[name].times
    assert (damage.exit_code, damage.left) == (0, 0), damage
    if name in ("kill_engine", "stop_engine", "crash_engine"):
        assert damage.longest_gap_s > 0.2, "the engine was not harmed"


def test_the_gap_is_found():
    def answered(ended_s: float) -> Sample:
        return Sample(0, 0.0, outcome="answered", ended_s=ended_s)

    samples = [answered(1.0), answered(4.0), answered(1.5), Sample(0, 0.0, outcome="lost", ended_s=2.0)]
    assert longest_gap_s(samples) == 2.5
    assert longest_gap_s([]) == 0
