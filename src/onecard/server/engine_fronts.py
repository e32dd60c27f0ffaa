"""One front as the engine process sees it: its requests, on their way through the engine and back."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from onecard.errors import DeadlineError, EngineClosedError, EngineError, OnecardError
from onecard.ipc import packets
from onecard.ipc.messages import (
    VERSION,
    Ask,
    Cancel,
    CloseRegion,
    Done,
    Hello,
    Infer,
    Load,
    OpenRegion,
    Ping,
    Pong,
    Quit,
    Sent,
    Tensor,
    Unload,
    Welcome,
    decode_to_engine,
    encode,
)
from onecard.ipc.segment import Segment
from onecard.runtime.future import RequestTiming
from onecard.runtime.slots import Array
from onecard.runtime.work import Work
from onecard.server.cuda_regions import OpenMemory
from onecard.server.engine_device import DeviceMemory
from onecard.server.engine_gate import Gate
from onecard.server.engine_inputs import Requests
from onecard.server.engine_models import EngineModels, Serving
from onecard.server.engine_outbox import Outbox
from onecard.server.engine_refusals import failed, in_a_line, refused
from onecard.server.engine_replies import Replies, Solved, outputs_of

_DESCRIPTORS = 2
_numbers = itertools.count(1)
_LOOK_S = 0.005
_LOGGER = logging.getLogger(__name__)


class Run:
    """One request; it ends with exactly one ``Answered`` or ``Refused``.

    To its model's engine it is the :class:`onecard.runtime.future.Receiver`.

    Args:
        front: whose it is.
        infer: as it came.
        began: when, in seconds of ``time.monotonic``.

    Attributes:
        work: what its model's engine is to run; None before.
    """

    __slots__ = ("_cancelled", "_ends", "_front", "_marked", "_serving", "_timing", "_waits", "alone", "began",
                 "infer", "work")  # fmt: skip

    def __init__(self, front: Front, infer: Infer, began: float) -> None:
        self._front = front
        self.infer = infer
        self.began = began
        self.alone = infer.alone
        self.work: Work | None = None
        self._serving: Serving | None = None
        self._timing: RequestTiming | None = None
        self._cancelled = self._marked = False
        self._waits = [None]  # whoever takes it away decides whether it runs: the engine, or a cancellation
        self._ends = [None]  # likewise what it ends with

    @property
    def deadline(self) -> float:
        """When it is of no use any more."""
        if self.infer.deadline is not None:
            return self.infer.deadline
        try:
            return self.began + self._front.models.find(self.infer.model).engine.options.timeout_s
        except OnecardError:
            return math.inf

    def start(self) -> None:
        """Its turn has come, after it was held back."""
        left_s = self.deadline - time.monotonic()
        if self._cancelled:
            self._end(EngineError("the request was cancelled."))
        elif left_s <= 0:
            self._end(_late(self.began))
        elif (serving := self.prepare(left_s)) is not None:
            run_all(serving, [self])

    def expire(self) -> None:
        """Its deadline passed while it was held back."""
        self._end(_late(self.began), entered=False)

    def prepare(self, timeout_s: float | None) -> Serving | None:
        """Have its model's engine look at it; whatever goes wrong is its answer.

        Returns:
            What it is to be run by.
        """
        front, infer = self._front, self.infer
        try:
            serving = front.models.find(infer.model)
            if self._serving is None:
                serving.counters.came()
            self._serving = serving
            as_tensors = serving.as_tensors
            inputs: dict[str, Array] = {
                tensor.name: front.regions.input(tensor)
                if tensor.region
                else front.requests.view(tensor, as_tensors or tensor.dtype == "bfloat16")
                for tensor in infer.inputs
            }
            self.work = serving.engine.prepare(
                inputs, self, timeout_s=timeout_s, priority=infer.priority, client=infer.client
            )
        except Exception as error:
            self._end(error)
            return None
        if self._cancelled:
            self.cancel()
        return serving

    def prepare_again(self, old: Serving, error: OnecardError) -> Serving | None:
        """Its model's engine took it not; it is for the one that replaced that, if there is one."""
        left_s = None if self.infer.deadline is None else self.infer.deadline - time.monotonic()
        try:
            replaced = self._front.models.find(self.infer.model) is not old
        except OnecardError as gone:
            replaced, error = False, gone
        if replaced and isinstance(error, EngineClosedError):
            return self.prepare(left_s)
        self.fail(error)
        return None

    def cancel(self) -> None:
        """Nobody waits for it any more; it is ended all the same."""
        self._cancelled = True
        if self.work is not None and self._serving is not None:
            if _taken(self._waits):
                self._serving.engine.cancel(self.work)
                self._end(EngineError("the request was cancelled."))
        elif self._front.gate.withdraw(self):
            self._end(EngineError("the request was cancelled."), entered=False)

    def begin(self) -> bool:
        """A batch with its first row is launched next."""
        if not _taken(self._waits):
            return False
        self._marked = True
        self._front.requests.mark(self.infer.mark)
        return True

    def solve(self, outputs: dict[str, Any], timing: RequestTiming) -> None:
        """The engine answered it."""
        self._timing = timing
        self._end(EngineError("the request was cancelled.") if self._cancelled else None, outputs)

    def fail(self, error: BaseException) -> None:
        """The engine has no answer to it."""
        if self._serving is not None and not isinstance(error, EngineClosedError):
            self._front.models.check(self._serving)
        self._end_unread(error, time.monotonic())

    def _end_unread(self, error: BaseException, failed: float) -> None:
        """End it without an answer, once no batch that began before that can be reading its inputs any more.

        The front gives their memory to other requests then; and a request that came in several batches may have failed
        with the first of them, or its time may have been over before the second.
        """
        serving = self._serving
        if self._marked and serving is not None and serving.engine.running_s > time.monotonic() - failed:
            timer = threading.Timer(_LOOK_S, self._end_unread, (error, failed))
            timer.daemon = True
            timer.start()
        else:
            self._end(error)

    def _end(
        self, error: BaseException | None, outputs: Mapping[str, Array] | None = None, *, entered: bool = True
    ) -> None:
        """Count it, and send what became of it.

        Args:
            error: why there is no answer.
            outputs: else they.
            entered: whether it was let through the gate.
        """
        if not _taken(self._ends):
            return
        front, total_s = self._front, time.monotonic() - self.began
        solved = None
        if error is None:
            try:
                solved = self._solved(outputs or {}, total_s)
                front.replies.check(solved)
            except Exception as mistake:
                error, solved = mistake, None
        if self._serving is not None:
            self._serving.counters.ended(total_s, ok=solved is not None)  # before anybody can ask whether it was
        try:
            if solved is not None:
                front.replies.send(solved)
            elif error is not None:
                front.outbox.send(encode(refused(self.infer.id, error)))
        except Exception as mistake:
            front.outbox.send(encode(refused(self.infer.id, mistake)))
        finally:
            front.forget(self)
            if entered:
                front.gate.leave()

    def _solved(self, outputs: Mapping[str, Array], total_s: float) -> Solved:
        timing, serving = self._timing, self._serving
        if timing is None or serving is None:
            raise EngineError("the engine did not say how long the request took.")
        written: tuple[Tensor, ...] = ()
        if self.infer.targets:
            outputs, written = self._front.regions.place(outputs, self.infer.targets)
        queue_s = timing.queue_s + max(0.0, total_s - timing.total_s)  # at the gate, too
        return Solved(self.infer.id, outputs_of(outputs), queue_s, total_s, timing.batch_rows, serving.version, written)


