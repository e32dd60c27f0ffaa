"""Inference over HTTP, traced: a span from a request's head to the last byte of its answer.

Names and attributes: OpenTelemetry's semantic conventions for HTTP servers. What may hold secrets is not told: query,
header fields, bodies.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from urllib.parse import unquote

from onecard.server.http_types import Handler, HttpService, Request, Response
from onecard.server.traces import Attributes, RequestTrace, Tracing

_INFER = re.compile(r"/*v2/models/([^/]+)(/versions/[^/]+)?/infer/*")
_FIRST_SERVER_ERROR = 500
_MOST_CHARS = 512  # of what a client sent

OnAnswer = Callable[[Request, Response, int], None]


def traced_service(service: HttpService, tracing: Tracing) -> HttpService:
    """The same service, with requests for inference traced that are to be."""
    return replace(service, handler=_traced(service.handler, tracing), on_answer=_told(service.on_answer))


def _traced(handler: Handler, tracing: Tracing) -> Handler:

    def handle(request: Request) -> Response | Awaitable[Response]:
        trace = _begin(request, tracing)
        if trace is None:
            return handler(request)
        request.trace = trace
        request.on_gone(lambda: trace.end("client_gone"))
        try:
            answer = handler(request)
        except Exception as error:
            trace.failed(error)
            raise
        if not isinstance(answer, Response):
            trace.asked(answer)
        return answer

    return handle


def _told(on_answer: OnAnswer | None) -> OnAnswer:
    def tell(request: Request, response: Response, length: int) -> None:
        if on_answer is not None:
            on_answer(request, response, length)
        if request.trace is not None:
            _end_when_sent(request.trace, response, length)

    return tell


def _begin(request: Request, tracing: Tracing) -> RequestTrace | None:
    found = _INFER.fullmatch(request.path) if request.method == "POST" else None
    if found is None:
        return None
    version = "/versions/{version}" if found[2] else ""
    route = f"/v2/models/{{model}}{version}/infer"
    trace = tracing.begin(f"POST {route}", request.headers, request.began, {"http.request.method": "POST"})
    if trace is not None:
        for name, value in _attributes(request, route, unquote(found[1])).items():
            trace.set(name, value)
    return trace


def _attributes(request: Request, route: str, model: str) -> Attributes:
    agent = request.headers.get(b"user-agent", b"").decode("latin-1")
    return {
        "http.route": route,
        "http.request.body.size": len(request.body),
        "url.path": request.path[:_MOST_CHARS],
        "url.scheme": "https" if request.tls else "http",
        "network.protocol.version": request.version,
        "client.address": request.client,
        "onecard.model": model[:_MOST_CHARS],
        **({"user_agent.original": agent[:_MOST_CHARS]} if agent else {}),
    }


def _end_when_sent(trace: RequestTrace, response: Response, length: int) -> None:
    trace.set("http.response.status_code", response.status)
    trace.set("http.response.body.size", length)
    fault = str(response.status) if response.status >= _FIRST_SERVER_ERROR else ""
    release = response.on_sent

    def sent() -> None:
        try:
            if release is not None:
                release()
        finally:
            trace.end(fault)

    response.on_sent = sent
