"""A search that is killed goes on where it was; Ctrl-C keeps what is done; nothing half-written stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import INPUT, MODEL_FILE

AT_ONCE = 2
RECIPES = ("torchscript.trace", "eager+fold_bn")
MORE = (*RECIPES, "torchscript.script", "eager+channels_last", "torchscript.trace+fold_bn")
"""So many that some are left when the interruption comes, also from a test that is held up."""


@dataclass(frozen=True)
class Place:
    """Where a search is interrupted: a folder of its own, with its model and its cache."""

    folder: Path
    recipes: tuple[str, ...] = RECIPES

    @property
    def out(self) -> Path:
        return self.folder / "small.onecard"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "ONECARD_CACHE": str(self.cache)}

    def command(self) -> list[str]:
        recipes = [part for r in self.recipes for part in ("--recipe", r)]
        # As a terminal would start it: where this test itself runs in the background, Ctrl-C may be ignored.
        listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        onecard = [sys.executable, "-c", f"{listen}; from onecard.cli import main; main()"]
        words = ["--input", INPUT, "--batch", "2", "--device", "cpu", *recipes, "-o", str(self.out)]
        return [*onecard, "optimize", f"{self.folder / 'zoo.py'}:small", *words]

    def start(self) -> subprocess.Popen[bytes]:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(self.command(), env=self.environment, **output)

    def results(self) -> dict[str, float]:
        found = self.cache.glob("searches/*/candidates/*/result.json")
        return {path.parent.name: path.stat().st_mtime for path in found}

    def wait_for_results(self, count: int, process: subprocess.Popen[bytes], limit_s: float = 200) -> None:
        end = time.monotonic() + limit_s
        while len(self.results()) < count:
            assert process.poll() is None, "the search ended before it could be interrupted"
            assert time.monotonic() < end, "the search made no progress"
            time.sleep(0.1)

    def workers(self) -> list[psutil.Process]:
        found = [p for p in psutil.process_iter(["cmdline"]) if "onecard.search.worker" in (p.info["cmdline"] or [])]
        return [p for p in found if str(self.cache) in " ".join(p.info["cmdline"])]

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if p.name.startswith("."))


def after_kill_9_the_same_command_goes_on(place: Place) -> None:
    first = subprocess.Popen(
        place.command(), env=place.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    place.wait_for_results(2, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = place.results()
    assert not place.out.exists()
    end = time.monotonic() + 15
    while place.workers():
        assert time.monotonic() < end, "a worker outlived the search"
        time.sleep(0.2)

    subprocess.run(place.command(), env=place.environment, check=True, capture_output=True, timeout=300)
    after = place.results()
    assert set(after) == {"eager", *RECIPES}
    assert {name: after[name] for name in done} == done, "a finished candidate was run again"
    evidence = json.loads((place.out / "evidence.json").read_text())
    assert {c["verdict"]["reason"] for c in evidence["candidates"]} <= {"ok", "slower"}
    assert place.leftovers() == []


def ctrl_c_once_writes_a_bundle_of_what_is_done(place: Place) -> None:
    process = place.start()
    place.wait_for_results(2, process)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 0, text
    evidence = json.loads((place.out / "evidence.json").read_text())
    reasons = [c["verdict"]["reason"] for c in evidence["candidates"]]
    assert "skipped" in reasons and "ok" in reasons
    assert "interrupted" in text


def ctrl_c_twice_ends_with_one_message_and_writes_nothing(place: Place) -> None:
    process = place.start()
    place.wait_for_results(2, process)
    killed = place.workers()
    process.send_signal(signal.SIGINT)
    end = time.monotonic() + 60
    while any(worker.is_running() for worker in killed):  # the first one is not heard yet, and the two would be one
        assert time.monotonic() < end, "Ctrl-C did not end the candidate that was tried"
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, text
    assert text.count("error:") == 1 and "Traceback" not in text
    assert not place.out.exists()
    assert place.leftovers() == []


def ctrl_c_before_anything_is_ready(place: Place) -> None:
    process = place.start()
    end = time.monotonic() + 120
    while not list(place.cache.glob("searches/*/job.json")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, text
    assert text.count("error:") == 1 and "Traceback" not in text
    assert not place.out.exists() and os.listdir(place.folder)


INTERRUPTIONS = (
    after_kill_9_the_same_command_goes_on,
    ctrl_c_once_writes_a_bundle_of_what_is_done,
    ctrl_c_twice_ends_with_one_message_and_writes_nothing,
    ctrl_c_before_anything_is_ready,
)


@pytest.fixture(scope="module")
def begun(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The interruptions that were chosen, two side by side; each says in its own words what was wrong."""
    chosen = [item.callspec.params.get("what") for item in request.session.items if hasattr(item, "callspec")]
    futures: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for what in INTERRUPTIONS:
            if what.__name__ in chosen:
                recipes = RECIPES if what is after_kill_9_the_same_command_goes_on else MORE
                place = Place(tmp_path_factory.mktemp("interrupted"), recipes)
                (place.folder / "zoo.py").write_text(MODEL_FILE)
                futures[what.__name__] = pool.submit(what, place)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", [what.__name__ for what in INTERRUPTIONS])
def test_a_search_that_is_interrupted(begun, what):
    begun[what].result()
