"""The head of a request, by the grammar of RFC 9112 and RFC 9110 and nothing laxer: bytes to a Head, or a refusal.

Where two readers of the same bytes may differ on where a request ends, requests can be smuggled past the first. So what
is not plainly right is refused: bare CR or LF, folded lines, space before the colon, two lengths, a length beside a
transfer coding, control bytes, an authority that is not the host.
"""

from __future__ import annotations

import re

from onecard.server.http_types import Head, HttpError, HttpLimits

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_FIELD = _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n"
_HEAD = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])\r\n((?:" + _FIELD + rb")*)\r\n")
FIELD_LINE = re.compile(_FIELD)
_REQUEST_LINE = re.compile(_TOKEN + rb" [\x21-\x7e]+ HTTP/[0-9]\.[0-9]")
# What no prefix of a head may hold: a line that ends in LF or CR alone, or a control byte.
_FOUL = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TARGET = re.compile(rb"(?P<path>/(?:[\w\-.~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})*)"
                     rb"(?:\?(?P<query>(?:[\w\-.~!$&'()*+,;=:@/?\[\]|]|%[0-9A-Fa-f]{2})*))?", re.ASCII)  # fmt: skip
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE)
_HOST = re.compile(rb"(?:[\w\-.~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", re.ASCII)
_LENGTH = re.compile(rb"[0-9]{1,18}")
# Fields of which a second one would change the meaning for whoever reads only one of them.
_SINGLE = frozenset(
    {b"content-length", b"transfer-encoding", b"host", b"content-type", b"content-encoding", b"expect",
     b"authorization", b"inference-header-content-length"}
)  # fmt: skip
_ENCODINGS = {b"": "", b"identity": "", b"gzip": "gzip", b"x-gzip": "gzip", b"deflate": "deflate"}


def bad(message: str) -> HttpError:
    """The 400 of bytes that are not HTTP as it should be; what follows them cannot be trusted."""
    return HttpError(400, message)


def check_partial(seen: bytes) -> None:
    """Refuse a head that can no longer become right, before the rest of it has come.

    Args:
        seen: what has come of the head, or its end from one byte before what was checked already.

    Raises:
        HttpError: 400.
    """
    if _FOUL.search(seen):
        raise bad("The request's head holds a bare CR or LF, or a control byte.")


