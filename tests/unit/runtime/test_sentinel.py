"""The sentinel finds what is wrong and only that, touches nothing else, and holds nothing up."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load_file

from onecard.bundle.manifest import read_manifest
from onecard.bundle.open import OnecardWarning, load_bundle
from onecard.errors import BundleError, EngineClosedError, EngineError
from onecard.runtime import sentinel as module
from onecard.runtime.engine import Engine
from onecard.runtime.original import Comparison, Original
from onecard.runtime.original_client import OriginalClient
from onecard.runtime.sentinel import LARGEST_DIFFERENCE, Sentinel, Watched
from onecard.runtime.served import BundleModel
from onecard.runtime.slots import as_tensor
from onecard.telemetry.histogram import DIFFERENCES, Histogram
from tests.services.running_server import GOLDEN, golden_of_here
from tests.unit.runtime.hastened_originals import hastened

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 90.0
VARIANT = "onnxruntime.cpu"


@pytest.fixture(scope="module")
def original():
    original = Original(GOLDEN, read_manifest(GOLDEN).sha256, "cpu")
    yield original
    original.close()


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "golden.safetensors")
    return {"image": tensors["in.image"]}, {"output": tensors["out.output"]}


@pytest.fixture
def hasten():
    with hastened():
        yield


class Broken(BundleModel):
    """A bundle that passed its self-test, and then answers with one too much."""

    def run(self, inputs, size):
        return {name: tensor + 1 for name, tensor in super().run(inputs, size).items()}


class Held:
    """The real original in this process, which answers when it is let."""

    def __init__(self, original: Original) -> None:
        self.original = original
        self.let = threading.Event()
        self.let.set()
        self.closed = False
        self.asked = 0
        self.busy_s = 0.0
        self.released = threading.Event()
        self.fails: list[Exception] = []

    def compare(self, inputs, outputs, variants):
        self.asked += 1
        assert self.let.wait(PATIENCE_S)
        if self.closed:
            raise EngineClosedError("closed.")
        if self.fails:
            raise self.fails.pop(0)
        tensors = [{name: as_tensor(a) for name, a in arrays.items()} for arrays in (inputs, outputs)]
        told = self.original.compare(*tensors, variants)
        return Comparison(told.difference, told.wrong, self.busy_s)

    def close(self):
        self.closed = True
        self.let.set()

    def release(self):
        self.released.set()


@pytest.fixture
def held(original):
    return Held(original)


@pytest.fixture
def watch(held):
    opened = []

    def make(every: int = 1, is_idle: Callable[[], bool] = lambda: True) -> Sentinel:
        opened.append(Sentinel(Watched("m", is_idle, (VARIANT,)), every, held, Histogram(DIFFERENCES)))
        return opened[-1]

    yield make
    for each in opened:
        each.close()
        assert held.released.is_set()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def engine_of(model: type[BundleModel]) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)  # an engine may be missing here: the next variant serves
        return Engine([model(load_bundle(golden_of_here()))])


@pytest.mark.parametrize(("model", "wrong"), [(BundleModel, 0), (Broken, 3)])
def test_a_variant_that_answers_wrongly_is_found_out_and_a_right_one_is_not(watch, golden, caplog, model, wrong):
    inputs, _ = golden
    with engine_of(model) as engine:
        sentinel = watch(1, lambda: not engine.queued[0] and not engine.running_s)
        for rows in (1, 3, 4):
            several = {"image": np.repeat(inputs["image"], rows, axis=0) * np.float32(rows)}
            sentinel.offer(several, engine.infer(several))
            until(lambda rows=rows: sentinel.figures().checked == (1, 3, 4).index(rows) + 1)
    figures = sentinel.figures()
    assert (figures.checked, figures.wrong, figures.skipped) == (3, wrong, 0)
    assert figures.differences.count == 3
    assert figures.differences.sum / 3 > 0.1 if wrong else figures.differences.sum < 1e-4
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == bool(wrong), "told in the log, but not once for each"
    assert all("model 'm' gave a wrong answer: output 'output': relative error" in line for line in said)


SPOILT = {
    "NaN": (lambda y: np.where(np.arange(10) == 3, np.nan, y).astype(np.float32), "has NaN or infinity"),
    "infinity": (lambda y: np.where(np.arange(10) == 3, np.inf, y).astype(np.float32), "has NaN or infinity"),
    "shape": (lambda y: y[:, :9], r"has shape \[1, 9\], expected \[1, 10\]"),
    "rows": (lambda y: np.repeat(y, 2, axis=0), r"has shape \[2, 10\], expected \[1, 10\]"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_cannot_be_compared_is_wrong_and_leaves_the_mean_finite(watch, golden, caplog, spoilt):
    inputs, outputs = golden
    spoil, words = SPOILT[spoilt]
    sentinel = watch()
    sentinel.offer(inputs, {"output": spoil(outputs["output"])})
    until(lambda: sentinel.figures().wrong == 1)
    assert sentinel.figures().differences.sum == LARGEST_DIFFERENCE
    (line,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert re.search(words, line)


class Untouchable(dict):
    """Arrays that nobody may look at."""

    def values(self):
        raise AssertionError("it was looked at")

    items = __getitem__ = __iter__ = values


def test_of_so_many_requests_one_is_looked_at(watch, golden):
    sentinel = watch(every=4)
    for number in range(9):
        sentinel.offer(*(golden if number % 4 == 0 else (Untouchable(), Untouchable())))
        until(lambda number=number: sentinel.figures().checked == number // 4 + 1)
    assert sentinel.figures()[:3] == (3, 0, 0)


def test_what_finds_no_room_is_skipped_and_counted(watch, held, golden):
    held.let.clear()
    sentinel = watch()
    sentinel.offer(*golden)
    until(lambda: held.asked == 1)
    for _ in range(5):
        sentinel.offer(*golden)
    assert sentinel.figures()[:3] == (0, 0, 3), "one is checked and two wait"
    held.let.set()
    until(lambda: sentinel.figures().checked == 3)
    sentinel.offer(*golden)
    until(lambda: sentinel.figures().checked == 4)
    assert sentinel.figures().skipped == 3


def test_copies_are_bounded_in_bytes_too_and_given_back(watch, golden):
    inputs, outputs = golden
    sentinel = watch()
    huge = {"image": np.broadcast_to(np.float32(0), (module.MOST_BYTES // 4, 1))}  # takes no memory, unless copied
    sentinel.offer(huge, outputs)
    assert sentinel.figures().skipped == 1
    for number in range(3):
        sentinel.offer(inputs, outputs)
        until(lambda number=number: sentinel.figures().checked == number + 1)
    until(lambda: sentinel._bytes == 0)


def test_what_cannot_be_copied_is_skipped_and_leaves_its_room(watch, golden):
    class Broke(np.ndarray):
        def copy(self, order="C"):
            raise MemoryError

    inputs, outputs = golden
    sentinel = watch()
    for _ in range(4):
        sentinel.offer({"image": inputs["image"].view(Broke)}, outputs)
    assert sentinel.figures()[:3] == (0, 0, 4)
    sentinel.offer(inputs, outputs)
    until(lambda: sentinel.figures().checked == 1)


def test_the_request_may_change_its_memory_once_it_was_offered(watch, held, golden):
    held.let.clear()
    sentinel = watch()
    inputs, outputs = ({name: array.copy() for name, array in arrays.items()} for arrays in golden)
    sentinel.offer(inputs, outputs)
    inputs["image"][...] = math.nan
    outputs["output"][...] = 7
    held.let.set()
    until(lambda: sentinel.figures().checked == 1)
    assert sentinel.figures().wrong == 0


def test_an_original_that_has_no_answer_to_one_request_is_asked_the_next(watch, held, golden, caplog):
    held.fails += [EngineError("not this one."), EngineError("nor this.")]
    sentinel = watch()
    for number in range(3):
        sentinel.offer(*golden)
        until(lambda number=number: sum(sentinel.figures()[:3]) == number + 1)
    assert sentinel.figures()[:3] == (1, 0, 2) and not sentinel.off
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["the sentinel of model 'm' passed a request over: not this one."]


def test_an_original_that_cannot_be_had_is_told_once_and_not_asked_again(watch, held, golden, caplog):
    held.fails.append(BundleError("it is gone."))
    sentinel = watch()
    sentinel.offer(*golden)
    assert held.released.wait(PATIENCE_S)
    for _ in range(5):
        sentinel.offer(*golden)
    assert (sentinel.figures()[:3], held.asked, sentinel.off) == ((0, 0, 1), 1, "it is gone.")
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["model 'm' is served without a sentinel: it is gone."]


def test_a_busy_engine_is_left_alone_until_patience_is_over_and_then_for_its_share_of_time(
    watch, held, golden, monkeypatch
):
    idle = threading.Event()
    sentinel = watch(1, idle.is_set)
    sentinel.offer(*golden)
    time.sleep(0.2)
    assert held.asked == 0, "the engine is busy"
    idle.set()
    until(lambda: sentinel.figures().checked == 1)
    idle.clear()
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    held.busy_s = 3600.0
    sentinel.offer(*golden)
    until(lambda: sentinel.figures().checked == 2)
    sentinel.offer(*golden)
    time.sleep(0.3)
    assert held.asked == 2, "the last one took an hour: the next is due in a hundred"
    idle.set()
    until(lambda: sentinel.figures().checked == 3)


def test_it_ends_at_once_whatever_it_waits_for(watch, held, golden, monkeypatch):
    monkeypatch.setattr(module, "_CLOSE_S", PATIENCE_S)
    monkeypatch.setattr(module, "PATIENCE_S", PATIENCE_S)
    for begin in ("nothing", "idleness", "original"):
        held.released.clear()
        held.closed = False
        held.let.clear()
        asked = held.asked
        sentinel = watch(1, lambda begin=begin: begin != "idleness")
        if begin != "nothing":
            sentinel.offer(*golden)
        until(lambda begin=begin, asked=asked: begin != "original" or held.asked > asked)
        began = time.monotonic()
        sentinel.close()
        assert held.released.is_set() and time.monotonic() - began < PATIENCE_S / 3, begin
        sentinel.offer(*golden)
        assert sentinel.figures()[:3] == (0, 0, 0)


def test_with_a_process_of_its_own_it_checks_and_leaves_nothing_behind(golden, hasten):
    client = OriginalClient(GOLDEN, read_manifest(GOLDEN).sha256, "cpu")
    sentinel = Sentinel(Watched("m", lambda: True, (VARIANT,)), 1, client, Histogram(DIFFERENCES))
    try:
        sentinel.offer(*golden)
        until(lambda: sentinel.figures().checked == 1)
        process = client._process
        assert process is not None and process.poll() is None
        sentinel.offer(golden[0], {"output": golden[1]["output"] + 1})
        until(lambda: sentinel.figures().wrong == 1)
        process.kill()
        until(lambda: process.returncode is not None or process.poll() is not None)
        sentinel.offer(*golden)
        until(lambda: sentinel.figures().skipped == 1)
        sentinel.offer(*golden)
        until(lambda: sentinel.figures().checked == 3)
        process = client._process
    finally:
        sentinel.close()
    assert process is not None and process.returncode is not None
