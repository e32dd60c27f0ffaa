"""An engine process whose models behave as their bundle's name says; run as a script: SOCKET [LONELY_SECONDS]."""

import math
import sys
import threading
import time
from pathlib import Path

import msgspec
import torch

from onecard.errors import BundleError, UsageError
from onecard.ipc.models import ModelOptions
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.server.engine_process import run_engine
from onecard.spec import TensorSpec, parse_spec

WIDTH = 1024
MEET_S = 30.0  # who runs beside another one may have to wait for it, on a busy machine


def spec_of(dtype: str):
    inputs = parse_spec([f"x: {dtype}[B,{WIDTH}], B=1..64"])
    return msgspec.structs.replace(inputs, outputs=(TensorSpec("y", dtype, ("B", WIDTH)),))


class Crowd:
    """Counts how many models run at the same moment. The first value of a request says how many there shall be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[list[int]] = []

    def __call__(self, inputs, seconds):
        mine = [0]
        with self._lock:
            for other in (*self._running, mine):
                other[0] += 1
            mine[0] = len(self._running) + 1
            self._running.append(mine)
        expected, end = float(inputs["x"].max()), time.monotonic() + MEET_S
        while mine[0] < expected and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(seconds)
        with self._lock:
            self._running.remove(mine)
        return {"y": torch.full_like(inputs["x"], mine[0])}


class Behaviour:
    """What a model does, by the words of its bundle's name: ``add-7``, ``gate``, ``crowd-0.1``, ``fail``, ``lost``."""

    def __init__(self, folder: Path, crowd: Crowd) -> None:
        self.word, _, value = folder.name.partition("-")
        self.value = float(value) if self.word in ("add", "crowd") else 0.0
        self.folder = folder
        self.crowd = crowd
        self.live = False  # not while the engine warms up

    def __call__(self, inputs):
        if not self.live and self.word in ("crowd", "gate"):
            time.sleep(0.002)  # or it would be taken for one that is over in no time
        if self.live and self.word == "crowd":
            return self.crowd(inputs, self.value)
        if self.live and self.word == "gate":
            while not (self.folder / "open").exists():
                time.sleep(0.002)
        if self.live and self.word == "fail":
            raise ValueError("not this one")
        if self.live and self.word == "lost":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return {"y": inputs["x"] + (self.value if self.word == "add" else 0)}


def opener():
    crowd = Crowd()

    def open_model(name: str, path: Path, options: ModelOptions, on_batch) -> Engine:
        if path.name == "broken":
            raise BundleError("its files are damaged.", "Build it again.")
        if path.name == "unforeseen":
            raise RuntimeError("what is this?")
        while path.name == "late" and not (path / "open").exists():
            time.sleep(0.002)
        behaviour = Behaviour(path, crowd)
        dtype = "bfloat16" if path.name == "bfloat16" else "float32"
        chosen = EngineOptions(policy=BatchPolicy(**options.policy), timeout_s=options.timeout_s or math.inf)
        engine = Engine([NullModel(spec_of(dtype), compute=behaviour)], chosen, on_batch)
        behaviour.live = True
        return engine

    return open_model


def open_memory(handle: bytes, device: int, size: int) -> torch.Tensor:
    """A device's memory, as far as a machine without one can have it; a handle of zeros opens nothing."""
    if not any(handle):
        raise UsageError("the handle opens nothing.")
    return torch.zeros(size, dtype=torch.uint8)


if __name__ == "__main__":
    lonely_s = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    run_engine(Path(sys.argv[1]), opener(), lonely_s, open_memory)
