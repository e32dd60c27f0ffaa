"""An engine process that does what its requests and bundles are called: answers ``x * 3 + 7``, or dies, or hangs.

``client`` of a request, or the last part of a bundle's path, is a word, and for some the number of lives in which it
does its harm: ``die-running 2`` kills the first two engines, and the third one answers. What it hears is written into a
journal, a JSON object a line, in which the number of ``start`` lines tells it which life it lives.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np

from onecard.ipc import packets
from onecard.ipc.arena import Arena, ArenaFullError
from onecard.ipc.messages import (
    VERSION,
    Answered,
    Ask,
    Cancel,
    CloseRegion,
    Done,
    Hello,
    Infer,
    Load,
    Message,
    Models,
    OpenRegion,
    Ping,
    Pong,
    Quit,
    Refused,
    Sent,
    Told,
    Unload,
    Welcome,
    decode_to_engine,
    encode,
    packet,
)
from onecard.ipc.models import ModelState
from onecard.ipc.segment import Segment
from onecard.ipc.tensors import INLINE_BYTES, Tensor
from onecard.spec import Range, Spec, TensorSpec

SPEC = Spec(
    (TensorSpec("x", "float32", ("B", 4)),),
    (TensorSpec("y", "float32", ("B", 4)),),
    {"B": Range(1, 1 << 20)},
)


class Journal:
    """What happened, over all lives."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **facts: Any) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"event": event, **facts}) + "\n")

    def read(self, event: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]


