"""A front for tests of the engine process: it sends what it is told to, and waits for what it expects."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onecard.ipc import packets
from onecard.ipc.messages import (
    VERSION,
    Answered,
    Done,
    Hello,
    Infer,
    Load,
    Models,
    Refused,
    Welcome,
    decode_to_front,
    encode,
    packet,
)
from onecard.ipc.models import ModelOptions
from onecard.ipc.segment import Segment
from onecard.ipc.tensors import MARK_BYTES, Tensor

ROOT = Path(__file__).parents[3]
PATIENCE_S = 100.0  # an engine's process imports torch first, on a machine that has other things to do


class Peer:
    """One front. Messages that nobody asked for yet are kept.

    Args:
        path: of the engine's socket.
        answer_bytes: of the segment of answers.
    """

    def __init__(self, path: Path, answer_bytes: int = 1 << 20) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.sock = packets.connect(path)
                break
            except (FileNotFoundError, ConnectionError):
                assert time.monotonic() < end, "nobody listens"
                time.sleep(0.01)
        self.sock.settimeout(PATIENCE_S)
        self.requests = Segment.create("test-requests", 64 << 20)
        self.answers = Segment.create("test-answers", answer_bytes)
        self.arrived: list = []
        self.kept: list = []
        self.ids = itertools.count(1)
        self.calls = itertools.count(1)
        self.next_place = 0
        self.marks: dict[int, int] = {}
        hello = Hello(VERSION, os.getpid(), self.requests.nbytes, answer_bytes)
        packets.send(self.sock, packet([encode(hello)]), (self.requests.fd, self.answers.fd))
        self.pid = self.find(lambda m: isinstance(m, Welcome)).pid

    def send(self, message) -> None:
        packets.send(self.sock, packet([encode(message)]))

    def receive(self):
        if not self.arrived:
            data, _ = packets.receive(self.sock)
            if not data:
                raise EOFError
            self.arrived += decode_to_front(data)
        return self.arrived.pop(0)

    def find(self, wanted):
        """The first message that is wanted; the others are kept."""
        for message in self.kept:
            if wanted(message):
                self.kept.remove(message)
                return message
        while True:
            message = self.receive()
            if wanted(message):
                return message
            self.kept.append(message)

    def place(self, array: np.ndarray) -> tuple[int, int]:
        """Write an array into the segment: where its mark and it lie."""
        mark = self.next_place
        offset = mark + MARK_BYTES
        self.next_place = -(-(offset + array.nbytes) // 64) * 64
        np.ndarray(array.shape, array.dtype, self.requests.array, offset)[...] = array
        return mark, offset

    def infer(self, model: str, array: np.ndarray, dtype: str = "", **more) -> int:
        """Send a request of one input; its id."""
        mark, offset = self.place(array)
        tensor = Tensor("x", dtype or array.dtype.name, array.shape, offset)
        request = next(self.ids)
        self.marks[request] = mark
        self.send(Infer(request, model, mark, (tensor,), **more))
        return request

    def mark(self, request: int) -> int:
        place = self.marks[request]
        return int(self.requests.array[place : place + 4].view("<u4")[0])

    def ended(self, request: int) -> Answered | Refused:
        return self.find(lambda m: isinstance(m, Answered | Refused) and m.id == request)

    def answer(self, request: int) -> Answered:
        ended = self.ended(request)
        assert isinstance(ended, Answered), ended
        return ended

    def refused(self, request: int) -> Refused:
        ended = self.ended(request)
        assert isinstance(ended, Refused), ended
        return ended

    def array(self, tensor: Tensor) -> np.ndarray:
        dtype = "int16" if tensor.dtype == "bfloat16" else tensor.dtype
        if tensor.offset < 0:
            return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
        return np.ndarray(tensor.shape, dtype, self.answers.array, tensor.offset)

    def load(self, name: str, path: Path | str, options: ModelOptions | None = None, version: str = "") -> Done:
        call = self.ask_load(name, path, options, version)
        return self.find(lambda m: isinstance(m, Done) and m.call == call)

    def ask_load(self, name: str, path: Path | str, options: ModelOptions | None = None, version: str = "") -> int:
        call = next(self.calls)
        self.send(Load(call, name, str(path), options or ModelOptions(), version))
        return call

    def done(self, call: int) -> Done:
        return self.find(lambda m: isinstance(m, Done) and m.call == call)

    def state(self, name: str, wanted):
        """The first state of a model, as told from here on, that is wanted."""
        while True:
            models = self.find(lambda m: isinstance(m, Models))
            for model in models.models:
                if model.name == name and wanted(model):
                    return model

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def engine_process(path: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """The engine process with null models; killed at the end if it is still there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.unit.server.null_engine", str(path), *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