def run_all(serving: Serving, runs: Sequence[Run]) -> None:
    """Have requests run that were prepared for one engine, or for its successors if it is closed meanwhile."""
    try:
        serving.engine.run([run.work for run in runs if run.work is not None])
    except OnecardError as error:
        for run in runs:
            successor = run.prepare_again(serving, error)
            if successor is not None:
                run_all(successor, [run])


def _taken(token: list[None]) -> bool:
    """Take a token away, for one thread alone."""
    try:
        token.pop()
    except IndexError:
        return False
    return True


class Front:
    """A connection to a front; it lives on a thread of its own.

    Args:
        sock: connected; it is closed with this.
        models: of the process.
        gate: likewise.
        on_quit: called if this front asks the process to end, with the seconds it may take.
        on_gone: called once it is over.
        open_memory: opens memory of the device that a client shares; None for CUDA's.
    """

    requests: Requests
    replies: Replies

    def __init__(
        self,
        sock: socket.socket,
        models: EngineModels,
        gate: Gate,
        on_quit: Callable[[float], None],
        on_gone: Callable[[Front], None],
        open_memory: OpenMemory | None = None,
    ) -> None:
        self.models = models
        self.gate = gate
        self.outbox = Outbox(sock)
        self.regions = DeviceMemory(open_memory)
        self._sock = sock
        self._on_quit = on_quit
        self._on_gone = on_gone
        self._segments: list[Segment] = []
        self._open: dict[int, Run] = {}
        self._prepared: dict[Serving, list[Run]] = {}  # of the packet that is being read
        self._greeted = self._ending = False
        self._over = threading.Event()
        self._handlers: dict[type, Callable[[Any], None]] = {
            Infer: self._infer,
            Sent: lambda sent: self.replies.free(sent.offsets),
            Cancel: self._cancel,
            Ping: self._ping,
            OpenRegion: lambda asked: self._done(self.regions.open(asked)),
            CloseRegion: lambda asked: self._done(self.regions.close(asked)),
            Ask: self._ask,
            Load: lambda load: models.load(load, self._done),
            Unload: lambda unload: models.unload(unload, self._done),
            Quit: lambda quitting: on_quit(quitting.drain_s),
        }
        self._thread = threading.Thread(target=self._live, name=f"onecard-front-{next(_numbers)}", daemon=True)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def close(self) -> None:
        """End the connection; its requests are cancelled."""
        self.outbox.close()

    @property
    def is_idle(self) -> bool:
        """Whether everything that was asked is answered, and the answers are sent."""
        waiting = self.replies.waiting if self._greeted else 0
        return not self._open and not waiting and self.outbox.is_empty

    def forget(self, run: Run) -> None:
        """A request is over."""
        self._open.pop(run.infer.id, None)
        if self._ending and not self._open:
            self._over.set()

    def _live(self) -> None:
        try:
            self._greet()
            self._receive()
        except (EngineError, msgspec.DecodeError) as error:
            _LOGGER.error("a front broke the protocol and is dropped: %s", in_a_line(error))
        except OSError as error:
            _LOGGER.info("a front is gone: %s", error)
        except Exception:
            _LOGGER.exception("the connection to a front failed")
        finally:
            self._end()

    def _greet(self) -> None:
        """Take the segments over and tell of the models.

        Raises:
            EngineError: it is no front of this version.
        """
        data, descriptors = packets.receive(self._sock, _DESCRIPTORS)
        with contextlib.ExitStack() as undo:
            for fd in descriptors:
                undo.callback(os.close, fd)
            hello = next(iter(decode_to_engine(data)), None) if data else None
            if not isinstance(hello, Hello) or hello.version != VERSION or len(descriptors) != _DESCRIPTORS:
                raise EngineError(f"the first message is not a Hello of version {VERSION} with two segments.")
            undo.pop_all()
        sizes = (hello.request_bytes, hello.answer_bytes)
        for index, (fd, nbytes) in enumerate(zip(descriptors, sizes, strict=True)):
            try:
                self._segments.append(Segment.attach(fd, nbytes))
            except EngineError:
                for other in descriptors[index + 1 :]:
                    os.close(other)
                raise
        self.requests = Requests(self._segments[0])
        self.replies = Replies(self._segments[1], self.outbox)
        self._greeted = True
        self.models.register(self.requests.array)
        self.outbox.send(encode(Welcome(VERSION, os.getpid())))
        self.models.join(self.outbox)

    def _receive(self) -> None:
        receive, decode, handlers, sock = packets.receive, decode_to_engine, self._handlers, self._sock
        while True:
            data, _ = receive(sock)
            if not data:
                return
            for message in decode(data):
                handler = handlers.get(type(message))
                if handler is None:
                    raise EngineError(f"{type(message).__name__} came, which only the first message may be.")
                handler(message)
            while self._prepared:
                run_all(*self._prepared.popitem())
            self.outbox.flush()  # what was answered while it was being asked

    def _infer(self, infer: Infer) -> None:
        run = Run(self, infer, time.monotonic())
        if infer.id in self._open:
            raise EngineError(f"the request {infer.id} came twice.")
        self._open[infer.id] = run
        try:
            self.requests.check_mark(infer.mark)
            entered = self.gate.enter(run)
        except OnecardError as error:
            self.outbox.send(encode(refused(infer.id, error)))
            self.forget(run)
            return
        if entered:
            serving = run.prepare(None if infer.deadline is None else infer.deadline - run.began)
            if serving is not None:
                self._prepared.setdefault(serving, []).append(run)

    def _cancel(self, cancel: Cancel) -> None:
        run = self._open.get(cancel.id)
        if run is not None:  # else it was answered a moment ago
            run.cancel()

    def _ping(self, ping: Ping) -> None:
        self.models.check_all()
        self.outbox.send(encode(Pong(ping.call, self.models.running_s, self.models.loading)))

    def _ask(self, ask: Ask) -> None:
        try:
            told = self.models.tell(ask.call)
            self.outbox.send(encode(msgspec.structs.replace(told, queued=told.queued + self.gate.held)))
        except Exception as error:
            self._done(failed(ask.call, error, "the statistics could not be read"))

    def _done(self, done: Done) -> None:
        self.outbox.send(encode(done))

    def _end(self) -> None:
        """The front is gone: its requests are of no use, and its memory goes once nothing reads it."""
        self.models.leave(self.outbox)
        self.outbox.close()
        self._on_gone(self)
        for run in list(self._open.values()):
            run.cancel()
        self._ending = True
        if self._open:
            self._over.wait()
        if self._segments:
            self.models.unregister(self._segments[0].array)
        for segment in self._segments:
            segment.close()
        self.regions.release()
        self._sock.close()


def _late(began: float) -> DeadlineError:
    return DeadlineError(f"its deadline passed after {time.monotonic() - began:.3f} s of waiting.")
