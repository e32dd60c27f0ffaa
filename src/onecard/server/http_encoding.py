"""Compressed bodies (RFC 9110, section 8.4.1), made plain within the limit on their size."""

from __future__ import annotations

import zlib

from onecard.server.http_head import too_large
from onecard.server.http_held import Hold
from onecard.server.http_types import Buffer, HttpError

_GZIP = 16 + zlib.MAX_WBITS
_MAX_MEMBERS = 100
_IN_BYTES = 64 << 10  # taken at once: zlib copies what of it has to wait
_OUT_BYTES = 1 << 20  # made at once, and counted then


def decompress(data: Buffer, encoding: str, max_bytes: int, hold: Hold | None = None) -> bytearray:
    """Decompress a body. Releases the interpreter while it works, so it is run on another thread than the loop's.

    Args:
        data: the body as it came.
        encoding: ``gzip`` (of one or more members) or ``deflate`` (with its zlib wrapper, or, as some clients send it,
            without).
        max_bytes: the most that may come out.
        hold: counts what comes out, as it comes; None for nobody.

    Returns:
        The plain body.

    Raises:
        HttpError: 400 if the data is damaged, cut short, or followed by something else; 413 if more would come out; or
            what the hold raises.
    """
    try:
        return _inflate(memoryview(data), encoding, max_bytes, hold)
    except zlib.error as error:
        raise HttpError(400, f"The body is not whole {encoding} data.") from error


def _inflate(data: memoryview, encoding: str, max_bytes: int, hold: Hold | None) -> bytearray:
    # A zlib wrapper starts with method 8 and a check that makes its first two bytes a multiple of 31 (RFC 1950).
    wrapped = len(data) > 1 and data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:2], "big") % 31 == 0
    bits = _GZIP if encoding == "gzip" else zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS
    plain = bytearray()
    for _ in range(_MAX_MEMBERS):
        data = _inflate_member(data, bits, plain, max_bytes, hold)
        if not data:
            return plain
        if encoding != "gzip":
            raise zlib.error("something follows")
    raise HttpError(400, f"The body has more than {_MAX_MEMBERS} gzip members.")


def _inflate_member(whole: memoryview, bits: int, plain: bytearray, max_bytes: int, hold: Hold | None) -> memoryview:
    """Decompress one stream behind what is plain already; gives what follows it."""
    stream = zlib.decompressobj(bits)
    left = whole
    while not stream.eof:
        taken: Buffer = stream.unconsumed_tail
        if not taken:
            taken, left = left[:_IN_BYTES], left[_IN_BYTES:]
        part = stream.decompress(taken, min(_OUT_BYTES, max_bytes - len(plain) + 1))
        if not (taken or part or stream.eof):
            raise zlib.error("cut short")
        if len(plain) + len(part) > max_bytes:
            raise HttpError(413, f"{too_large(max_bytes).message} (after decompression)")
        if hold is not None:
            hold.grow(len(part))
        plain += part
    return whole[len(whole) - len(left) - len(stream.unused_data) :]
