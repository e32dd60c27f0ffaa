"""What a connection has received and not yet taken; heads are found in here."""

from __future__ import annotations

from onecard.server.http_chunked import ChunkedBody
from onecard.server.http_head import check_partial, parse_head
from onecard.server.http_types import NO_HEAD, Head, HttpError, HttpLimits

_MIN_BYTES = 4096
_END = b"\r\n\r\n"
_CR = 0x0D


class Inbox:
    """A buffer of fixed size that bytes are received into.

    Args:
        limits: ``max_head_bytes`` is its size, so that a head either fits or is refused.

    Attributes:
        start: where the first byte stands that is not taken.
        end: where they end.
        waiting: whether a head has begun and is not whole.
    """

    __slots__ = ("_bytes", "_head", "_limits", "_raw", "_scanned", "_view", "end", "start")

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._bytes = bytearray(max(limits.max_head_bytes, _MIN_BYTES))
        self._view = memoryview(self._bytes)
        self.start = self.end = 0
        self._scanned = 0  # bytes from start that are known to hold no end of a head
        self._raw = b""  # the last head as it came: clients send the same one again and again
        self._head = NO_HEAD

    @property
    def waiting(self) -> bool:
        return self._scanned > 0

    def room(self) -> memoryview:
        """Where the next bytes go; empty only while a whole head waits to be taken."""
        if self.start == self.end:
            self.clear()
            return self._view
        if self.end == len(self._view):
            rest = self.end - self.start
            self._bytes[:rest] = self._bytes[self.start : self.end]
            self.start, self.end = 0, rest
        return self._view[self.end :]

    def clear(self) -> None:
        self.start = self.end = self._scanned = 0

    def next_head(self) -> Head | None:
        """Take a head, if it is whole.

        Raises:
            HttpError: it is not right, or can no longer become so.
        """
        start, end = self.start, self.end
        if self._raw and self._bytes.startswith(self._raw, start, end):
            self.start, self._scanned = start + len(self._raw), 0
            return self._head
        if self._bytes.startswith(b"\r\n", start, end):  # RFC 9112, section 2.2: some clients end a body so
            start = self.start = start + 2
            self._scanned = 0
        stop = self._bytes.find(_END, start + max(0, self._scanned - len(_END) + 1), end)
        if stop < 0 or stop + len(_END) - start > self._limits.max_head_bytes:
            self._check_partial()
            return None
        raw = bytes(self._view[start : stop + len(_END)])
        self._head = parse_head(raw, self._limits)
        self._raw = raw
        self.start, self._scanned = start + len(raw), 0
        return self._head

    def _check_partial(self) -> None:
        start, end, limits = self.start, self.end, self._limits
        fresh = start + self._scanned
        if self._scanned and self._bytes[fresh - 1] == _CR:
            fresh -= 1
        check_partial(bytes(self._view[fresh:end]))
        if end - start >= limits.max_head_bytes:
            if self._bytes.find(b"\r\n", start, start + limits.max_target_bytes) < 0:
                raise HttpError(414, f"The target is longer than {limits.max_target_bytes} bytes.")
            raise HttpError(431, f"The request's head is longer than {limits.max_head_bytes} bytes.")
        self._scanned = end - start

    def move_to(self, memory: memoryview) -> int:
        """Move what is here, as far as it fits, to a body's memory; how many bytes that were."""
        count = min(self.end - self.start, len(memory))
        memory[:count] = self._view[self.start : self.start + count]
        self.start += count
        return count

    def move_to_chunks(self, chunks: ChunkedBody) -> None:
        """Have a chunked body take what it can.

        Raises:
            HttpError: it is not right.
        """
        self.start = chunks.feed(self._bytes, self.start, self.end)

    def pass_over(self, most: int) -> int:
        """Drop bytes, at most so many; how many there were."""
        count = min(self.end - self.start, most)
        self.start += count
        return count
