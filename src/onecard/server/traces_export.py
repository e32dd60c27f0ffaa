"""From spans to a collector: OpenTelemetry's SDK, its batches on a thread of their own, OTLP over HTTP.

The variables ``OTEL_*`` that the SDK and its exporter read count, but for the endpoint and the sampler, which are
options of the server.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from onecard import __version__
from onecard.errors import MissingDependencyError, UsageError
from onecard.server.http_types import LOGGER
from onecard.server.traces import TraceOptions, Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_CURE = "pip install 'onecard[trace]'"
_PATH = "/v1/traces"
_LOOK_S = 0.02


class TraceExport:
    """Sends traces to a collector. One that is away neither slows nor stops whatever is traced.

    Args:
        options: where to, and which.

    Attributes:
        tracing: begins traces.

    Raises:
        UsageError: an endpoint or a sample that cannot be.
        MissingDependencyError: OpenTelemetry is not installed.
    """

    def __init__(self, options: TraceOptions) -> None:
        if not 0 <= options.sample <= 1:
            raise UsageError(f"--trace-sample is {options.sample}: expected a part of all requests, 0 to 1.")
        endpoint = traces_url(options.endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace import TracerProvider, sampling
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingDependencyError(f"Traces need OpenTelemetry: there is no {error.name}.", _CURE) from error
        last_word = _LastWord()
        try:
            self._exporter = WatchedExporter(OTLPSpanExporter(endpoint), endpoint, last_word)
            processor = BatchSpanProcessor(cast("SpanExporter", self._exporter))
        except ValueError as error:
            raise UsageError(f"Traces cannot be sent: {error}.", "Look at the variables OTEL_*.") from error
        self._provider = TracerProvider(sampling.ALWAYS_ON, _resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self.tracing = Tracing(self._provider.get_tracer("onecard", __version__), options.sample)

    async def close(self, limit_s: float) -> None:
        """Send what is left, and end.

        Args:
            limit_s: for how long; what is not sent then is lost.
        """
        loop = asyncio.get_running_loop()
        ending = threading.Thread(target=self._provider.shutdown, name="onecard-traces-end", daemon=True)
        ending.start()
        end = loop.time() + limit_s
        while ending.is_alive() and loop.time() < end:
            await asyncio.sleep(_LOOK_S)
        if ending.is_alive():
            self._exporter.shutdown()  # it is waiting to try again
            LOGGER.warning("the last traces could not be delivered within %g s", limit_s)


class WatchedExporter:
    """Another exporter, of which the log says once that it fails, and once that it does no more.

    Args:
        exporter: the other one.
        endpoint: for the log.
        last_word: what that one says in a log of its own.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str, last_word: _LastWord) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._last_word = last_word
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._last_word.text = ""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # some releases let it through that nobody listens
            self._lose(len(spans), str(error))
            raise
        if result.name != "SUCCESS":
            self._lose(len(spans), "no reason was given")
        elif self._lost:
            LOGGER.info("traces are delivered to %s again; %d spans or more are lost", self._endpoint, self._lost)
            self._lost = 0
        return result

    def _lose(self, spans: int, why: str) -> None:
        if not self._lost:
            why = self._last_word.text or why
            LOGGER.warning("traces cannot be delivered to %s, and are dropped until they can: %s", self._endpoint, why)
        self._lost += spans

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastWord(logging.Handler):
    """Takes OpenTelemetry's own log, which would have a line for each batch that fails, and keeps what it said first.

    Attributes:
        text: set back to empty by whoever wants the next one.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # clients' headers can make it speak, too
        exporters = logging.getLogger("opentelemetry.exporter")
        exporters.setLevel(logging.WARNING)
        exporters.propagate = False
        exporters.handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


def traces_url(endpoint: str) -> str:
    """Where traces are posted to.

    Raises:
        UsageError: the endpoint is no URL of HTTP.
    """
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"--trace-endpoint '{endpoint}' cannot be used: expected a URL such as http://127.0.0.1:4318.",
            "It is a collector's endpoint for OTLP over HTTP, usually on port 4318.",
        )
    return parts._replace(path=_PATH).geturl() if parts.path in ("", "/") else endpoint


def _resource() -> Resource:
    """Who speaks: what ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` say goes first."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own: dict[str, Any] = {
        "service.name": "onecard",
        "service.version": __version__,
        "service.instance.id": secrets.token_hex(8),
    }
    return Resource.create(own).merge(OTELResourceDetector().detect())
