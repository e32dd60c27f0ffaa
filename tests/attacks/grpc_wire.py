"""Tagged requests as gRPC's messages, and the frames of HTTP/2 that carry them, byte by byte."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

from onecard.server.grpc_messages import INFERENCE_SERVICE, inference_messages
from tests.attacks.wire import FACTOR, OFFSET, WIDTH, values

INFER = f"/{INFERENCE_SERVICE}/ModelInfer"
STREAM = f"/{INFERENCE_SERVICE}/ModelStreamInfer"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
_FRAME_HEAD_BYTES = 9
_MOST_DATA_BYTES = 16_384  # of a frame, before anything else was agreed on
_STATUS = re.compile(rb"grpc-status.(\d{1,2})", re.DOTALL)


def infer_message(tag: int, rows: int = 1, typed: bool = False) -> bytes:
    """A ``ModelInferRequest`` with a tag, its tensor in raw or in typed contents."""
    message = inference_messages()["ModelInferRequest"](model_name="tag", id=f"{tag:010}")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[rows, WIDTH])
    if typed:
        tensor.contents.fp32_contents.extend(values(tag, rows))
    else:
        message.raw_input_contents.append(struct.pack(f"<{WIDTH * rows}f", *values(tag, rows)))
    return bytes(message.SerializeToString())


def fault_of_message(answer: bytes, tag: int, rows: int) -> str:
    """What is wrong with a ``ModelInferResponse`` to a tag; empty if nothing is."""
    return fault_of_response(inference_messages()["ModelInferResponse"].FromString(answer), tag, rows)


def fault_of_response(message: Any, tag: int, rows: int) -> str:
    """Likewise of one that is read already."""
    if message.id != f"{tag:010}":
        return f"the answer to {tag} has the id {message.id!r}"
    wanted = [value * FACTOR + OFFSET for value in values(tag, rows)]
    raw = message.raw_output_contents[0] if message.raw_output_contents else b""
    found = list(struct.unpack(f"<{len(raw) // 4}f", raw)) if len(raw) % 4 == 0 else []
    return "" if found == wanted else f"the answer to {tag} should be {wanted}, but is {found}"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """One frame.

    Args:
        kind: its type.
        flags: likewise.
        stream: 0 for the connection.
        payload: what is in it.
        length: what the frame says of it; None for the truth.
    """
    said = len(payload) if length is None else length
    return struct.pack(">I", said)[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field, without compression (RFC 7541, 6.2.2)."""
    return b"\0" + _text(name) + _text(value)


def _text(text: bytes) -> bytes:
    return integer(len(text)) + text


def integer(value: int, bits: int = 7) -> bytes:
    """An integer behind a prefix of zeros (RFC 7541, 5.1)."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((value,))
    found = bytearray((most,))
    value -= most
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def fields(path: str = INFER, *more: tuple[bytes, bytes], without: bytes = b"") -> bytes:
    """The header fields of a call.

    Args:
        path: the method's.
        more: further fields.
        without: one of the usual fields that is left out.
    """
    usual = [
        *((b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"test")),
        *((b"content-type", b"application/grpc"), (b"te", b"trailers")),
    ]
    return b"".join(literal(name, value) for name, value in (*usual, *more) if name != without)


def prefixed(message: bytes, compressed: int = 0, length: int | None = None) -> bytes:
    """A message as gRPC sends it: a flag, its length, itself."""
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


def data_frames(data: bytes, stream: int = 1, end: bool = True, each: int = _MOST_DATA_BYTES) -> list[bytes]:
    """Data in frames of at most so many bytes."""
    pieces = [data[at : at + each] for at in range(0, len(data), each)] or [b""]
    last = END_STREAM if end else 0
    return [frame(DATA, last * (n == len(pieces) - 1), stream, piece) for n, piece in enumerate(pieces)]


def call(message: bytes, stream: int = 1, path: str = INFER) -> list[bytes]:
    """The frames of a whole call."""
    return [frame(HEADERS, END_HEADERS, stream, fields(path)), *data_frames(prefixed(message), stream)]


def opening() -> bytes:
    """How a connection begins."""
    return PREFACE + frame(SETTINGS, 0, 0)


@dataclass(frozen=True)
class Received:
    """What a server sent on a connection.

    Args:
        frames: type, flags, stream and payload of each whole one.
    """

    frames: tuple[tuple[int, int, int, bytes], ...]

    def status(self) -> int | None:
        """gRPC's status, of the first call that has one: on later calls it may be compressed."""
        joined = b"".join(payload for kind, _, _, payload in self.frames if kind == HEADERS)
        found = _STATUS.search(joined)
        return int(found[1]) if found else None

    def ended(self, stream: int = 1) -> bool:
        """Whether a call was answered or refused, or the connection told to end."""
        return any(
            (kind in (HEADERS, DATA) and flags & END_STREAM and of == stream)
            or (kind == RST_STREAM and of == stream)
            or kind == GOAWAY
            for kind, flags, of, _ in self.frames
        )

    def message(self, stream: int = 1) -> bytes:
        """The first message of a call's answer; empty if there is none."""
        data = b"".join(payload for kind, _, of, payload in self.frames if kind == DATA and of == stream)
        return data[5 : 5 + struct.unpack(">I", data[1:5])[0]] if len(data) >= 5 else b""


def read_frames(data: bytes) -> Received:
    """Take apart what came; what is behind the last whole frame is left out."""
    found = []
    at = 0
    while at + _FRAME_HEAD_BYTES <= len(data):
        length = int.from_bytes(data[at : at + 3], "big")
        end = at + _FRAME_HEAD_BYTES + length
        if end > len(data):
            break
        stream = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
        found.append((data[at + 3], data[at + 4], stream, data[at + _FRAME_HEAD_BYTES : end]))
        at = end
    return Received(tuple(found))
