"""Compressed bodies (RFC 9110, section 8.4.1), made plain within the limit on their size."""

from __future__ import annotations

import zlib

from onecard.server.http_head import too_large
from onecard.server.http_types import Buffer, HttpError

_GZIP = 16 + zlib.MAX_WBITS
_MAX_MEMBERS = 100  # each costs a copy of what follows it


def decompress(data: Buffer, encoding: str, max_bytes: int) -> bytes:
    """Decompress a body. Releases the interpreter while it works, so it is run on another thread than the loop's.

    Args:
        data: the body as it came.
        encoding: ``gzip`` (of one or more members) or ``deflate`` (with its zlib wrapper, or, as some clients send it,
            without).
        max_bytes: the most that may come out.

    Returns:
        The plain body.

    Raises:
        HttpError: 400 if the data is damaged, cut short, or followed by something else; 413 if more would come out.
    """
    try:
        return _inflate(memoryview(data), encoding, max_bytes)
    except zlib.error as error:
        raise HttpError(400, f"The body is not whole {encoding} data.") from error


def _inflate(data: memoryview, encoding: str, max_bytes: int) -> bytes:
    # A zlib wrapper starts with method 8 and a check that makes its first two bytes a multiple of 31 (RFC 1950).
    wrapped = len(data) > 1 and data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:2], "big") % 31 == 0
    bits = _GZIP if encoding == "gzip" else zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS
    parts: list[bytes] = []
    left = max_bytes
    for _ in range(_MAX_MEMBERS):
        stream = zlib.decompressobj(bits)
        part = stream.decompress(data, left + 1)
        left -= len(part)
        if left < 0:
            error = too_large(max_bytes)
            raise HttpError(413, f"{error.message} (after decompression)")
        parts.append(part)
        if not stream.eof:
            raise zlib.error("cut short")
        data = memoryview(stream.unused_data)
        if not data:
            return b"".join(parts)
        if encoding != "gzip":
            raise zlib.error("something follows")
    raise HttpError(400, f"The body has more than {_MAX_MEMBERS} gzip members.")
