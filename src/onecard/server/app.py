"""The routes of the Open Inference Protocol v2 over HTTP: which path means what, and what an inference request becomes.

Source: the KServe specification ``inference_rest.md`` and Triton's extensions for classification, binary tensors,
model configuration, model repository, scheduling and statistics.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import unquote

from onecard import __version__
from onecard.server.access import Access, Kind
from onecard.server.engine_client import EngineClient
from onecard.server.engine_request import EngineRequest
from onecard.server.http_infer import LENGTH, LENGTH_DIGITS, ask
from onecard.server.http_types import BodyAllocator, HttpError, Request, Response
from onecard.server.logs import AccessLog, Entry, RequestIds
from onecard.server.oip_metadata import (
    CODEC_EXTENSIONS,
    model_config,
    model_metadata,
    model_ready,
    server_live,
    server_metadata,
    server_ready,
)
from onecard.server.oip_repository import check_change, parse_index, repository_index
from onecard.server.oip_request import binary_lead
from onecard.server.oip_seen import DEFAULT_PRIORITY
from onecard.server.oip_shared_memory import Answer, find_place, shared_memory_routes
from onecard.server.request_figures import reason_of
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions
from onecard.server.watching import WatchingPages

EXTENSIONS = (*CODEC_EXTENSIONS, "model_configuration", "model_repository", "statistics")
_JSON = ((b"Content-Type", b"application/json"),)
_ALIGNMENT_BYTES = 64
_NOT_FOUND = 404
_MOST_BODY_BYTES = 1 << 20  # of what is no inference
_MOST_OPEN_BODY_BYTES = 4 << 10  # of what needs no right: none is read, and all such connections may send one
_SMALL_BODY_BYTES = 4 << 10
_MOST_PATHS = 256
_MOST_PATH_CHARS = 256

Route = Callable[[Request, str, str], "Response | Awaitable[Response]"]
_AnyRoute = TypeVar("_AnyRoute")


class _Asked(NamedTuple):
    """What a request asks for.

    Args:
        kind: the right that it needs.
        answer: answers it, once its body is there.
        most_body_bytes: that it may have; None for as many as the server takes.
    """

    kind: Kind
    answer: Callable[[], Response | Awaitable[Response]]
    most_body_bytes: int | None = _MOST_BODY_BYTES


class App:
    """Answers requests.

    Args:
        serving: the models.
        access: who may do what.
        regions: shared memory that clients may register.
        pages: for whoever watches the server, if there are any.
    """

    def __init__(
        self, serving: Serving, access: Access, regions: SharedRegions, pages: WatchingPages | None = None
    ) -> None:
        self.serving = serving
        self._pages = pages
        self._access = access
        self._regions = regions
        self._shared_memory = shared_memory_routes(regions)
        self._extensions = (*EXTENSIONS, *regions.extensions)
        self._server: dict[tuple[str, str], Callable[[Request], Response | Awaitable[Response]]] = {
            ("GET", ""): self._metadata,
            ("GET", "health/live"): self._live,
            ("GET", "health/ready"): self._ready,
            ("GET", "models/stats"): self._all_statistics,
            ("POST", "repository/index"): self._index,
        }
        self._model: dict[tuple[str, str], Route] = {
            ("POST", "infer"): self._first_infer,
            ("GET", ""): self._model_metadata,
            ("GET", "ready"): self._model_ready,
            ("GET", "config"): self._model_config,
            ("GET", "stats"): self._model_statistics,
        }
        self._repository: dict[tuple[str, str], Route] = {
            ("POST", "load"): self._load,
            ("POST", "unload"): self._unload,
        }
        self._infer_paths: dict[str, tuple[str, str]] = {}  # model and version, where requests were taken before

    def __call__(self, request: Request) -> Response | Awaitable[Response]:
        """Answer one request.

        Raises:
            HttpError: no such path, not with this method, or not for this client.
            OnecardError: what the request asked for could not be done; it has an HTTP status.
        """
        found = self._infer_paths.get(request.path)
        if found is not None and request.method == "POST":
            if not request.admitted:
                self._check("infer", request)
            return self._infer(request, *found)
        asked = self._find(request)
        if not request.admitted:
            self._check(asked.kind, request)
        return asked.answer()

    def admit(self, request: Request) -> None:
        """Refuse a request with a body for which there shall not be memory; then :meth:`__call__` need not check it.

        Raises:
            HttpError: no such path, not with this method, or not for this client.
        """
        if request.method == "POST" and request.path in self._infer_paths:
            self._check("infer", request)
        else:
            asked = self._find(request)
            self._check(asked.kind, request)
            request.most_body_bytes = asked.most_body_bytes
        request.admitted = True

    def _find(self, request: Request) -> _Asked:
        """What a request asks for.

        Raises:
            HttpError: no such path, or not with this method.
        """
        parts = request.path.strip("/").split("/")
        if parts[0] != "v2" or parts[1:2] == ["onecard"]:
            return self._find_page(request)
        method = "GET" if request.method == "HEAD" else request.method
        if len(parts) > 2 and parts[1] == "models" and parts[2:] != ["stats"]:  # noqa: PLR2004 - v2/models/NAME
            name, version, action = _model_path(parts[2:])
            route = _route(self._model, method, action, request)
            kind: Kind = "health" if action == "ready" else "infer"
            return _Asked(
                kind, partial(route, request, name, version), None if action == "infer" else _most_bytes(kind)
            )
        if len(parts) == 5 and parts[1:3] == ["repository", "models"]:  # noqa: PLR2004 - v2/repository/models/NAME/ACTION
            route = _route(self._repository, method, parts[4], request)
            return _Asked("control", partial(route, request, unquote(parts[3]), ""))
        place = find_place(parts[1:])
        if place is not None:
            change = _route(self._shared_memory, method, place.route, request)
            return _Asked("control", lambda: _answered(change(place.name, request.body)))
        rest = "/".join(parts[1:])
        answer = _route(self._server, method, rest, request)
        kind = "health" if parts[1:2] == ["health"] else "infer"
        return _Asked(kind, partial(answer, request), _most_bytes(kind))

    def _find_page(self, request: Request) -> _Asked:
        """What is not of the protocol: the pages for whoever watches the server."""
        if self._pages is not None:
            found = self._pages.open_page(request)
            if found is not None:
                return _Asked("health", lambda: found, _most_bytes("health"))
            page = self._pages.find(request)
            if page is not None:
                return _Asked("infer", page)
        raise HttpError(404, f"there is nothing at {request.path[:200]}: the protocol begins with /v2.")

    def _check(self, kind: Kind, request: Request) -> None:
        self._access.check(kind, request.headers, request.client, request.client == "unix")

    def _tell_little(self, error: HttpError, request: Request) -> None:
        """Refuse without naming models, versions and reasons to those who may not ask for them."""
        try:
            self._check("infer", request)
        except HttpError:
            said = "there is no such model." if error.status == _NOT_FOUND else "the model is not ready."
            raise HttpError(error.status, said, error.headers) from None

    def _metadata(self, request: Request) -> Response:
        return _json(server_metadata(__version__, self._extensions))

    def _live(self, request: Request) -> Response:
        return _json(server_live(True))

    def _ready(self, request: Request) -> Response:
        ready = self.serving.is_ready
        return _json(server_ready(ready), 200 if ready else 503)

    def _index(self, request: Request) -> Response:
        only_ready = parse_index(request.body)
        return _json(repository_index(self.serving.index(), only_ready))

    async def _all_statistics(self, request: Request) -> Response:
        return _json(await self.serving.statistics())

    def _model_metadata(self, request: Request, name: str, version: str) -> Response:
        model, contract = self.serving.find(name, version)
        return _json(model_metadata(name, [model.version], contract.spec, contract.also))

    def _model_ready(self, request: Request, name: str, version: str) -> Response:
        try:
            self.serving.find(name, version)
        except HttpError as error:
            self._tell_little(error, request)
            raise
        ready = self.serving.is_model_ready(name)
        return _json(model_ready(name, ready), 200 if ready else 503)

    def _model_config(self, request: Request, name: str, version: str) -> Response:
        _, contract = self.serving.find(name, version)
        return _json(model_config(name, contract.spec, DEFAULT_PRIORITY + 1, contract.also))

    async def _model_statistics(self, request: Request, name: str, version: str) -> Response:
        self.serving.find(name, version)
        return _json(await self.serving.statistics(name))

    async def _load(self, request: Request, name: str, version: str) -> Response:
        check_change(request.body)
        await self.serving.load(name)
        return _json(b"{}")

    async def _unload(self, request: Request, name: str, version: str) -> Response:
        check_change(request.body)
        await self.serving.unload(name)
        return _json(b"{}")

    def _first_infer(self, request: Request, name: str, version: str) -> EngineRequest:
        """As :meth:`_infer`, and remember what the path means, as the request was good and there is such a model."""
        sent = self._infer(request, name, version)
        if len(request.path) <= _MOST_PATH_CHARS:
            if len(self._infer_paths) >= _MOST_PATHS:
                self._infer_paths.clear()
            self._infer_paths[request.path] = name, version
        return sent

    def _infer(self, request: Request, name: str, version: str) -> EngineRequest:
        try:
            return ask(self.serving, self._regions, request, name, version)
        except Exception as error:
            self.serving.refuse(name, error)
            raise


def body_memory(client: EngineClient) -> BodyAllocator:
    """Gives the memory that bodies are received into: the engine's, so that a tensor in one need not be copied.

    A body lies so that its first binary tensor is aligned. One that is small and has none is no matter for the engine.
    """

    def allocate(request: Request, length: int) -> memoryview:
        value = request.headers.get(LENGTH, b"")
        if not value and length <= _SMALL_BODY_BYTES:
            return memoryview(bytearray(length))
        json_length = int(value) if value.isdigit() and len(value) <= LENGTH_DIGITS else 0
        try:
            return client.allocate(length, binary_lead(json_length, _ALIGNMENT_BYTES))
        except HttpError as error:
            name = _model_of(request)
            if name in client.models:
                client.figures(name).failures[reason_of(error)] += 1
            raise

    return allocate


def access_logger(log: AccessLog) -> Callable[[Request, Response, int], None]:
    """Writes the access log from what the front tells of each answer."""
    request_ids = RequestIds()

    def write(request: Request, response: Response, length: int) -> None:
        if not log.is_due(response.status):
            return
        trace = request.trace
        log.write(
            Entry(
                request.method,
                request.path,
                response.status,
                len(request.body),
                length,
                (time.monotonic() - request.began) * 1e3,
                request.client,
                _model_of(request),
                request_ids(request.headers) if trace is None else trace.request_id,
                "" if trace is None else trace.trace_id,
            )
        )

    return write


def _model_of(request: Request) -> str:
    """The name in a path, or nothing."""
    parts = request.path.split("/", 4)
    return unquote(parts[3]) if parts[1:3] == ["v2", "models"] and len(parts) > 3 else ""  # noqa: PLR2004 - /v2/models/NAME


def _model_path(parts: list[str]) -> tuple[str, str, str]:
    """Name, version (or empty) and action of ``NAME[/versions/VERSION][/ACTION]``."""
    name, rest = unquote(parts[0]), parts[1:]
    version = ""
    if len(rest) > 1 and rest[0] == "versions":
        version, rest = unquote(rest[1]), rest[2:]
    return name, version, "/".join(rest)


def _most_bytes(kind: Kind) -> int:
    return _MOST_OPEN_BODY_BYTES if kind == "health" else _MOST_BODY_BYTES


def _route(routes: Mapping[tuple[str, str], _AnyRoute], method: str, place: str, request: Request) -> _AnyRoute:
    """What answers at a place by this method; 405 where another one would, 404 where none does."""
    route = routes.get((method, place))
    if route is not None:
        return route
    allowed = sorted(method for method, path in routes if path == place)
    if allowed:
        head = ["HEAD"] if "GET" in allowed else []
        raise HttpError(
            405,
            f"{request.method} does not go with {request.path[:200]}: expected {' or '.join(allowed)}.",
            [(b"Allow", ", ".join([*allowed, *head]).encode())],
        )
    raise HttpError(404, f"there is nothing at {request.path[:200]}.")


def _answered(answer: Answer) -> Response | Awaitable[Response]:
    return _json(answer) if isinstance(answer, bytes) else _awaited(answer)


async def _awaited(answer: Awaitable[bytes]) -> Response:
    return _json(await answer)


def _json(body: bytes, status: int = 200) -> Response:
    return Response(status, _JSON, [body])
