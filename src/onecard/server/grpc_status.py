"""Errors as gRPC status codes: from the HTTP status that each of onecard's errors has."""

from __future__ import annotations

import math
import secrets

from onecard.errors import OnecardError, QueueFullError
from onecard.server.http_types import LOGGER, HttpError

_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    507: "RESOURCE_EXHAUSTED",
}
_FAULT = 500
_MOST_DETAIL_CHARS = 2048  # it travels in the trailers, which clients bound to 8 or 16 KiB
_PUSHBACK = "grpc-retry-pushback-ms"


def code_of(error: BaseException) -> str:
    """The name of the status code that an RPC ends with for what a handler raised."""
    if isinstance(error, HttpError):
        return _CODES.get(error.status, "INTERNAL")
    return _CODES.get(error.http_status, "INTERNAL") if isinstance(error, OnecardError) else "INTERNAL"


def http_status_of(error: BaseException) -> int:
    """What the REST face would have answered to the same."""
    if isinstance(error, HttpError):
        return error.status
    return error.http_status if isinstance(error, OnecardError) else _FAULT


def status_of(error: BaseException, method: str) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """Turn what a handler raised into the end of its RPC.

    Args:
        error: errors of onecard are meant to be read by users; of any other, only the log tells what it was.
        method: the RPC's.

    Returns:
        The name of the status code, the message, and the trailing metadata. A client that was refused for the time
        being is told when to come back, as gRPC's retry policy reads it (proposal A6, "Pushback").
    """
    if isinstance(error, HttpError):
        retry = [int(value) * 1000 for name, value in error.headers if name == b"Retry-After" and value.isdigit()]
        trailing = tuple((_PUSHBACK, str(each)) for each in retry[:1])
        return code_of(error), _short(error.message), trailing
    if isinstance(error, QueueFullError):
        wait_ms = str(math.ceil(error.retry_after_s * 1000))
        return code_of(error), _short(str(error)), ((_PUSHBACK, wait_ms),)
    if isinstance(error, OnecardError):
        return code_of(error), _short(str(error)), ()
    number = secrets.token_hex(8)
    LOGGER.error("Request %s failed: gRPC %s", number, method, exc_info=error)
    return "INTERNAL", f"Internal error; the server's log tells more of request {number}.", ()


def _short(text: str) -> str:
    return text if len(text) <= _MOST_DETAIL_CHARS else text[: _MOST_DETAIL_CHARS - 3] + "..."
