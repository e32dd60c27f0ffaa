"""The routes of the Open Inference Protocol v2 over HTTP: which path means what, and what an inference request becomes.

Source: the KServe specification ``inference_rest.md`` and Triton's extensions for classification, binary tensors,
model configuration, statistics and scheduling.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import unquote

import numpy as np

from onecard import __version__
from onecard.errors import QueueFullError
from onecard.runtime.engine import Engine
from onecard.server.hosting import VERSION, Hosted, Hosting
from onecard.server.http_types import HttpError, Request, Response
from onecard.server.oip_contract import InferContract
from onecard.server.oip_metadata import (
    CODEC_EXTENSIONS,
    model_config,
    model_metadata,
    model_ready,
    model_statistics,
    server_live,
    server_metadata,
    server_ready,
)
from onecard.server.oip_repository import parse_index, repository_index
from onecard.server.oip_request import binary_lead, engine_inputs, parse_infer
from onecard.server.oip_response import encode_infer

EXTENSIONS = (*CODEC_EXTENSIONS, "model_configuration", "statistics")
DEFAULT_PRIORITY = 2
"""Of a request that names none: 1 goes before it, 3 and more behind."""
_SOON = ((b"Retry-After", b"1"),)
_JSON = ((b"Content-Type", b"application/json"),)
_LENGTH = b"inference-header-content-length"
_LENGTH_DIGITS = 10  # more than any body needs
_ALIGNMENT_BYTES = 64

Route = Callable[[Request, Hosted], "Response | Awaitable[Response]"]


class App:
    """Answers requests.

    Args:
        hosting: the models.

    Attributes:
        draining: the server is going down: not ready any more.
    """

    def __init__(self, hosting: Hosting) -> None:
        self.hosting = hosting
        self.draining = False
        self._server = {
            ("GET", ""): self._metadata,
            ("GET", "health/live"): self._live,
            ("GET", "health/ready"): self._ready,
            ("GET", "models/stats"): self._all_statistics,
            ("POST", "repository/index"): self._index,
        }
        self._model: dict[tuple[str, str], Route] = {
            ("GET", ""): self._model_metadata,
            ("GET", "ready"): self._model_ready,
            ("GET", "config"): self._model_config,
            ("GET", "stats"): self._model_statistics,
            ("POST", "infer"): self._infer,
        }

    def __call__(self, request: Request) -> Response | Awaitable[Response]:
        """Answer one request.

        Raises:
            HttpError: no such path, or not with this method.
            OnecardError: what the request asked for could not be done; it has an HTTP status.
        """
        parts = request.path.strip("/").split("/")
        if parts[0] != "v2":
            raise HttpError(404, f"there is nothing at {request.path[:200]}: the protocol begins with /v2.")
        rest = "/".join(parts[1:])
        method = "GET" if request.method == "HEAD" else request.method
        if (method, rest) in self._server:
            return self._server[method, rest](request)
        if len(parts) > 2 and parts[1] == "models":  # noqa: PLR2004 - v2/models/NAME
            name, version, action = _model_path(parts[2:])
            route = self._model.get((method, action))
            if route is not None:
                return route(request, self.hosting.find(name, version))
            _refuse_method(self._model, action, request)
        _refuse_method(self._server, rest, request)
        raise HttpError(404, f"there is nothing at {request.path[:200]}.")

    def _metadata(self, request: Request) -> Response:
        return _json(server_metadata(__version__, EXTENSIONS))

    def _live(self, request: Request) -> Response:
        return _json(server_live(True))

    def _ready(self, request: Request) -> Response:
        ready = self.hosting.is_ready and not self.draining
        return _json(server_ready(ready), 200 if ready else 503)

    def _index(self, request: Request) -> Response:
        only_ready = parse_index(request.body)
        return _json(repository_index([model.entry for model in self.hosting.models], only_ready))

    def _all_statistics(self, request: Request) -> Response:
        return _json(model_statistics([m.counters.read(m.name, VERSION) for m in self.hosting.models]))

    def _model_metadata(self, request: Request, model: Hosted) -> Response:
        return _json(model_metadata(model.name, [VERSION], _opened(model)[0].spec))

    def _model_ready(self, request: Request, model: Hosted) -> Response:
        ready = model.is_ready and not self.draining
        return _json(model_ready(model.name, ready), 200 if ready else 503)

    def _model_config(self, request: Request, model: Hosted) -> Response:
        return _json(model_config(model.name, _opened(model)[0].spec, priorities=DEFAULT_PRIORITY + 1))

    def _model_statistics(self, request: Request, model: Hosted) -> Response:
        return _json(model_statistics([model.counters.read(model.name, VERSION)]))

    async def _infer(self, request: Request, model: Hosted) -> Response:
        began = time.monotonic()
        model.counters.came()
        try:
            response = await self._answer(request, model)
        except BaseException:
            model.counters.ended(time.monotonic() - began, ok=False)
            raise
        model.counters.ended(time.monotonic() - began, ok=True)
        return response

    async def _answer(self, request: Request, model: Hosted) -> Response:
        engine, contract = _opened(model)
        asked = parse_infer(request.body, _json_length(request), contract)
        try:
            answers = await engine.infer_async(
                engine_inputs(asked),
                timeout_s=asked.timeout_us / 1e6 if asked.timeout_us else None,
                priority=asked.priority or DEFAULT_PRIORITY,
                client=request.client,
            )
        except QueueFullError as error:
            retry = str(max(1, math.ceil(error.retry_after_s))).encode()
            raise HttpError(error.http_status, str(error), [(b"Retry-After", retry)]) from error
        encoded = encode_infer(asked, answers, contract, (model.name, VERSION))
        headers = [(b"Content-Type", encoded.content_type)]
        if encoded.json_length is not None:
            headers.append((b"Inference-Header-Content-Length", str(encoded.json_length).encode()))
        return Response(200, headers, encoded.body)


class BodyMemory:
    """Gives the memory that bodies are received into, and no more of it at once than is allowed.

    A body lies so that its first binary tensor is aligned, and need not be copied. Its memory counts until nothing
    refers to it any more.

    Args:
        limit_bytes: of all bodies together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # the last reference may be an engine's thread's
        self.used_bytes = 0

    def __call__(self, request: Request, length: int) -> memoryview:
        """Memory for one body.

        Args:
            request: its head is known, its body is not.
            length: of the body, in bytes.

        Raises:
            HttpError: 503, too much is held.
        """
        with self._lock:
            if self.used_bytes + length > self._limit_bytes:
                raise HttpError(503, "too many large requests are being received; come back later.", _SOON)
            self.used_bytes += length
        value = request.headers.get(_LENGTH, b"")
        json_length = int(value) if value.isdigit() and len(value) <= _LENGTH_DIGITS else 0
        memory = np.empty(length + 2 * _ALIGNMENT_BYTES, np.uint8)
        weakref.finalize(memory, self._release, length)
        start = -memory.ctypes.data % _ALIGNMENT_BYTES + binary_lead(json_length, _ALIGNMENT_BYTES)
        return memory.data[start : start + length]

    def _release(self, length: int) -> None:
        with self._lock:
            self.used_bytes -= length


