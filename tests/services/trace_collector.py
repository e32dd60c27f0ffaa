"""A small collector of traces for tests: it takes OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Span(NamedTuple):
    """A span as it came; ids in hexadecimal digits, times in nanoseconds since 1970."""

    name: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    attributes: dict[str, Any]
    status: int
    message: str
    service: str


class Collector:
    """Listens on the loopback from its making to :meth:`close`.

    Args:
        port: 0 for one that is free.
        status: of its answers.
    """

    def __init__(self, port: int = 0, status: int = 200) -> None:
        self.spans: list[Span] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.paths.add(self.path)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
                self.send_response(status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def wait(self, found: Callable[[list[Span]], bool], limit_s: float = 60.0) -> list[Span]:
        """The spans, once they are what is waited for."""
        end = time.monotonic() + limit_s
        while not found(self.spans):
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.02)
        return list(self.spans)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


def _spans(request: ExportTraceServiceRequest) -> list[Span]:
    found = []
    for told in request.resource_spans:
        service = _values(told.resource.attributes)["service.name"]
        for span in (span for scope in told.scope_spans for span in scope.spans):
            ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
            times = (span.start_time_unix_nano, span.end_time_unix_nano)
            status = (span.status.code, span.status.message)
            found.append(Span(span.name, *ids, *times, _values(span.attributes), *status, service))
    return found


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
