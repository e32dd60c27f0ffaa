"""The console: the page at ``/`` that shows what is served, and how; its scripts and style are under ``/console/``.

The files are data of this package. They hold nothing of the server, which the page asks for with the reader's token, so
they are open to everybody.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from onecard.server.http_types import Headers

PAGE = "console.html"
FILES = MappingProxyType(
    {
        PAGE: b"text/html; charset=utf-8",
        "console.css": b"text/css; charset=utf-8",
        "icon.svg": b"image/svg+xml",
        **{
            f"{name}.js": b"text/javascript; charset=utf-8"
            for name in (
                *("answer", "charts", "client", "console", "elements", "figures", "format"),
                *("models", "picture", "protocol", "try_it"),
            )
        },
    }
)
"""Every file of the console, and its content type; nothing else is ever read."""
_FOLDER = "/console/"

CONSOLE_HEADERS: Headers = (
    (
        b"Content-Security-Policy",
        b"default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"X-Content-Type-Options", b"nosniff"),
    (b"Referrer-Policy", b"no-referrer"),
    (b"Cache-Control", b"no-cache"),  # the page of this version, after the server became another one
)
"""What goes with every file of the console, beside its content type."""


@dataclass(frozen=True)
class ConsoleFile:
    """One file as it is sent.

    Args:
        content_type: the value of ``Content-Type``.
        body: the whole file.
    """

    content_type: bytes
    body: bytes


def console_file(path: str) -> ConsoleFile | None:
    """What is at a path.

    Args:
        path: the request's, as it came: ``/``, or ``/console/NAME``.

    Returns:
        The file; None where the console has nothing.
    """
    name = PAGE if path == "/" else path.removeprefix(_FOLDER) if path.startswith(_FOLDER) else ""
    if name not in FILES or (name == PAGE and path != "/"):
        return None
    return _read(name)


@functools.cache
def _read(name: str) -> ConsoleFile:
    body = resources.files("onecard.server").joinpath("static", name).read_bytes()
    return ConsoleFile(FILES[name], body)
