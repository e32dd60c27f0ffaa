"""The models of an engine process: loaded, reloaded under traffic, unloaded; in a real process, and the class alone."""

import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from onecard.bundle.open import OnecardWarning
from onecard.errors import EngineClosedError, UsageError
from onecard.ipc.messages import (
    Answered,
    Done,
    Load,
    Models,
    Ping,
    Pong,
    Refused,
    Sent,
    Unload,
    decode_to_front,
    packet,
)
from onecard.ipc.models import ModelOptions
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.null import NullModel
from onecard.runtime.staging import CpuStage
from onecard.server.engine_models import EngineModels, open_bundle
from tests.unit.server.engine_peers import PATIENCE_S, Peer, engine_process
from tests.unit.server.null_engine import WIDTH, spec_of

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="shared memory and packets between processes need Linux"),
]
ONE = np.ones((1, WIDTH), np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "s"
    with engine_process(path, "60") as process:
        yield path
        assert process.poll() is None, "a test's mistake ended the engine"


@pytest.fixture
def peer(place):
    peer = Peer(place)
    yield peer
    peer.close()


def ready(model) -> bool:
    return model.state == "READY"


def test_what_is_loaded_serves_and_every_front_is_told(place, peer):
    other = Peer(place)
    assert peer.load("told", "add-1") == Done(1)
    for front in (peer, other):
        model = front.state("told", ready)
        assert (model.version, model.reason, model.path, model.device) == ("1", "", "add-1", "cpu")
        assert model.spec == spec_of("float32")
    late = Peer(place)
    assert late.state("told", ready).version == "1"
    assert value_of(late, "told") == (2.0, "1")
    other.close(), late.close()


def test_versions_count_up_or_are_what_they_are_told_to_be(peer):
    for bundle, version, expected in (("add-1", "", "1"), ("add-2", "", "2"), ("add-3", "7", "7"), ("add-4", "", "8")):
        assert not peer.load("versions", bundle, version=version).kind
        assert value_of(peer, "versions") == (1.0 + float(bundle[-1]), expected)


@pytest.mark.parametrize("bundle, kind", [("broken", "BundleError"), ("unforeseen", "EngineError")])
def test_a_reload_that_fails_leaves_the_old_one_serving(peer, bundle, kind):
    name = f"steady-{bundle}"
    peer.load(name, "add-1")
    peer.state(name, ready)
    done = peer.load(name, bundle)
    assert done.kind == kind and done.message
    model = peer.state(name, lambda m: "failed" in m.reason)
    assert (model.state, model.version, model.path) == ("READY", "1", "add-1") and done.message in model.reason
    assert value_of(peer, name) == (2.0, "1")
    assert not peer.load(name, "add-5").kind
    assert value_of(peer, name) == (6.0, "2"), "a version that never served is not counted"
    assert peer.state(name, lambda m: m.version == "2" and ready(m)).reason == ""


def test_a_first_load_that_fails_leaves_nothing(peer):
    assert peer.load("never", "broken").kind == "BundleError"
    assert peer.state("never", lambda m: m.state == "UNAVAILABLE").reason == "its files are damaged."
    refused = peer.refused(peer.infer("never", ONE))
    assert refused.kind == "EngineClosedError" and "damaged" in refused.message
    assert not peer.load("never", "add-1").kind
    assert value_of(peer, "never") == (2.0, "1")


def test_while_it_is_opened_the_old_one_serves_and_loads_keep_their_order(peer, tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    peer.load("slow", "add-1")
    calls = [peer.ask_load("slow", late), peer.ask_load("slow", "broken"), peer.ask_load("slow", "add-3")]
    peer.ask_load("afterwards", "add-1")

    def is_under_way(message) -> bool:
        told = {model.name: model.reason for model in message.models} if isinstance(message, Models) else {}
        return told.get("slow") == "another version is being opened" and "waiting" in told.get("afterwards", "")

    peer.find(is_under_way)
    assert value_of(peer, "slow") == (2.0, "1")
    peer.send(Ping(1))
    assert peer.find(lambda m: isinstance(m, Pong)).loading
    (late / "open").touch()
    kinds = {}
    while len(kinds) < 3:
        done = peer.find(lambda m: isinstance(m, Done) and m.call in calls)
        kinds[done.call] = done.kind
    assert list(kinds.items()) == list(zip(calls, ["", "BundleError", ""], strict=True))
    assert value_of(peer, "slow") == (4.0, "3")


def test_nothing_is_lost_when_a_model_is_replaced_under_traffic(place, peer):
    peer.load("traffic", "add-0")
    stop, wrong, seen = threading.Event(), [], []

    def ask_on() -> None:
        front = Peer(place)
        tag = 0.0
        while not stop.is_set():
            burst = []
            for rows in (1, 2, 16, 5):
                tag += 1
                burst.append((front.infer("traffic", np.full((rows, WIDTH), tag, np.float32)), tag))
            for request, sent in burst:
                ended = front.ended(request)
                if not isinstance(ended, Answered):
                    wrong.append(ended)
                    continue
                output = ended.outputs[0]
                if not (front.array(output) == sent + int(ended.version) - 1).all():
                    wrong.append(ended)
                seen.append(ended.version)
                if output.offset >= 0:
                    front.send(Sent((output.offset,)))
            front.next_place = 0
        front.close()

    threads = [threading.Thread(target=ask_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    for added in range(1, 16):
        assert not peer.load("traffic", f"add-{added}").kind
        asked, end = len(seen) + 8, time.monotonic() + PATIENCE_S
        while not wrong and (str(added + 1) not in seen[-8:] or len(seen) < asked):
            assert time.monotonic() < end, "the new one answers nobody"
            time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and set(seen) >= {str(version) for version in range(2, 17)} and len(seen) > 100


def test_what_the_old_one_has_is_answered_by_it(peer, tmp_path):
    gate = tmp_path / "gate"
    gate.mkdir()
    peer.load("handed", gate)
    running = peer.infer("handed", ONE)
    while not peer.mark(running):
        time.sleep(0.002)
    waiting = peer.infer("handed", ONE)
    assert not peer.load("handed", "add-1").kind, "the new one does not wait for the old one's requests"
    assert value_of(peer, "handed") == (2.0, "2")
    (gate / "open").touch()
    assert [peer.answer(request).version for request in (running, waiting)] == ["1", "1"]


def test_unloading_answers_what_waits_and_refuses_what_comes(peer, tmp_path):
    gate = tmp_path / "gate"
    gate.mkdir()
    peer.load("leaving", gate)
    requests = [peer.infer("leaving", ONE) for _ in range(3)]
    while not peer.mark(requests[0]):
        time.sleep(0.002)
    peer.send(Unload(100, "leaving", 100.0))
    peer.state("leaving", lambda m: m.state == "UNLOADING")
    refused = peer.refused(peer.infer("leaving", ONE))
    assert refused.kind == "EngineClosedError" and "unloading" in refused.message
    (gate / "open").touch()
    for request in requests:
        peer.answer(request)
    assert peer.done(100) == Done(100)
    model = peer.state("leaving", lambda m: m.state == "UNAVAILABLE")
    assert (model.reason, model.path, model.spec) == ("unloaded", "", None)
    assert "unloaded" in peer.refused(peer.infer("leaving", ONE)).message
    peer.send(Unload(101, "leaving"))
    assert not peer.done(101).kind, "what is gone may go again"
    peer.send(Unload(102, "nobody"))
    assert peer.done(102).kind == "UsageError"
    assert not peer.load("leaving", "add-1").kind
    assert value_of(peer, "leaving") == (2.0, "2")


def test_unloading_waits_for_no_longer_than_it_is_told(peer, tmp_path):
    gate = tmp_path / "gate"
    gate.mkdir()
    peer.load("sleepy", gate)
    requests = [peer.infer("sleepy", np.ones((60, WIDTH), np.float32)) for _ in range(4)]
    while not peer.mark(requests[0]):
        time.sleep(0.002)
    peer.send(Unload(100, "sleepy", 0.1))
    ends = [peer.ended(request) for request in requests[1:]]  # while the first one runs on
    assert all(isinstance(end, Refused) and end.kind == "EngineClosedError" for end in ends)
    (gate / "open").touch()
    peer.answer(requests[0])
    assert not peer.done(100).kind


class RecordingStage(CpuStage):
    """Remembers which memory it may read in place."""

    def __init__(self, model, sizes) -> None:
        super().__init__(model, sizes)
        self.registered: list[np.ndarray] = []

    def register(self, memory) -> bool:
        self.registered.append(memory)
        return True

    def unregister(self, memory) -> None:
        self.registered = [other for other in self.registered if other is not memory]


def test_the_memory_of_a_front_is_known_to_all_models_from_then_on_and_forgotten():
    stages = []

    def make_stage(model, options):
        stages.append(RecordingStage(model, model.sizes()))
        return stages[-1]

    def open_model(name, path, options, on_batch):
        return Engine([NullModel(spec_of("float32"))], EngineOptions(), on_batch, make_stage)

    models = EngineModels(open_model, pytest.fail)
    first, second = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
    load(models, "a")
    models.register(first)
    load(models, "b")
    models.register(second)
    assert [len(stage.registered) for stage in stages] == [2, 2]
    models.unregister(first)
    load(models, "b")
    assert [[m is second for m in stage.registered] for stage in (stages[0], stages[2])] == [[True], [True]]
    models.close(0.0)


class Told(list):
    """What a front was sent."""

    def send(self, data):
        self.append(data)

    def flush(self):
        """Nothing is put here."""


def test_who_left_is_told_nothing():
    models = EngineModels(lambda *_: Engine([NullModel(spec_of("float32"))]), pytest.fail)
    stays, leaves = Told(), Told()
    models.join(stays), models.join(leaves)
    models.leave(leaves)
    models.leave(leaves)
    load(models, "a")
    assert len(leaves) == 1 and len(stays) > 1
    assert decode_to_front(packet([stays[-1]]))[0].models[0].state == "READY"
    models.close(0.0)
    with pytest.raises(UsageError, match="there is no model 'x': this engine has a"):
        models.find("x")


def test_a_request_that_finds_the_replaced_engine_closed_may_look_again():
    models = EngineModels(lambda *_: Engine([NullModel(spec_of("float32"))]), pytest.fail)
    load(models, "a")
    old = models.find("a")
    load(models, "a")
    deadline = time.monotonic() + PATIENCE_S
    while not old.closing or old.engine.healthy:
        assert time.monotonic() < deadline
    with pytest.raises(EngineClosedError):
        old.engine.submit({"x": ONE})
    assert models.find("a") is not old and not old.lost
    models.check_all()
    models.close(0.0)


def test_a_bundle_is_opened_with_what_the_command_line_says():
    options, batches = ModelOptions("cpu", policy={"max_rows": 4, "queue_items": 7}, timeout_s=2.5), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)  # an engine may be missing here: the next variant serves
        engine = open_bundle("m", GOLDEN, options, batches.append)
    with engine:
        engine.infer({"image": load_file(GOLDEN / "golden.safetensors")["in.image"]})
        assert (engine.options.policy.max_rows, engine.options.policy.queue_items) == (4, 7)
        assert engine.options.timeout_s == 2.5 and engine.device == "cpu"
    assert len(batches) == 1


def test_options_that_do_not_fit_say_what_does():
    with pytest.raises(UsageError, match="max_rows"):
        open_bundle("m", GOLDEN, ModelOptions("cpu", policy={"rows": 4}), print)


def load(models: EngineModels, name: str) -> None:
    told = threading.Event()
    models.load(Load(1, name, "", ModelOptions()), lambda done: told.set())
    assert told.wait(PATIENCE_S)


def value_of(peer: Peer, model: str) -> tuple[float, str]:
    """What a model makes of ones, and its version."""
    answer = peer.answer(peer.infer(model, ONE))
    return float(peer.array(answer.outputs[0])[0, 0]), answer.version
