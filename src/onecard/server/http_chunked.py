"""Chunked bodies (RFC 9112, section 7.1), decoded as they come. Knows no sockets."""

from __future__ import annotations

import re
from enum import Enum, auto

from onecard.server.http_head import FIELD_LINE, bad, check_partial, too_large
from onecard.server.http_held import Hold
from onecard.server.http_types import HttpLimits

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[\t ]*;[\t\x20-\x7e]*)?\r\n")
_MAX_SIZE_LINE_BYTES = 128
_FREE_CHUNKS = (
    1024  # beyond these, chunks must hold _MEAN_CHUNK_BYTES on average: smaller ones cost more than they bring
)
_MEAN_CHUNK_BYTES = 64


class _Part(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILER = auto()
    DONE = auto()


class ChunkedBody:
    """Decodes one chunked body.

    Args:
        limits: ``max_body_bytes`` bounds the content, ``max_head_bytes`` the trailer.
        hold: counts the content; None for nobody.

    Attributes:
        content: what has come of the body.
        done: whether its end was seen.
    """

    def __init__(self, limits: HttpLimits, hold: Hold | None = None) -> None:
        self.content = bytearray()
        self._limits = limits
        self._hold = hold
        self._part = _Part.SIZE
        self._left = 0
        self._chunks = 0
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        return self._part is _Part.DONE

    def feed(self, data: bytearray, start: int, end: int) -> int:
        """Take what has come.

        Args:
            data: received bytes.
            start: the first one not yet taken.
            end: where they end.

        Returns:
            Where the first byte stands that was not taken: either the body is done, or a line is not whole yet.

        Raises:
            HttpError: 400 or 413, or what the hold raises; the connection cannot be used afterwards.
        """
        while start < end and self._part is not _Part.DONE:
            if self._part is _Part.DATA:
                taken = min(self._left, end - start)
                if self._hold is not None:
                    self._hold.grow(taken)
                self.content += memoryview(data)[start : start + taken]
                start += taken
                self._left -= taken
                if not self._left:
                    self._part = _Part.DATA_END
                continue
            stop = data.find(b"\n", start, end) + 1
            line = bytes(data[start : stop or end])
            self._check_line(line, whole=stop > 0)
            if not stop:
                break
            self._take_line(line)
            start = stop
        return start

    def take(self) -> bytearray:
        """Hand over the content, which is not counted here any more."""
        content, self.content, self._hold = self.content, bytearray(), None
        return content

    def _check_line(self, line: bytes, whole: bool) -> None:
        check_partial(line)
        room = {_Part.SIZE: _MAX_SIZE_LINE_BYTES, _Part.DATA_END: 2}.get(
            self._part, self._limits.max_head_bytes - self._trailer_bytes
        )
        if len(line) > room or (self._part is _Part.DATA_END and not b"\r\n".startswith(line)):
            raise bad("A chunk is longer than its size, or a line between chunks is too long.")
        if not whole and self._part is _Part.SIZE and not re.match(rb"[0-9A-Fa-f]{1,15}(?:[\t ;\r]|\Z)", line):
            raise bad("A chunk's size is not a hexadecimal number.")

    def _take_line(self, line: bytes) -> None:
        if self._part is _Part.DATA_END:
            self._part = _Part.SIZE
        elif self._part is _Part.SIZE:
            self._take_size(line)
        elif line == b"\r\n":
            self._part = _Part.DONE
        elif FIELD_LINE.fullmatch(line):
            self._trailer_bytes += len(line)
        else:
            raise bad("A trailer line is not 'name: value'.")

    def _take_size(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise bad("A chunk's size is not a hexadecimal number.")
        self._left = int(match[1], 16)
        if len(self.content) + self._left > self._limits.max_body_bytes:
            raise too_large(self._limits.max_body_bytes)
        self._chunks += 1
        if self._chunks > _FREE_CHUNKS + len(self.content) // _MEAN_CHUNK_BYTES:
            raise bad(f"The body comes in too many chunks of fewer than {_MEAN_CHUNK_BYTES} bytes.")
        self._part = _Part.DATA if self._left else _Part.TRAILER