def _model_path(parts: list[str]) -> tuple[str, str, str]:
    """Name, version (or empty) and action of ``NAME[/versions/VERSION][/ACTION]``."""
    name, rest = unquote(parts[0]), parts[1:]
    version = ""
    if len(rest) > 1 and rest[0] == "versions":
        version, rest = unquote(rest[1]), rest[2:]
    return name, version, "/".join(rest)


def _opened(model: Hosted) -> tuple[Engine, InferContract]:
    if model.engine is None or model.contract is None:
        raise HttpError(503, f"model '{model.name}' is not ready: {model.state.lower()}.", _SOON)
    return model.engine, model.contract


def _json_length(request: Request) -> int | None:
    value = request.headers.get(_LENGTH)
    if value is None:
        return None
    if not value.isdigit() or len(value) > _LENGTH_DIGITS:
        raise HttpError(400, "Inference-Header-Content-Length is not a number of bytes.")
    return int(value)


def _refuse_method(routes: Iterable[tuple[str, str]], place: str, request: Request) -> None:
    """405 where the path exists under another method."""
    allowed = sorted(method for method, path in routes if path == place)
    if allowed:
        head = ["HEAD"] if "GET" in allowed else []
        raise HttpError(
            405,
            f"{request.method} does not go with {request.path[:200]}: expected {' or '.join(allowed)}.",
            [(b"Allow", ", ".join([*allowed, *head]).encode())],
        )


def _json(body: bytes, status: int = 200) -> Response:
    return Response(status, _JSON, [body])
