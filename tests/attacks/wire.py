"""Requests that carry a tag, in bytes; answers taken out of a stream of bytes, and held against the tag."""

from __future__ import annotations

import functools
import gzip
import json
import struct
from dataclasses import dataclass

FACTOR, OFFSET = 3, 7
"""The model's function of each value."""
KILL, HANG, RAISE = -1311.0, -1312.0, -1313.0
"""As the first value of a row: the process that computes it dies, hangs for ever, or raises an error."""
WIDTH = 4
MOST_ROWS = 8
INFER = "/v2/models/tag/infer"


class MalformedAnswer(Exception):
    """What came is not an answer in HTTP."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: status, header fields by their names in lower case, and body."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def closes(self) -> bool:
        return self.headers.get(b"connection", b"") == b"close"


class AnswerReader:
    """Takes answers out of what a connection receives. Bytes behind the last whole one are in ``rest``."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> list[Answer]:
        """All answers that are whole now.

        Raises:
            MalformedAnswer: what came cannot be the beginning of an answer.
        """
        self.rest = self.rest + data if self.rest else data
        found = []
        while (answer := self._next()) is not None:
            found.append(answer)
        return found

    def _next(self) -> Answer | None:
        rest = self.rest
        if not rest.startswith(b"HTTP/1.1 "[: len(rest)]):
            raise MalformedAnswer(f"expected an answer, found {rest[:100]!r}")
        end = rest.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = rest[:end].split(b"\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
        status, length = first[9:12], headers.get(b"content-length", b"0")
        if not (status.isdigit() and length.isdigit()):
            raise MalformedAnswer(f"no status or no length: {rest[: end + 4]!r}")
        stop = end + 4 + int(length)
        if len(rest) < stop:
            return None
        self.rest = rest[stop:]
        return Answer(int(status), headers, rest[end + 4 : stop])


def values(tag: int, rows: int) -> list[float]:
    """The input of a request with a tag, flat. All of it, and of its answer, is exact in float32 below 5 million."""
    return [float(value) for row in range(rows) for value in (tag, row, tag % 1009, tag % 31)]


def infer(tag: int, rows: int = 1, *fields: str, timeout_us: int = 0, close: bool = False) -> bytes:
    """An inference request in binary data."""
    body = pack_body(tag, rows, timeout_us)
    return _head(len(body) - 4 * WIDTH * rows, len(body), (*fields, "Connection: close") if close else fields) + body


def poisoned(poison: float) -> bytes:
    """A request of one row that does harm; see :func:`tests.attacks.null_server.compute`."""
    body = pack_body(0, 1)[: -4 * WIDTH] + struct.pack(f"<{WIDTH}f", poison, 0, 0, 0)
    return _head(len(body) - 4 * WIDTH, len(body), ()) + body


def infer_in_json(tag: int, rows: int = 1, *fields: str, close: bool = False) -> bytes:
    """An inference request all in JSON."""
    return post(json_body(tag, rows), *fields, close=close)


def infer_in_chunks(tag: int, sizes: list[int], rows: int = 1) -> bytes:
    """An inference request in JSON, cut into chunks of these sizes and the rest."""
    left, chunks = json_body(tag, rows), []
    for size in (*sizes, 1 << 20):
        if left:
            chunks.append(b"%x;a=b\r\n%b\r\n" % (len(left[:size]), left[:size]))
            left = left[size:]
    head = f"POST {INFER} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(chunks) + b"0\r\nTrailer: x\r\n\r\n"


def infer_compressed(tag: int, rows: int = 1) -> bytes:
    """An inference request whose body is compressed."""
    return post(gzip.compress(json_body(tag, rows), 1, mtime=0), "Content-Encoding: gzip")


def post(body: bytes, *fields: str, path: str = INFER, close: bool = False) -> bytes:
    """A request with a body and its right length."""
    more = (*fields, "Connection: close") if close else fields
    lines = (f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *more, "", "")
    return "\r\n".join(lines).encode("latin-1") + body


def json_body(tag: int, rows: int) -> bytes:
    """The body of a request all in JSON, as a dict's text."""
    item = {"name": "x", "datatype": "FP32", "shape": [rows, WIDTH], "data": values(tag, rows)}
    return json.dumps({"id": f"{tag:010}", "inputs": [item]}).encode()


def pack_body(tag: int, rows: int, timeout_us: int = 0) -> bytes:
    """The body of a request in binary data: JSON, then the tensor."""
    before, after = _around_id(rows, timeout_us)
    return b"%b%010d%b" % (before, tag, after) + struct.pack(f"<{WIDTH * rows}f", *values(tag, rows))


@functools.lru_cache(256)
def _around_id(rows: int, timeout_us: int) -> tuple[bytes, bytes]:
    size = {"binary_data_size": 4 * WIDTH * rows}
    text = {
        "id": "@",
        "parameters": {"binary_data_output": True, **({"timeout": timeout_us} if timeout_us else {})},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, WIDTH], "parameters": size}],
    }
    before, after = json.dumps(text).encode().split(b"@")
    return before, after


@functools.lru_cache(256)
def _head(json_bytes: int, body_bytes: int, fields: tuple[str, ...]) -> bytes:
    lengths = (f"Inference-Header-Content-Length: {json_bytes}", f"Content-Length: {body_bytes}")
    return "\r\n".join((f"POST {INFER} HTTP/1.1", "Host: test", *lengths, *fields, "", "")).encode()


def fault_of(answer: Answer, tag: int, rows: int) -> str:
    """What is wrong with an answer of status 200 to a tag; empty if nothing is."""
    if b'"id":"%010d"' % tag not in answer.body:
        return f"the answer to {tag} has another id: {answer.body[:300]!r}"
    wanted = [value * FACTOR + OFFSET for value in values(tag, rows)]
    found = _outputs(answer)
    return "" if found == wanted else f"the answer to {tag} should be {wanted}, but is {found}"


def _outputs(answer: Answer) -> list[float] | None:
    """The only output's values; None if it has none that can be read."""
    length = answer.headers.get(b"inference-header-content-length")
    try:
        if length is None:
            return list(json.loads(answer.body)["outputs"][0]["data"])
        data = answer.body[int(length) :]
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    except (KeyError, IndexError, TypeError, ValueError, struct.error):
        return None
