"""The pages for whoever watches the server: the console, its state, a model's report, and metrics."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from onecard.server.console import CONSOLE_HEADERS, console_file
from onecard.server.http_types import HttpError, Request, Response
from onecard.telemetry.exposition import Compatibility, expose
from onecard.telemetry.snapshot import Snapshot, encode

_JSON = ((b"Content-Type", b"application/json"), (b"Cache-Control", b"no-store"))
_REPORT = (
    (b"Content-Type", b"text/html; charset=utf-8"),
    (b"X-Content-Type-Options", b"nosniff"),
    (b"Cache-Control", b"no-cache"),
)
_MOST_REPORT_BYTES = 32 << 20
_MODEL_REPORT = ["v2", "onecard", "models"]


class ServerState(Protocol):
    """Tells of the whole server."""

    async def read(self) -> Snapshot:
        """The state now, or a moment ago."""
        ...

    def bundle_of(self, name: str) -> Path:
        """The folder of the bundle that serves under a name; raises an HttpError if none does."""
        ...


class WatchingPages:
    """Answers ``/``, ``/console/...``, ``/metrics`` and ``/v2/onecard/...``.

    Args:
        watched: the server.
        compatibility: ``triton`` for its names of metrics beside onecard's.
    """

    def __init__(self, watched: ServerState, compatibility: Compatibility = "") -> None:
        self._watched = watched
        self._compatibility = compatibility

    def open_page(self, request: Request) -> Response | None:
        """What holds nothing of the server and is open to everybody: the console's files."""
        found = console_file(request.path)
        if found is None:
            return None
        _only_get(request)
        return Response(200, [(b"Content-Type", found.content_type), *CONSOLE_HEADERS], [found.body])

    def find(self, request: Request) -> Callable[[], Awaitable[Response]] | None:
        """What makes a page that tells of the server; None if there is nothing at this path.

        Raises:
            HttpError: another method than GET and HEAD.
        """
        parts = request.path.strip("/").split("/")
        make: Callable[[], Awaitable[Response]]
        if parts == ["metrics"]:
            make = functools.partial(self._metrics, request)
        elif parts == ["v2", "onecard", "state"]:
            make = self._state
        elif parts[:3] == _MODEL_REPORT and parts[4:] == ["report"]:
            make = functools.partial(self._report, unquote(parts[3]))
        else:
            return None
        _only_get(request)
        return make

    async def _state(self) -> Response:
        return Response(200, _JSON, [encode(await self._watched.read())])

    async def _metrics(self, request: Request) -> Response:
        accept = request.headers.get(b"accept", b"").decode("latin-1")
        snapshot = await self._watched.read()
        loop = asyncio.get_running_loop()
        page = await loop.run_in_executor(None, expose, snapshot, accept, self._compatibility)
        return Response(200, [(b"Content-Type", page.content_type.encode())], [page.body])

    async def _report(self, name: str) -> Response:
        folder = self._watched.bundle_of(name)
        body = await asyncio.get_running_loop().run_in_executor(None, _read_report, folder)
        return Response(200, _REPORT, [body])


class MetricsPort:
    """The handler of the port that has metrics and nothing else, for a network of its own.

    Args:
        pages: see :class:`WatchingPages`.
    """

    def __init__(self, pages: WatchingPages) -> None:
        self._pages = pages

    def __call__(self, request: Request) -> Response | Awaitable[Response]:
        """Answer one request.

        Raises:
            HttpError: it is not for metrics.
        """
        found = self._pages.find(request) if request.path.rstrip("/") == "/metrics" else None
        if found is None:
            raise HttpError(404, "this port has /metrics and nothing else.")
        return found()


def _only_get(request: Request) -> None:
    if request.method not in ("GET", "HEAD"):
        raise HttpError(
            405,
            f"{request.method} does not go with {request.path[:200]}: expected GET or HEAD.",
            [(b"Allow", b"GET, HEAD")],
        )


def _read_report(folder: Path) -> bytes:
    """Of a bundle that serves: the path is the server's own, nothing of it came with a request."""
    try:
        with (folder / "report.html").open("rb") as file:
            body = file.read(_MOST_REPORT_BYTES + 1)
    except OSError as error:
        raise HttpError(404, f"this model's bundle has no report: {error.strerror or error}.") from error
    if len(body) > _MOST_REPORT_BYTES:
        raise HttpError(404, "this model's report is too large to be sent.")
    return body
