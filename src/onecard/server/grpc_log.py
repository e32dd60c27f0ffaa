"""RPCs in the access log, beside the requests of HTTP: with the statuses that the REST face has for the same."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from onecard.server.grpc_face import Caller
from onecard.server.logs import AccessLog, Entry, RequestIds

if TYPE_CHECKING:
    from onecard.server.grpc_core import Rpc

OK, UNKNOWN_METHOD, TOO_MANY, CANCELLED, TOO_LATE = 200, 404, 429, 499, 504
_MOST_CHARS = 128  # of what clients name, as names of models have
_LAST_MOMENT_S = 0.01  # the client's own clock may be over a moment before ours


class StreamRequest(NamedTuple):
    """One request of a stream that was answered.

    Args:
        began: when it came, by ``time.monotonic``.
        bytes_in: of it.
        bytes_out: of its answer.
        model: that it is for, as its client says.
        ids: of the request and of its trace, if it is traced.
    """

    began: float
    bytes_in: int
    bytes_out: int
    model: str
    ids: tuple[str, str] | None


class RpcLog:
    """Writes RPCs at their end, and requests of streams when they are answered.

    Args:
        log: says which are due.
    """

    def __init__(self, log: AccessLog) -> None:
        self._log = log
        self._request_ids = RequestIds()

    def ended(self, rpc: Rpc, status: int) -> None:
        """An RPC is over. A stream is written without a model: its requests had theirs.

        Args:
            rpc: the one.
            status: of HTTP; :data:`CANCELLED` also for one whose deadline passed.
        """
        if status == CANCELLED and _is_late(rpc):
            status = TOO_LATE
        if self._log.is_due(status):
            self._write(rpc, status, StreamRequest(rpc.began, rpc.bytes_in, rpc.bytes_out, rpc.model, rpc.ids))

    def answered(self, rpc: Rpc, status: int, request: StreamRequest) -> None:
        """A request of a stream was answered.

        Args:
            rpc: the stream.
            status: of HTTP.
            request: the one.
        """
        if self._log.is_due(status):
            self._write(rpc, status, request)

    def _write(self, rpc: Rpc, status: int, request: StreamRequest) -> None:
        caller = Caller(rpc)
        request_id, trace_id = request.ids or (self._request_ids(caller.headers), "")
        self._log.write(
            Entry(
                rpc.method.rpartition("/")[2][:_MOST_CHARS],
                rpc.method,
                status,
                request.bytes_in,
                request.bytes_out,
                (time.monotonic() - request.began) * 1e3,
                caller.address,
                request.model[:_MOST_CHARS],
                request_id,
                trace_id,
            )
        )


def _is_late(rpc: Rpc) -> bool:
    remaining_s = rpc.time_remaining()
    return remaining_s is not None and remaining_s <= _LAST_MOMENT_S
