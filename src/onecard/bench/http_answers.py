"""Answers taken out of a connection's bytes: the status, where one ends, and its body where it is wanted."""

from __future__ import annotations

import re
from typing import NamedTuple

_HEAD_END = b"\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)
_NO_BODY = (204, 304)
_INTERIM = 200  # below it, the answer is still to come
_OK = 200


class MalformedAnswerError(Exception):
    """What came is no answer in HTTP/1.1."""


class HttpAnswer(NamedTuple):
    """One answer.

    Args:
        status: the code.
        body: of answers that are not 200, and of all where it was asked for; else empty.
        closes: whether the connection ends with it.
    """

    status: int
    body: bytes
    closes: bool


class AnswerReader:
    """Reads one answer after another.

    Args:
        keep: whether bodies of answers with status 200 are wanted; they are only counted otherwise.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        self._head = b""  # bytes of a head, or of a body in chunks, that is not whole yet
        self._status = 0
        self._closes = False
        self._left = -1  # bytes of the body that are to come; -1: a head is, -2: chunks are
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> HttpAnswer | None:
        """Take what came; returns the answer that it completes, if it does.

        Raises:
            MalformedAnswerError: it is none, or more than one came for one request.
        """
        if self._left < 0:
            data = self._head + data if self._head else data
            if self._left == -1:
                end = data.find(_HEAD_END)
                if end < 0:
                    self._head = data
                    return None
                self._read_head(data[: end + 4])
                data = data[end + 4 :]
                if self._status < _INTERIM:
                    self._head, self._left = b"", -1
                    return self.feed(data) if data else None
        return self._read_chunks(data) if self._left < 0 else self._read_body(data)

    def _read_head(self, head: bytes) -> None:
        match = _STATUS.match(head)
        if match is None:
            raise MalformedAnswerError(f"expected an answer, found {head[:60]!r}")
        self._status = int(match[1])
        self._closes = _CLOSES.search(head) is not None
        self._head, self._body = b"", []
        if self._status in _NO_BODY:
            self._left = 0
            return
        length = _LENGTH.search(head)
        if length is None and _CHUNKED.search(head) is None and self._status >= _INTERIM:
            raise MalformedAnswerError("the answer has neither a length nor chunks")
        self._left = int(length[1]) if length is not None else -2

    def _read_body(self, data: bytes) -> HttpAnswer | None:
        self._left -= len(data)
        if self._left < 0:
            raise MalformedAnswerError("there is more than one answer")
        if self._keep or self._status != _OK:
            self._body.append(data)
        return None if self._left else self._whole(b"".join(self._body))

    def _read_chunks(self, data: bytes) -> HttpAnswer | None:
        """Look at all that came since the head: chunked answers are rare, and short."""
        at, body = 0, list[bytes]()
        while (end := data.find(b"\r\n", at)) >= 0:
            try:
                size = int(data[at:end].partition(b";")[0], 16)
            except ValueError:
                raise MalformedAnswerError("a chunk has no size") from None
            stop = end + 2 + size + 2
            if size == 0:
                if data.find(_HEAD_END, end) == end or data.find(_HEAD_END, end + 2) >= 0:
                    self._head = b""
                    return self._whole(b"".join(body))
                break
            if len(data) < stop:
                break
            body.append(data[end + 2 : stop - 2])
            at = stop
        self._head = data
        return None

    def _whole(self, body: bytes) -> HttpAnswer:
        self._left, self._body = -1, []
        return HttpAnswer(self._status, body, self._closes)
