"""A model of the engine's process with a sentinel: from a front's request to the figures, and to the end."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from onecard.bundle.open import OnecardWarning, load_bundle
from onecard.ipc import packets
from onecard.ipc.messages import Answered, Infer, Load, Unload
from onecard.ipc.models import ModelOptions
from onecard.ipc.tensors import MARK_BYTES, Tensor
from onecard.recipe import ORIGINAL
from onecard.runtime.engine import Engine
from onecard.runtime.null import NullModel
from onecard.runtime.served import BundleModel
from onecard.server.engine_fronts import Front
from onecard.server.engine_gate import Gate
from onecard.server.engine_models import EngineModels, OpenModel, open_bundle
from tests.services.running_server import GOLDEN, golden_of_here
from tests.unit.runtime.hastened_originals import hastened
from tests.unit.server.engine_peers import Peer
from tests.unit.server.null_engine import spec_of

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="shared memory and packets between processes need Linux"),
]
PATIENCE_S = 100.0


class Broken(BundleModel):
    """A bundle that passed its self-test, and then answers with one too much."""

    def run(self, inputs, size):
        return {name: tensor + 1 for name, tensor in super().run(inputs, size).items()}


def open_broken(name, path, options, on_batch):
    return Engine([Broken(load_bundle(path))], on_batch=on_batch)


@contextlib.contextmanager
def models_of(open_model: OpenModel, options: ModelOptions, path: Path | None = None):
    """The models of an engine, with one that is loaded."""
    models = EngineModels(open_model, pytest.fail)
    loaded = threading.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)  # an engine may be missing here: the next variant serves
        models.load(Load(1, "m", str(path or golden_of_here()), options), lambda done: loaded.set())
        assert loaded.wait(PATIENCE_S)
    try:
        yield models
    finally:
        models.close(0.0)


@contextlib.contextmanager
def front_of(models: EngineModels, place: Path):
    """A connection to these models."""
    with contextlib.closing(packets.listen(place)) as listener:
        gone = threading.Event()

        def accept():
            Front(packets.accept(listener), models, Gate(), lambda s: None, lambda front: gone.set()).start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        peer = Peer(place)
        accepting.join()
        yield peer
        peer.close()
        assert gone.wait(PATIENCE_S)


def ask(peer: Peer, number: int) -> Answered:
    """One request of the golden inputs; its memory is another's as soon as it is answered."""
    image = load_file(GOLDEN / "golden.safetensors")["in.image"]
    mark, offset = peer.place(image)
    peer.send(Infer(number, "m", mark, (Tensor("image", "float32", image.shape, offset),)))
    answered = peer.answer(number)
    peer.requests.array[mark : mark + MARK_BYTES + image.nbytes] = 255
    return answered


@pytest.mark.parametrize(("open_model", "wrong"), [(open_bundle, False), (open_broken, True)])
def test_requests_of_a_front_are_checked(tmp_path, caplog, open_model, wrong):
    with (
        hastened(),
        models_of(open_model, ModelOptions("cpu", sentinel=2)) as models,
        front_of(models, tmp_path / "s") as peer,
    ):
        if {variant for _, variant in models.find("m").engine.variants} == {ORIGINAL.id}:
            pytest.skip("only the original runs here")
        sentinel = models.find("m").sentinel
        end = time.monotonic() + PATIENCE_S
        for number in (1, 2, 3):
            ask(peer, number)
            while sentinel.figures().checked < (number + 1) // 2:
                assert time.monotonic() < end
                time.sleep(0.01)
        assert sentinel.figures()[:3] == (2, 2 * wrong, 0)
        said = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(said) == wrong
        models.unload(Unload(2, "m"), lambda done: None)
        while sentinel._thread.is_alive():
            assert time.monotonic() < end
            time.sleep(0.01)


def sentinel_of(open_model: OpenModel, options: ModelOptions, path: Path | None = None):
    with models_of(open_model, options, path) as models:
        return models.find("m").sentinel


def test_a_model_has_none_unless_it_is_asked_for(caplog):
    assert sentinel_of(open_bundle, ModelOptions("cpu")) is None
    assert not caplog.records


def test_a_model_that_its_original_serves_has_none_and_the_log_says_so(caplog):
    class Eager(BundleModel):
        def variant(self, size):
            return ORIGINAL.id

    caplog.set_level(logging.INFO)
    opened = sentinel_of(
        lambda name, path, options, on_batch: Engine([Eager(load_bundle(path))]), ModelOptions(sentinel=1)
    )
    assert opened is None
    assert "model 'm' is served by its original: its sentinel has nothing to compare" in caplog.messages


def test_a_model_whose_original_is_not_there_serves_without(caplog, tmp_path):
    opened = sentinel_of(
        lambda *_: Engine([NullModel(spec_of("float32"))]), ModelOptions(sentinel=1), tmp_path / "nothing"
    )
    assert opened is None
    (line,) = [message for message in caplog.messages if "without a sentinel" in message]
    assert "is no onecard bundle" in line