class ScriptedEngine:
    """One connection to one front."""

    def __init__(self, sock: socket.socket, journal: Journal) -> None:
        self.sock = sock
        self.journal = journal
        self.life = len(journal.read("start"))
        self.models: dict[str, ModelState] = {}
        self.later: list[Infer] = []
        self.running_s = 0.0
        data, descriptors = packets.receive(sock, 2)
        (hello,) = decode_to_engine(data)
        assert isinstance(hello, Hello)
        self.requests = Segment.attach(descriptors[0], hello.request_bytes)
        self.answers = Segment.attach(descriptors[1], hello.answer_bytes)
        self.arena = Arena(hello.answer_bytes)

    def run(self, version: int) -> None:
        self.say(Welcome(version, os.getpid()))
        self.say(Models(()))
        while data := packets.receive(self.sock)[0]:
            for message in decode_to_engine(data):
                if isinstance(message, Quit):
                    self.journal.write("quit", life=self.life, drain_s=message.drain_s)
                    return
                getattr(self, f"on_{type(message).__name__.lower()}")(message)

    def say(self, message: Message) -> None:
        packets.send(self.sock, packet([encode(message)]))

    def on_infer(self, request: Infer) -> None:
        facts = msgspec.to_builtins(request)
        names = [field.name for field in msgspec.structs.fields(Infer)]
        facts = dict(zip(names, facts[1:], strict=True))
        mark = int(self.requests.array[request.mark : request.mark + 4].view(np.uint32)[0])
        self.journal.write("infer", life=self.life, **{**facts, "inputs": len(facts["inputs"])}, marked=mark)
        word, *rest = request.client.split() or ["answer"]
        if rest and self.life > int(rest[0]):
            word = "answer"
        getattr(self, "do_" + word.replace("-", "_"))(request)

    def mark(self, request: Infer) -> None:
        self.requests.array[request.mark] = 1

    def do_answer(self, request: Infer, version: str = "") -> None:
        self.mark(request)
        (tensor,) = [each for each in request.inputs if not each.region]
        assert tensor.offset % 64 == 0
        dtype = np.dtype(np.int16 if tensor.dtype == "bfloat16" else tensor.dtype)
        x = np.ndarray(tensor.shape, dtype, self.requests.array, tensor.offset)
        y = x if tensor.dtype == "bfloat16" else (x * 3 + 7).astype(dtype)
        place = Tensor("y", tensor.dtype, y.shape, -1, y.tobytes())
        if y.nbytes > INLINE_BYTES:
            try:
                offset = self.arena.take(y.nbytes)
            except ArenaFullError:
                self.say(Refused(request.id, "EngineError", "the answers are full"))
                return
            self.answers.array[offset : offset + y.nbytes] = y.reshape(-1).view(np.uint8)
            place = Tensor("y", tensor.dtype, y.shape, offset)
        self.say(Answered(request.id, (place,), 0.001, 0.002, len(y), version or str(self.life)))

    def do_die_waiting(self, request: Infer) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def do_die_running(self, request: Infer) -> NoReturn:
        self.mark(request)
        self.do_die_waiting(request)

    def do_exit(self, request: Infer) -> NoReturn:
        os._exit(7)

    def do_hang_running(self, request: Infer) -> None:
        self.mark(request)
        time.sleep(600)

    def do_stop_itself(self, request: Infer) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def do_run_on(self, request: Infer) -> None:
        """In a batch that does not end, while all else goes on."""
        self.mark(request)
        self.running_s = 1000.0

    def do_run(self, request: Infer) -> None:
        """Without an answer, for ever."""
        self.mark(request)

    def do_wait(self, request: Infer) -> None:
        """Not running, without an answer, for ever."""

    def do_later(self, request: Infer) -> None:
        self.later.append(request)

    def do_now(self, request: Infer) -> None:
        self.do_answer(request)
        while self.later:
            self.do_answer(self.later.pop())

    def do_refuse(self, request: Infer) -> None:
        self.say(Refused(request.id, "QueueFullError", "too many wait.", "Come back.", 3.0))

    def do_refuse_strangely(self, request: Infer) -> None:
        self.say(Refused(request.id, "SomethingElse", "what is this"))

    def do_garbage(self, request: Infer) -> None:
        packets.send(self.sock, b"\xc1\xff nonsense")

    def do_bad_offset(self, request: Infer) -> None:
        self.say(Answered(request.id, (Tensor("y", "float32", (4, 4), self.answers.nbytes - 8),), 0.0, 0.0, 1))

    def do_bad_dtype(self, request: Infer) -> None:
        self.say(Answered(request.id, (Tensor("y", "object", (1,), 0),), 0.0, 0.0, 1))

    def do_bad_size(self, request: Infer) -> None:
        self.say(Answered(request.id, (Tensor("y", "float32", (4, 4), -1, b"1234"),), 0.0, 0.0, 1))

    def do_answer_twice(self, request: Infer) -> None:
        self.do_answer(request)
        self.do_answer(request)

    def on_cancel(self, cancel: Cancel) -> None:
        self.journal.write("cancel", life=self.life, id=cancel.id)
        self.say(Refused(cancel.id, "EngineError", "cancelled"))

    def on_sent(self, sent: Sent) -> None:
        for offset in sent.offsets:
            self.arena.free(offset)
        self.journal.write("sent", offsets=sent.offsets, used=self.arena.used_bytes)

    def on_load(self, load: Load) -> None:
        self.journal.write("load", life=self.life, name=load.name, path=load.path, version=load.version,
                           device=load.options.device)  # fmt: skip
        old = self.models.get(load.name)
        word, _, lives = Path(load.path).name.partition(" ")
        word = word if not lives or self.life >= int(lives) else "fine"
        if word == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "hangs":
            time.sleep(600)
        if word == "slow":
            time.sleep(0.5)
        while word == "waits" and not (Path(load.path) / "open").exists():
            time.sleep(0.005)
        if word == "broken":
            reason = "it is broken."
            if old is not None:
                state = msgspec.structs.replace(old, reason=f"reload failed: {reason}")
            else:
                state = ModelState(load.name, "1", "UNAVAILABLE", reason)
            self.tell(state)
            self.say(Done(load.call, "BundleError", reason, "Mend it."))
            return
        version = load.version or str(int(old.version) + 1 if old else 1)
        if old is None or old.spec is None:
            self.tell(ModelState(load.name, version, "LOADING"))
        else:
            self.tell(msgspec.structs.replace(old, reason="another version is being opened"))
        self.tell(ModelState(load.name, version, "READY", "", load.path, SPEC, "cpu"))
        if word == "serves-and-kills":
            os.kill(os.getpid(), signal.SIGKILL)
        self.say(Done(load.call))

    def tell(self, state: ModelState) -> None:
        self.models[state.name] = state
        self.say(Models(tuple(self.models.values())))

    def on_unload(self, unload: Unload) -> None:
        if unload.name not in self.models:
            self.say(Done(unload.call, "UsageError", "there is no such model."))
            return
        self.tell(ModelState(unload.name, "1", "UNAVAILABLE", "unloaded"))
        self.say(Done(unload.call))

    def on_openregion(self, asked: OpenRegion) -> None:
        self.journal.write("open", life=self.life, name=asked.name, at=len(self.journal.read("infer")))
        self.say(Done(asked.call, "" if any(asked.handle) else "UsageError", "it opens nothing"))

    def on_closeregion(self, asked: CloseRegion) -> None:
        self.journal.write("close", life=self.life, name=asked.name)
        self.say(Done(asked.call))

    def on_ask(self, ask: Ask) -> None:
        self.say(Told(ask.call, b"{}", {}, len(self.later)))

    def on_ping(self, ping: Ping) -> None:
        self.say(Pong(ping.call, self.running_s))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--die-with-parent", action="store_true")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--version", type=int, default=VERSION)
    parser.add_argument("--deaf-to-quit", action="store_true")
    parser.add_argument("--never-starts", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(300)  # whatever becomes of the test
    journal = Journal(options.journal)
    journal.write("start", pid=os.getpid())
    if options.never_starts:
        raise SystemExit(3)
    listener = packets.listen(options.socket)
    sock = packets.accept(listener)
    with contextlib.suppress(ConnectionError):
        ScriptedEngine(sock, journal).run(options.version)
    if options.deaf_to_quit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)


if __name__ == "__main__":
    main()
