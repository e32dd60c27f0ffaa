"""RPCs on the running event loop, straight from gRPC's core; one thread waits for what happens in it.

This is what grpcio's own servers are made of, without what they put between: both were slower in trials with large
inputs. The price is that ``grpc._cython.cygrpc`` is no public interface: it is used in this file alone, and as
``grpc/_server.py`` uses it (tried with grpcio 1.66, 1.74, 1.81 and 1.85).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from grpc._cython import cygrpc

_NO_FLAGS = 0
_NO_METADATA: tuple[tuple[str, str], ...] = ()
_CALL, _SHUTDOWN = object(), object()
_CLOSE, _MESSAGE, _SENT, _END = range(4)
_FOREVER_S = 1e9  # a deadline so far away is none


class Rpc:
    """One RPC. Everything but what begins with ``_on`` is called on the loop's thread.

    Args:
        core: its server.
        event: that told of it.

    Attributes:
        method: its full name, ``/SERVICE/METHOD``.
        task: that answers it.
        began: when it came, by ``time.monotonic``.
        received: whether its first message is there.
        gone: whether the client went away, or its deadline passed.
        over: whether its end was sent.
        bytes_in: of its requests so far.
        bytes_out: of its answers so far.
        model: the one that it is for, as its client says; empty if it is for none, or none yet.
        ids: of the request and of its trace, if it is traced.
    """

    __slots__ = (
        *("_call", "_core", "_deadline", "_due", "_metadata", "_reading", "_started", "_writing"),
        *("began", "bytes_in", "bytes_out", "gone", "ids", "method", "model", "over", "received", "task"),
    )

    def __init__(self, core: Core, event: Any) -> None:
        self._core = core
        self._call = event.call
        self._metadata = event.invocation_metadata
        self._deadline = event.call_details.deadline
        self._due = {_CLOSE}
        self._reading: asyncio.Future[bytes | None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._started = False  # whether the initial metadata were sent
        self.method: str = event.call_details.method.decode("utf-8", "replace")
        self.task: asyncio.Task[None] | None = None
        self.began = time.monotonic()
        self.received = self.gone = self.over = False
        self.bytes_in = self.bytes_out = 0
        self.model = ""
        self.ids: tuple[str, str] | None = None

    def peer(self) -> str:
        """The client's address in gRPC's notation."""
        return self._call.peer().decode()  # type: ignore[no-any-return]

    def metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """What the client sent before its first message."""
        return self._metadata  # type: ignore[no-any-return]

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; None without one."""
        deadline = self._deadline
        if deadline is None or math.isinf(deadline):
            return None
        remaining: float = deadline - time.time()
        return None if remaining > _FOREVER_S else max(remaining, 0.0)

    async def read(self) -> bytes | None:
        """The next message; None when there are no more."""
        self._reading = self._core.loop.create_future()
        self._start(_MESSAGE, (cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message)
        return await self._reading

    def give_up_reading(self, error: Exception) -> None:
        """Have :meth:`read` raise."""
        if self._reading is not None and not self._reading.done():
            self._reading.set_exception(error)

    async def write(self, message: bytes) -> None:
        """Send a message of a stream; returns when the next one may be sent."""
        self._writing = self._core.loop.create_future()
        operations = (*self._beginning(), cygrpc.SendMessageOperation(message, _NO_FLAGS))
        self._start(_SENT, operations, self._on_sent)
        self.bytes_out += len(message)
        await self._writing

    def end(
        self,
        code: str,
        details: str = "",
        trailing: tuple[tuple[str, str], ...] = _NO_METADATA,
        message: bytes | None = None,
    ) -> None:
        """End the RPC, with its only or its last message if it has one."""
        if self.over or self.gone:
            return
        self.over = True
        sent: tuple[Any, ...] = ()
        if message is not None:
            sent = (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
            self.bytes_out += len(message)
        status = cygrpc.SendStatusFromServerOperation(
            trailing, getattr(cygrpc.StatusCode, code.lower()), details.encode(), _NO_FLAGS
        )
        self._start(_END, (*self._beginning(), *sent, status), self._on_end)

    def _beginning(self) -> tuple[Any, ...]:
        if self._started:
            return ()
        self._started = True
        return (cygrpc.SendInitialMetadataOperation(_NO_METADATA, _NO_FLAGS),)

    def _start(self, what: int, operations: tuple[Any, ...], tag: Callable[[Any], None]) -> None:
        if self.gone:
            raise asyncio.CancelledError
        self._due.add(what)
        if not self._core.start(self._call, operations, tag):
            self._due.discard(what)
            raise asyncio.CancelledError

    def _on_close(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self.gone = True
            self._core.tell(self._cancel)
        self._done(_CLOSE)

    def _on_message(self, event: Any) -> None:
        if event.success:  # what could not be received ends the RPC, and the core says why
            self._core.tell(self._deliver, event.batch_operations[0].message())
        self._done(_MESSAGE)

    def _on_sent(self, _: Any) -> None:
        self._core.tell(self._deliver_sent)
        self._done(_SENT)

    def _on_end(self, _: Any) -> None:
        self._done(_END)

    def _done(self, what: int) -> None:
        self._due.discard(what)
        if not self._due and (self.over or self.gone):
            self._core.open.discard(self)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _deliver(self, message: bytes | None) -> None:
        self.received = True
        if message is not None:
            self.bytes_in += len(message)
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(message)

    def _deliver_sent(self) -> None:
        if self._writing is not None and not self._writing.done():
            self._writing.set_result(None)


class Core:
    """A server of gRPC's core.

    Args:
        begin: starts to answer an RPC; called on the loop's thread.
        options: channel arguments.
        loop: the running loop.

    Attributes:
        open: RPCs that have not ended.
    """

    def __init__(
        self, begin: Callable[[Rpc], None], options: Sequence[tuple[str, int]], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.loop = loop
        self.open: set[Rpc] = set()
        self._begin = begin
        self._told: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False
        self._lock = (
            threading.Lock()
        )  # no batch is begun once the queue is shut down, no call asked for with the server
        self._ending = self._down = False
        self._ended: asyncio.Future[None] = loop.create_future()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server([(name.encode(), value) for name, value in options], False)
        self._server.register_completion_queue(self._queue)
        self._thread = threading.Thread(target=self._poll, name="grpc", daemon=True)

    def listen(self, address: str, credentials: Any = None) -> int:
        """Bind an address in gRPC's notation; gives the port, 0 if it cannot be had."""
        if credentials is None:
            return int(self._server.add_http2_port(address.encode()))
        return int(self._server.add_http2_port(address.encode(), credentials._credentials))

    def start_serving(self) -> None:
        """Accept connections."""
        self._server.start()
        self._server.request_call(self._queue, self._queue, _CALL)
        self._thread.start()

    async def close(self, drain_s: float) -> None:
        """Take no more RPCs, wait for those that are open, and end.

        Args:
            drain_s: how long that may take; then RPCs are cancelled.
        """
        if self._ended.done():
            return
        if self._thread.ident is None:  # the core aborts the process for a listener that never was shut down
            self.start_serving()
        with self._lock:
            if not self._ending:
                self._ending = True
                self._server.shutdown(self._queue, _SHUTDOWN)
        _, late = await asyncio.wait((self._ended,), timeout=drain_s)
        if late:
            self._server.cancel_all_calls()
            await self._ended
        if self._thread.is_alive():
            self._thread.join()
            self._server.destroy()

    def start(self, call: Any, operations: tuple[Any, ...], tag: Callable[[Any], None]) -> bool:
        """Begin operations of an RPC, whose ``tag`` is called on the waiting thread; False if the server has ended."""
        with self._lock:
            if self._down:
                return False
            call.start_server_batch(operations, tag)
            return True

    def tell(self, what: Callable[..., None], *arguments: Any) -> None:
        """Have something called on the loop's thread; in order, with few wake-ups."""
        self._told.append((what, arguments))
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._listen)

    def _listen(self) -> None:
        self._woken = False
        told = self._told
        while told:
            what, arguments = told.popleft()
            what(*arguments)

    def _poll(self) -> None:
        asked, ended = True, False  # whether a call is asked of the core; whether the server ended
        while not ended or asked or self.open:
            event = self._queue.poll()
            tag = event.tag
            if tag is _CALL:
                asked = self._accept(event)
            elif tag is _SHUTDOWN:
                ended = True
            elif tag is not None:
                tag(event)
            del event, tag  # a call that is kept here keeps the server from ending
        with self._lock:
            self._down = True
        self._queue.shutdown()
        self.tell(self._set_ended)

    def _set_ended(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _accept(self, event: Any) -> bool:
        """Begin an RPC and ask for the next one; whether that was asked for."""
        with self._lock:
            again = not self._ending
            if again:
                self._server.request_call(self._queue, self._queue, _CALL)
        if event.success and event.call is not None:
            rpc = Rpc(self, event)
            self.open.add(rpc)
            event.call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), rpc._on_close)
            self.tell(self._begin, rpc)
        return again
