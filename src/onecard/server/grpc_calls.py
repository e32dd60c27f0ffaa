"""One RPC's life, whatever its method: who calls, its request within limits of time and memory, its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from onecard.errors import DeadlineError
from onecard.server.grpc_face import Caller, Inference, Right
from onecard.server.grpc_limits import GrpcLimits
from onecard.server.grpc_log import CANCELLED, OK, TOO_MANY, UNKNOWN_METHOD, RpcLog
from onecard.server.grpc_status import http_status_of, status_of
from onecard.server.http_types import HttpError
from onecard.server.oip_types import ProtocolError

if TYPE_CHECKING:
    from onecard.server.grpc_core import Rpc
    from onecard.server.traces import Tracing

Handler = Callable[["Rpc"], Awaitable[bytes | None]]
"""Answers an RPC: gives its only message, or None if it has sent its messages itself."""
Answer = Callable[[bytes, "Rpc", Caller], Awaitable[bytes]]
_SOON = ((b"Retry-After", b"1"),)
_SHORTEST_CHECK_S = 0.05


class Calls:
    """All RPCs of a server.

    Args:
        face: the server behind it.
        limits: what clients may ask.
        tracing: begins traces of inference; None for none.
        log: told of all RPCs; None for no access log.

    Attributes:
        handlers: by the methods' full names.
        draining: set when the server is going down.
        held_bytes: of all requests that are being answered.
    """

    def __init__(
        self, face: Inference, limits: GrpcLimits, tracing: Tracing | None = None, log: RpcLog | None = None
    ) -> None:
        self.face = face
        self.limits = limits
        self.tracing = tracing
        self.log = log
        self.handlers: dict[str, Handler] = {}
        self.draining = asyncio.Event()
        self.held_bytes = 0
        self._loop = asyncio.get_running_loop()

    def hold(self, nbytes: int) -> None:
        """Count a request's memory; whoever answers it takes that off ``held_bytes`` again.

        Raises:
            HttpError: 503, too much is held.
        """
        if self.held_bytes + nbytes > self.limits.max_held_bytes:
            raise HttpError(503, "too many large requests are being answered; come back later.", _SOON)
        self.held_bytes += nbytes

    def begin(self, rpc: Rpc, open_rpcs: int) -> None:
        """Answer an RPC.

        Args:
            rpc: has just come.
            open_rpcs: how many there are, with it.
        """
        if rpc.gone:
            return
        handler = self.handlers.get(rpc.method)
        if handler is None:
            rpc.end("UNIMPLEMENTED", f"there is no method {rpc.method[:200]}.")
            self._ended(rpc, UNKNOWN_METHOD)
        elif open_rpcs > self.limits.max_rpcs:
            rpc.end("RESOURCE_EXHAUSTED", f"{self.limits.max_rpcs} RPCs are open already; come back later.")
            self._ended(rpc, TOO_MANY)
        else:
            rpc.task = self._loop.create_task(self._run(rpc, handler))

    async def _run(self, rpc: Rpc, handler: Handler) -> None:
        status = CANCELLED
        try:
            message = await handler(rpc)
        except asyncio.CancelledError:
            rpc.end("CANCELLED", "the request was cancelled.")
        except Exception as error:
            status = http_status_of(error)
            rpc.end(*status_of(error, rpc.method))
        else:
            rpc.end("OK", message=message)
            status = OK
        finally:
            rpc.task = None  # nothing that it holds waits for the garbage collector
            self._ended(rpc, status)

    def _ended(self, rpc: Rpc, status: int) -> None:
        if self.log is not None:
            self.log.ended(rpc, status)

    def unary(self, right: Right, answer: Answer) -> Handler:
        """A handler of one request and one answer. The caller is looked at before the request is received.

        Args:
            right: what the caller must be allowed.
            answer: gives the answer's bytes for a request's bytes, the RPC and the caller.
        """

        async def handle(rpc: Rpc) -> bytes:
            caller = Caller(rpc)
            self.face.admit(right, caller)
            return await answer(await receive(rpc), rpc, caller)

        return handle

    def check(self, rpcs: Iterable[Rpc]) -> None:
        """End those whose request takes too long."""
        limit_s = self.limits.receive_timeout_s
        latest = time.monotonic() - limit_s
        for rpc in rpcs:
            if not rpc.received and rpc.began < latest:
                rpc.give_up_reading(DeadlineError(f"the request was not there after {limit_s:g} s.", "Send it faster."))

    @property
    def check_s(self) -> float:
        """How often :meth:`check` is to be called."""
        return max(self.limits.receive_timeout_s / 8, _SHORTEST_CHECK_S)


async def receive(rpc: Rpc) -> bytes:
    """The RPC's only request.

    Raises:
        DeadlineError: it took too long.
        ProtocolError: the client sent none.
    """
    data = await rpc.read()
    if data is None:
        raise ProtocolError("the RPC has no request.")
    return data
