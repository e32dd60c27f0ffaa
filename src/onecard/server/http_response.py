"""What goes back: the head of a response in bytes, and the response that an error becomes."""

from __future__ import annotations

import email.utils
import http
import math
import re
import secrets
import time

from onecard.errors import OnecardError, QueueFullError
from onecard.server.http_types import LOGGER, Head, Headers, HttpError, Request, Response

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {
    **{status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nDate: ".encode() for status in http.HTTPStatus},
    499: b"HTTP/1.1 499 Client Closed Request\r\nDate: ",
}
_BODILESS = frozenset({204, 304})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")


class DateField:
    """The Date field's value, formatted once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = b""

    def now(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._text = email.utils.formatdate(second, usegmt=True).encode("ascii")
        return self._text


def encode_head(response: Response, date: bytes, length: int, head: Head, keep: bool) -> bytes:
    """The status line and header fields of a response.

    Args:
        response: the response.
        date: the Date field's value.
        length: bytes of its body.
        head: the head of the request that it answers.
        keep: whether the connection stays open.

    Raises:
        ValueError: a header field holds a line break, with which a client could be sent an answer of its own making.
        KeyError: there is no such status.
    """
    fields = b"".join([b"\r\n%b: %b" % field for field in response.headers])
    breaks = len(response.headers)
    if fields.count(b"\n") != breaks or fields.count(b"\r") != breaks:
        raise ValueError("a response's header field holds a line break")
    ends = b"\r\n\r\n" if response.status in _BODILESS else b"\r\nContent-Length: %d\r\n\r\n" % length
    if not keep:
        ends = b"\r\nConnection: close" + ends
    elif head.minor == 0:
        ends = b"\r\nConnection: keep-alive" + ends
    return b"".join((_STATUS_LINES[response.status], date, fields, ends))


def has_body(response: Response, head: Head) -> bool:
    """Whether the body is sent, or only its length (RFC 9110, sections 9.3.2 and 15)."""
    return head.method != "HEAD" and response.status not in _BODILESS


def json_error(status: int, message: str, headers: Headers = ()) -> Response:
    """The error body of the Open Inference Protocol."""
    import msgspec

    body = msgspec.json.encode({"error": message})
    return Response(status, [(b"Content-Type", b"application/json"), *headers], [body])


def response_of(error: BaseException, request: Request) -> Response:
    """Turn what a handler raised into the answer to its request.

    Args:
        error: errors of onecard are meant to be read by users; of any other, only the log tells what it was.
        request: what was asked.

    Returns:
        The response; a 500 names the request id that the log has too.
    """
    if isinstance(error, HttpError):
        return json_error(error.status, error.message, error.headers)
    if isinstance(error, OnecardError):
        headers: Headers = ()
        if isinstance(error, QueueFullError):
            headers = [(b"Retry-After", b"%d" % max(1, math.ceil(error.retry_after_s)))]
        return json_error(error.http_status, str(error), headers)
    given = request.headers.get(b"x-request-id", b"")
    request_id = given.decode("ascii") if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
    LOGGER.error("Request %s failed: %s %s", request_id, request.method, request.path, exc_info=error)
    headers = [(b"X-Request-Id", request_id.encode("ascii"))]
    return json_error(500, f"Internal error; the server's log tells more of request {request_id}.", headers)
