"""The models that the engine process hosts: opened one after the other, swapped under traffic, released."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np
import torch

from onecard.errors import EngineClosedError, EngineError, UsageError
from onecard.ipc.messages import Done, Load, Models, Told, Unload, encode
from onecard.ipc.models import ModelOptions, ModelState
from onecard.runtime.engine import Engine
from onecard.runtime.faults import is_device_lost
from onecard.runtime.ingest import raw_inputs
from onecard.runtime.ingest_text import make_ingests
from onecard.runtime.lane import OnBatch
from onecard.runtime.sentinel import Sentinel
from onecard.runtime.stats import BatchStats
from onecard.server.counters import Counters
from onecard.server.engine_figures import encode_figures
from onecard.server.engine_refusals import failed, in_a_line
from onecard.server.engine_sentinel import open_sentinel
from onecard.server.oip_metadata import model_statistics

OpenModel: TypeAlias = Callable[[str, Path, ModelOptions, OnBatch], Engine]
"""Opens a model: its name, its bundle, how, and what to tell of every batch once its answers are given."""


class Listener(Protocol):
    """The outbox of a front."""

    def send(self, data: bytes) -> None:
        """Send an encoded message."""
        ...

    def flush(self) -> None:
        """Send what was put there: a batch is over."""
        ...


Memory: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_REPLACED_DRAIN_S = 24 * 3600.0  # all of its requests are answered; a batch that hangs is for the process's guard
_LOGGER = logging.getLogger(__name__)


class Serving:
    """One version of a model, open.

    Args:
        name: of the model.
        version: of it.
        engine: of its bundle.
        counters: of this version.
        load_s: how long opening it took.
        p99_s: the latency that it is to keep, if one was named.

    Attributes:
        as_tensors: whether its requests go in as tensors, so that bfloat16 comes out as it is and not widened.
        closing: whether its engine is being closed on purpose.
        sentinel: what checks some of its answers, if it has one; closed before the engine is.
    """

    __slots__ = ("as_tensors", "closing", "counters", "engine", "load_s", "name", "p99_s", "sentinel",
                 "version")  # fmt: skip

    def __init__(
        self, name: str, version: str, engine: Engine, counters: Counters, load_s: float, p99_s: float | None
    ) -> None:
        self.name = name
        self.version = version
        self.engine = engine
        self.counters = counters
        self.load_s = load_s
        self.p99_s = p99_s
        self.as_tensors = any(t.dtype == "bfloat16" for t in (*engine.spec.inputs, *engine.spec.outputs))
        self.closing = False
        self.sentinel: Sentinel | None = None

    @property
    def lost(self) -> bool:
        """Whether it can answer nothing more, though nobody closed it."""
        return not self.closing and not self.engine.healthy


class EngineModels:
    """All models of the process. Loads and unloads are carried out in their order, on one thread.

    Args:
        open_model: see :data:`OpenModel`.
        on_lost: called when an engine can do nothing more for this process, with the reason; it does not return.
    """

    def __init__(self, open_model: OpenModel, on_lost: Callable[[str], None]) -> None:
        self._open = open_model
        self._on_lost = on_lost
        self._serving: dict[str, Serving] = {}
        self._closing: list[Serving] = []
        self._memories: list[Memory] = []
        self._engines_lock = threading.Lock()  # memories, and which engines know them
        self._states: dict[str, ModelState] = {}
        self._listeners: tuple[Listener, ...] = ()
        self._states_lock = threading.Lock()  # also: the order in which changes are told
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loading = 0
        threading.Thread(target=self._work, name="onecard-loader", daemon=True).start()

    # for requests

    def find(self, name: str) -> Serving:
        """What serves under a name.

        Raises:
            UsageError: there is no such model.
            EngineClosedError: it serves nothing at the moment.
        """
        serving = self._serving.get(name)
        if serving is not None:
            return serving
        state = self._states.get(name)
        if state is None:
            known = ", ".join(self._states) or "none"
            raise UsageError(f"there is no model '{name[:128]}': this engine has {known}.")
        reason = f" ({state.reason})" if state.reason else ""
        raise EngineClosedError(f"model '{name}' is {state.state.lower()}{reason}.", "Try again when it is ready.")

    def check(self, serving: Serving) -> None:
        """Give the whole process up if what serves is lost: what was asked of it is to be asked of the next one."""
        if serving.lost:
            self._on_lost(f"the engine of model '{serving.name}' can answer nothing more")

    def check_all(self) -> None:
        """:meth:`check` for all that serve."""
        for serving in list(self._serving.values()):
            self.check(serving)

    # for fronts

    def join(self, listener: Listener) -> None:
        """Tell a front of all models, now and after each change, as an encoded :class:`Models`."""
        with self._states_lock:
            self._listeners = (*self._listeners, listener)
            listener.send(self._told())

    def leave(self, listener: Listener) -> None:
        """Tell a front nothing any more."""
        with self._states_lock:
            self._listeners = tuple(each for each in self._listeners if each is not listener)

    def register(self, memory: Memory) -> None:
        """Let inputs be copied to the device from where they lie in this memory, also by models loaded later."""
        with self._engines_lock:
            self._memories.append(memory)
            for serving in self._serving.values():
                _register(serving, memory)

    def unregister(self, memory: Memory) -> None:
        """Forget it, once nothing is copied from it any more; nothing where it is not registered."""
        with self._engines_lock:
            self._memories = [other for other in self._memories if other is not memory]
            for serving in (*self._serving.values(), *self._closing):
                with contextlib.suppress(Exception):  # a device that is lost
                    serving.engine.unregister(memory)

    def load(self, asked: Load, done: Callable[[Done], None]) -> None:
        """Open a model when its turn comes; ``done`` is called on the loader's thread."""
        with self._states_lock:
            self._loading += 1
            new = asked.name not in self._states
        if new:
            self._change(asked.name, state="LOADING", reason="waiting for its turn")
        self._jobs.put(lambda: self._load(asked, done))

    def unload(self, asked: Unload, done: Callable[[Done], None]) -> None:
        """Release a model when its turn comes; ``done`` is called on the loader's thread."""
        self._jobs.put(lambda: self._unload(asked, done))

    def tell(self, call: int) -> Told:
        """Statistics and memory of all that serve."""
        models = list(self._serving.values())
        statistics = model_statistics([m.counters.read(m.name, m.version) for m in models])
        memory = {m.name: {key: float(n) for key, n in m.engine.memory._asdict().items()} for m in models}
        queued = sum(m.engine.queued[0] for m in (*models, *self._closing))
        return Told(call, statistics, memory, queued, encode_figures(models))

    @property
    def loading(self) -> bool:
        """Whether a model is being opened, or waits for it."""
        return self._loading > 0

    @property
    def running_s(self) -> float:
        """For how long the oldest batch of all models has been under way."""
        return max((m.engine.running_s for m in (*list(self._serving.values()), *self._closing)), default=0.0)

    def _is_idle(self) -> bool:
        """Whether no model has anything to do."""
        return not any(m.engine.queued[0] for m in list(self._serving.values())) and not self.running_s

    def close(self, drain_s: float) -> None:
        """Release all models; what waits is answered for so long at most."""
        with self._engines_lock:
            models = list(self._serving.values())
        for serving in models:
            self._release(serving, drain_s)

    # on the loader's thread

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:  # of its own: an engine that does not close, say
                _LOGGER.exception("the loader failed")
            del job  # or it would hold what it released while this thread waits

    def _load(self, asked: Load, done: Callable[[Done], None]) -> None:
        try:
            finished = self._opened(asked)
        finally:
            with self._states_lock:
                self._loading -= 1
        if isinstance(finished, Done):
            _give_memory_back()
            done(finished)
            return
        old, serving = finished
        _LOGGER.info("model '%s' version %s serves %s", serving.name, serving.version, asked.path)
        done(Done(asked.call))
        if old is not None:
            self._release(old, _REPLACED_DRAIN_S)

    def _opened(self, asked: Load) -> tuple[Serving | None, Serving] | Done:
        """Open a model and let it serve: what it replaces, and itself; or what went wrong."""
        old = self._serving.get(asked.name)
        if old is None:
            self._change(asked.name, state="LOADING", reason="")
        else:
            self._change(asked.name, reason="another version is being opened")
        counters, began = Counters(), time.monotonic()
        try:
            engine = self._open(asked.name, Path(asked.path), asked.options, lambda stats: self._ran(counters, stats))
        except Exception as error:
            if is_device_lost(error):
                self._on_lost(f"the device was lost when model '{asked.name}' was opened: {in_a_line(error)}")
            _LOGGER.warning("model '%s' could not be opened from %s: %s", asked.name, asked.path, error)
            return self._failed(asked, error, old)
        version = asked.version or _next_version(self._states[asked.name].version)
        p99_ms = asked.options.p99_ms
        p99_s = None if p99_ms is None else p99_ms / 1e3
        serving = Serving(asked.name, version, engine, counters, time.monotonic() - began, p99_s)
        serving.sentinel = open_sentinel(asked, engine, self._is_idle)
        with self._engines_lock:
            for memory in self._memories:
                _register(serving, memory)
            self._serving[asked.name] = serving
            if old is not None:
                self._closing.append(old)
        ingest = raw_inputs(engine.spec, engine.options.ingest)
        known = {"path": asked.path, "spec": engine.spec, "device": engine.device, "ingest": ingest}
        self._change(asked.name, version=version, state="READY", reason="", **known)
        return old, serving

    def _failed(self, asked: Load, error: Exception, old: Serving | None) -> Done:
        told = failed(asked.call, error, f"model '{asked.name}' could not be opened")
        if old is None:
            self._change(asked.name, state="UNAVAILABLE", reason=told.message)
        else:
            self._change(asked.name, state="READY", reason=f"reload failed: {told.message}")
        return told

    def _unload(self, asked: Unload, done: Callable[[Done], None]) -> None:
        if asked.name not in self._states:
            known = ", ".join(self._states) or "none"
            done(Done(asked.call, "UsageError", f"there is no model '{asked.name[:128]}': this engine has {known}."))
            return
        with self._engines_lock:
            serving = self._serving.pop(asked.name, None)
            if serving is not None:
                self._closing.append(serving)
        if serving is not None:
            self._change(asked.name, state="UNLOADING", reason="")
            self._release(serving, asked.drain_s)
        self._change(asked.name, state="UNAVAILABLE", reason="unloaded", path="", spec=None, device="", ingest=())
        done(Done(asked.call))

    def _release(self, serving: Serving, drain_s: float) -> None:
        """Answer what an engine has, close it, and give its memory back."""
        serving.closing = True
        if serving.sentinel is not None:
            serving.sentinel.close()
        serving.engine.close(drain_s)
        with self._engines_lock:
            if serving in self._closing:
                self._closing.remove(serving)
        _give_memory_back()

    # what is told

    def _change(self, name: str, **changes: Any) -> None:
        with self._states_lock:
            before = self._states.get(name) or ModelState(name, "", "UNAVAILABLE")
            self._states = {**self._states, name: msgspec.structs.replace(before, **changes)}
            told = self._told()
            for listener in self._listeners:
                try:
                    listener.send(told)
                except EngineError:
                    _LOGGER.exception("a front could not be told of the models")

    def _ran(self, counters: Counters, stats: BatchStats) -> None:
        """A batch is over, and its answers are in the outboxes."""
        counters.ran(stats)
        for listener in self._listeners:
            listener.flush()

    def _told(self) -> bytes:
        return encode(Models(tuple(self._states.values())))


