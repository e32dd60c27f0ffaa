"""Traces of requests: which requests are traced, and the spans that one becomes.

The words are OpenTelemetry's; a client's trace context comes as the W3C recommendation "Trace Context" has it. Nothing
of OpenTelemetry is imported before a server is told to trace.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from onecard.errors import OnecardError
from onecard.server.engine_request import EngineRequest
from onecard.server.logs import RequestIds

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

    from onecard.ipc.messages import Stages
    from onecard.server.engine_answers import EngineAnswer

Attributes: TypeAlias = "Mapping[str, str | int]"
_ID_BITS = 64  # of a trace's id that sampling by ratio looks at, as OpenTelemetry does
_UNSAMPLED = re.compile(rb"00-[0-9a-f]{16}([0-9a-f]{16})-[0-9a-f]{16}-[0-9a-f][02468ace]")


@dataclass(frozen=True)
class TraceOptions:
    """Which requests are traced, and who is told.

    Args:
        endpoint: of a collector, OTLP over HTTP. Without a path ``/v1/traces`` is meant.
        sample: part of the requests without a sampled parent that is traced, from 0 to 1.
    """

    endpoint: str
    sample: float


class Tracing:
    """Decides which requests are traced, and begins their traces.

    Args:
        tracer: makes the spans; its sampler must take all of them.
        sample: as in :class:`TraceOptions`.
    """

    def __init__(self, tracer: Tracer, sample: float) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._sample = sample
        self._bound = round(sample * (1 << _ID_BITS))
        self._extract = TraceContextTextMapPropagator().extract
        self._request_ids = RequestIds()

    def begin(
        self, name: str, headers: Mapping[bytes, bytes], began: float, attributes: Attributes
    ) -> RequestTrace | None:
        """Begin the trace of a request, which is to be read next.

        Args:
            name: of its span.
            headers: its header fields, names in lower case. A trace context that breaks the rules counts as none.
            began: when it came, in seconds of ``time.monotonic``.
            attributes: of its span.

        Returns:
            None if it is not traced.
        """
        parent = None
        given = headers.get(b"traceparent")
        if given is None:
            if random.random() >= self._sample:
                return None
        else:
            if (plain := _UNSAMPLED.fullmatch(given)) is not None and int(plain[1], 16) >= self._bound:
                return None  # most requests by far, where a caller has a trace context for each
            parent = self._parent(given, headers.get(b"tracestate", b""))
            if not self._takes(parent):
                return None
        return self._start(name, parent, headers, began, attributes)

    def _start(
        self,
        name: str,
        parent: Context | None,
        headers: Mapping[bytes, bytes],
        began: float,
        attributes: Attributes,
    ) -> RequestTrace | None:
        from opentelemetry.trace import SpanKind

        wall_ns = time.time_ns() - time.monotonic_ns()
        request_id = self._request_ids(headers)
        span = self._tracer.start_span(
            name,
            parent,
            SpanKind.SERVER,
            {**attributes, "onecard.request.id": request_id},
            start_time=wall_ns + int(began * 1e9),
        )
        if not span.is_recording():  # the SDK is switched off
            return None
        return RequestTrace(self._tracer, span, wall_ns, request_id)

    def _parent(self, given: bytes, state: bytes) -> Context:
        carrier = {"traceparent": given.decode("latin-1"), "tracestate": state.decode("latin-1")}
        return self._extract(carrier)

    def _takes(self, parent: Context) -> bool:
        """Whether a request with this trace context is traced; all spans of one trace are, or none."""
        from opentelemetry.trace import get_current_span

        found = get_current_span(parent).get_span_context()
        if not found.is_valid:
            return random.random() < self._sample
        return found.trace_flags.sampled or found.trace_id & ((1 << _ID_BITS) - 1) < self._bound


class RequestTrace:
    """The trace of one request: its span, and moments of which the spans in it are made when it is over.

    Args:
        tracer: makes the spans.
        span: of the request.
        wall_ns: what to add to ``time.monotonic_ns`` for the time of day.
        request_id: of the request.

    Attributes:
        trace_id: in hexadecimal digits.
    """

    __slots__ = ("_asked", "_engine", "_error", "_heard", "_over", "_read_from", "_span", "_tracer", "_wall_ns",
                 "request_id", "trace_id")  # fmt: skip

    def __init__(self, tracer: Tracer, span: Span, wall_ns: int, request_id: str) -> None:
        self._tracer = tracer
        self._span = span
        self._wall_ns = wall_ns
        self._read_from = time.monotonic()
        self._asked = self._heard = 0.0  # when the engine was asked, and when its answer was there
        self._engine: tuple[Stages, int] | None = None  # and the rows of the batch
        self._error: BaseException | None = None
        self._over = False
        self.request_id = request_id
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def set(self, name: str, value: str | int) -> None:
        """Set an attribute of the request's span."""
        self._span.set_attribute(name, value)

    def asked(self, answer: Awaitable[Any]) -> None:
        """The request was read, and the engine is asked for this answer."""
        self._asked = time.monotonic()
        if isinstance(answer, EngineRequest):
            answer.trace = self  # before it is sent, which is done in the loop's next round
            answer.add_done_callback(self._done)
            self.set("onecard.model", answer.model)
            self.set("onecard.priority", answer.priority)

    def answered(self, answer: EngineAnswer) -> None:
        """The engine's answer is there."""
        self._heard = time.monotonic()
        self.set("onecard.version", answer.version)
        self.set("onecard.batch.rows", answer.rows)
        if answer.stages is not None:
            self._engine = answer.stages, answer.rows

    def failed(self, error: BaseException) -> None:
        """There is no answer."""
        self._error = error

    def end(self, fault: str = "") -> None:
        """The answer is sent, or nobody waits for it; only the first call counts.

        Args:
            fault: what failed through no fault of the request, in a word; empty if nothing did.
        """
        if self._over:
            return
        self._over = True
        now = time.monotonic()
        self._make_spans(now)
        if fault:
            from opentelemetry.trace import StatusCode

            error = self._error
            self._span.set_attribute("error.type", fault if error is None else type(error).__name__)
            # Others' errors may speak of what clients sent; the log has them.
            self._span.set_status(StatusCode.ERROR, str(error) if isinstance(error, OnecardError) else fault)
        self._span.end(self._ns(now))

    def _done(self, answer: asyncio.Future[Any]) -> None:
        if self._over or answer.cancelled():
            return
        if (error := answer.exception()) is not None:
            self.failed(error)
        if isinstance(answer, EngineRequest) and answer.deaths:
            self.set("onecard.engine.deaths", answer.deaths)

    def _make_spans(self, now: float) -> None:
        """The spans inside the request's."""
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(self._span)
        self._make(inside, "parse", self._read_from, self._asked or now)
        if self._engine is not None:
            stages, rows = self._engine
            self._make(inside, "queue", self._asked, stages.began)
            computed = stages.ended - stages.copy_out_s
            self._make(inside, "copy-in", stages.launched, min(stages.launched + stages.copy_in_s, computed))
            self._make(inside, "compute", max(stages.launched, computed - stages.compute_s), computed, rows)
            self._make(inside, "copy-out", computed, stages.ended)
        if self._heard:
            self._make(inside, "reply", self._heard, now)

    def _make(self, inside: Context, name: str, began: float, ended: float, rows: int = 0) -> None:
        attributes = {"onecard.batch.rows": rows} if rows else None
        span = self._tracer.start_span(name, inside, attributes=attributes, start_time=self._ns(began))
        span.end(self._ns(max(began, ended)))

    def _ns(self, moment: float) -> int:
        return self._wall_ns + int(moment * 1e9)
