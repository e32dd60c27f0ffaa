"""Inference over gRPC, traced: a span from an RPC's beginning, or a stream's message, to its answer.

Names and attributes: OpenTelemetry's semantic conventions for RPC. Metadata beside the trace context are not told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from onecard.server.grpc_face import Caller
from onecard.server.grpc_messages import INFERENCE_SERVICE
from onecard.server.grpc_status import code_of
from onecard.server.traces import RequestTrace, Tracing

# As the conventions have it for servers: what a client did wrong is no error of the span.
_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


@contextlib.contextmanager
def traced_call(tracing: Tracing, method: str, caller: Caller, began: float) -> Iterator[RequestTrace | None]:
    """Trace a request that is read and answered inside, if it is to be.

    Args:
        tracing: decides.
        method: its short name.
        caller: whose metadata may hold a trace context.
        began: when it came, in seconds of ``time.monotonic``.
    """
    name = f"{INFERENCE_SERVICE}/{method}"
    attributes = {"rpc.system.name": "grpc", "rpc.method": name, "client.address": caller.address}
    trace = tracing.begin(name, caller.headers, began, attributes)
    code = "OK"
    try:
        yield trace
    except asyncio.CancelledError:
        code = "CANCELLED"
        raise
    except Exception as error:
        code = code_of(error)
        if trace is not None:
            trace.failed(error)
        raise
    finally:
        if trace is not None:
            trace.set("rpc.response.status_code", code)
            trace.end(code if code in _FAULTS else "")
