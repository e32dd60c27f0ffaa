"""One front as the engine process sees it: its requests, on their way through the engine and back."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from onecard.errors import EngineError, OnecardError
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
    Unload,
    Welcome,
    decode_to_engine,
    encode,
)
from onecard.ipc.segment import Segment
from onecard.server.cuda_regions import OpenMemory
from onecard.server.engine_device import DeviceMemory
from onecard.server.engine_gate import Gate
from onecard.server.engine_inputs import Requests
from onecard.server.engine_models import EngineModels, Serving
from onecard.server.engine_outbox import Outbox
from onecard.server.engine_refusals import failed, in_a_line, refused
from onecard.server.engine_replies import Replies
from onecard.server.engine_run import Run, run_all

_DESCRIPTORS = 2
_numbers = itertools.count(1)
_LOGGER = logging.getLogger(__name__)


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