def parse_head(raw: bytes, limits: HttpLimits) -> Head:
    """Read a whole head.

    Args:
        raw: from the request line to the empty line, both with their CRLF.
        limits: the bounds on it.

    Returns:
        The head, with all that decides how the body comes.

    Raises:
        HttpError: 400, 411, 413, 414, 415, 417, 431, 501 or 505. All of them end the connection.
    """
    match = _HEAD.fullmatch(raw)
    if match is None:
        raise _fault(raw)
    method, target, major, minor_digit, block = match.groups()
    if major != b"1" or minor_digit not in (b"0", b"1"):
        raise HttpError(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    if len(target) > limits.max_target_bytes:
        raise HttpError(414, f"The target is longer than {limits.max_target_bytes} bytes.")
    name = method.decode("ascii")
    if name not in METHODS:
        raise HttpError(501, f"The method is not one of {', '.join(sorted(METHODS))}.")
    headers = _headers(block, limits.max_headers)
    minor = int(minor_digit)
    host = _host(headers, minor)
    path, query = _target(target, name, host)
    length, chunked = _framing(headers, minor, limits.max_body_bytes)
    encoding = _encoding(headers)
    continues = _expects_continue(headers, minor)
    if (encoding or continues) and b"content-length" not in headers and not chunked:
        raise HttpError(411, "A body is announced without its length.")
    options = {part.strip().lower() for part in headers.get(b"connection", b"").split(b",")}
    keep = b"close" not in options and (minor == 1 or b"keep-alive" in options)
    return Head(name, path, query, minor, headers, length, chunked, keep, continues, encoding)


def _fault(raw: bytes) -> HttpError:
    check_partial(raw)
    line, _, rest = raw.partition(b"\r\n")
    if not _REQUEST_LINE.fullmatch(line):
        return bad("The request line is not 'METHOD target HTTP/1.1'.")
    for number, field in enumerate(rest[:-2].split(b"\r\n")[:-1], 1):
        if not FIELD_LINE.fullmatch(field + b"\r\n"):
            if field[:1] in (b" ", b"\t"):
                return bad(f"Header line {number} is folded, which HTTP no longer allows.")
            return bad(f"Header line {number} is not 'name: value'.")
    return bad("The request's head cannot be read.")


def _headers(block: bytes, max_headers: int) -> dict[bytes, bytes]:
    lines = block.split(b"\r\n")
    lines.pop()  # nothing comes after the last CRLF
    if len(lines) > max_headers:
        raise HttpError(431, f"There are more than {max_headers} header fields.")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, _, padded = line.partition(b":")
        key, value = name.lower(), padded.strip(b"\t ")
        if key not in headers:
            headers[key] = value
        elif key in _SINGLE:
            raise bad(f"The header field {key.decode('ascii')} stands there twice.")
        else:
            headers[key] += (b"; " if key == b"cookie" else b", ") + value
    return headers


def _host(headers: dict[bytes, bytes], minor: int) -> bytes:
    host = headers.get(b"host")
    if host is None:
        if minor == 0:
            return b""
        raise bad("The header field host is missing.")
    if not _HOST.fullmatch(host):
        raise bad("The header field host is not 'name' or 'name:port'.")
    return host


def _target(target: bytes, method: str, host: bytes) -> tuple[str, str]:
    """Path and query (RFC 9112, section 3.2)."""
    if target == b"*":
        if method != "OPTIONS":
            raise bad("The target '*' goes with OPTIONS only.")
        return "*", ""
    if target[:1] != b"/":
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None:
            raise bad("The target is neither a path nor an http address.")
        authority, target = absolute.groups()
        if host and authority.lower() != host.lower():
            raise bad("The target's authority is not the host.")
        if not _HOST.fullmatch(authority):
            raise bad("The target's authority is not 'name' or 'name:port'.")
        target = target if target[:1] == b"/" else b"/" + target
    match = _TARGET.fullmatch(target)
    if match is None:
        raise bad("The target holds a character that must be percent-encoded.")
    return match["path"].decode("ascii"), (match["query"] or b"").decode("ascii")


def _framing(headers: dict[bytes, bytes], minor: int, max_body_bytes: int) -> tuple[int, bool]:
    """Length of the body, or that it is chunked (RFC 9112, section 6)."""
    length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if coding is not None:
        if length is not None:
            raise bad("Content-length and transfer-encoding stand side by side.")
        if minor == 0:
            raise bad("HTTP/1.0 has no transfer-encoding.")
        if coding.lower() != b"chunked":
            raise HttpError(501, "The only transfer coding known here is chunked.")
        return 0, True
    if length is None:
        return 0, False
    if not _LENGTH.fullmatch(length):
        raise bad("Content-length is not a decimal number.")
    if int(length) > max_body_bytes:
        raise too_large(max_body_bytes)
    return int(length), False


def too_large(max_body_bytes: int) -> HttpError:
    """The 413 of a body that is over the limit."""
    return HttpError(413, f"The body is larger than {max_body_bytes} bytes.")


def _encoding(headers: dict[bytes, bytes]) -> str:
    name = headers.get(b"content-encoding", b"").lower()
    if name not in _ENCODINGS:
        accepted = [(b"Accept-Encoding", b"gzip, deflate")]
        raise HttpError(415, "The body's content-encoding is not gzip or deflate.", accepted)
    return _ENCODINGS[name]


def _expects_continue(headers: dict[bytes, bytes], minor: int) -> bool:
    expected = headers.get(b"expect")
    if expected is None or minor == 0:  # RFC 9110, section 10.1.1: not for HTTP/1.0
        return False
    if expected.lower() != b"100-continue":
        raise HttpError(417, "The only expectation known here is 100-continue.")
    return True