def open_bundle(name: str, path: Path, options: ModelOptions, on_batch: OnBatch) -> Engine:
    """Open a bundle as it was tuned, with what the command line says over it.

    Args:
        name: of the model.
        path: of the bundle.
        options: see :class:`onecard.ipc.messages.ModelOptions`.
        on_batch: told of every batch.

    Raises:
        UsageError: an option that does not fit, or a form that an input cannot be made from.
        OnecardError: whatever :meth:`onecard.runtime.engine.Engine.open` raises.
    """
    from onecard.runtime.tune import tuned_options

    ingest = make_ingests(options.ingest, name)
    tuned = tuned_options(path, options.p99_ms, options.device)
    known = [field.name for field in dataclasses.fields(tuned.policy)]
    if unknown := sorted(set(options.policy) - set(known)):
        raise UsageError(f"a policy has no {', '.join(unknown)}: expected {', '.join(known)}.")
    changes: dict[str, Any] = {"policy": dataclasses.replace(tuned.policy, **options.policy)}
    if ingest:
        changes["ingest"] = ingest
    if options.timeout_s is not None:
        changes["timeout_s"] = options.timeout_s
    if options.device_memory is not None:
        changes["device_memory"] = options.device_memory
    return Engine.open(path, options.device, dataclasses.replace(tuned, **changes), on_batch)


def _register(serving: Serving, memory: Memory) -> None:
    try:
        serving.engine.register(memory)
    except Exception:  # slower, but right
        _LOGGER.exception("the requests' memory could not be registered for model '%s'", serving.name)


def _next_version(version: str) -> str:
    return str(int(version) + 1) if version.isdecimal() else "1"


def _give_memory_back() -> None:
    """What a closed engine held in reference cycles, and what PyTorch keeps for the next one."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
