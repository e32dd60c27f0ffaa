"""The part of Protocol Buffers' wire format that carries the tensors, read and written without copies of its own.

Source: https://protobuf.dev/programming-guides/encoding. protobuf's own classes read everything but the raw contents,
which they would copy twice; so the two can never differ in what they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from onecard.server.oip_types import Buffer, ProtocolError

_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
_RAW_INPUTS_TAG = 7 << 3 | _BYTES
_RAW_OUTPUTS_TAG = 6 << 3 | _BYTES
_ID_TAG = 3 << 3 | _BYTES  # of requests and answers
_STREAMED_TAG = 2 << 3 | _BYTES
MOST_FIELDS = 10_000
"""Of a request itself, not of what is in them: inputs, outputs, parameters and raw contents together."""
_MORE = 0x80  # a varint's byte that is not its last
_LONGEST_LENGTH = 5  # bytes of a varint that is a length
_LONGEST_VARINT = 10


def read_message(message_class: Any, data: Buffer) -> Any:
    """Read a message.

    Raises:
        ProtocolError: bytes that are no such message.
    """
    from google.protobuf.message import DecodeError

    try:
        return message_class.FromString(bytes(data))
    except DecodeError:
        name = message_class.DESCRIPTOR.full_name
        raise ProtocolError(f"the request cannot be read: expected a message {name}.") from None


class InferParts(NamedTuple):
    """A ``ModelInferRequest``, taken apart.

    Args:
        head: everything else, as a message of its own: the same bytes for every request of one kind.
        id: of the request, in UTF-8; empty if there is none.
        raw: the ``raw_input_contents``, views of the message.
    """

    head: bytes
    id: bytes
    raw: list[memoryview]


def split_infer(data: bytes) -> InferParts | None:
    """Take a ``ModelInferRequest`` apart, without a look into its head.

    Returns:
        The parts; None for a message that is broken or written in an unusual way: protobuf's classes have to say what
        is in it.

    Raises:
        ProtocolError: it has more fields than any client writes, each of which would cost time and memory.
    """
    view = memoryview(data)
    end = len(data)
    kept: list[memoryview] = []
    raw: list[memoryview] = []
    request_id: bytes | None = None
    at = begin = fields = 0
    while at < end:
        fields += 1
        if fields > MOST_FIELDS:
            raise ProtocolError(f"the request has more than {MOST_FIELDS} fields.")
        start, tag = at, data[at]
        if tag not in (_RAW_INPUTS_TAG, _ID_TAG):
            if (at := _behind_field(data, at)) < 0:
                return None
            continue
        length, at = _length(data, at + 1)
        kept.append(view[begin:start])
        begin = at + length
        if length < 0 or begin > end:
            return None
        if tag == _RAW_INPUTS_TAG:
            raw.append(view[at:begin])
        elif request_id is None:
            request_id = data[at:begin]
        else:
            return None
        at = begin
    if at != end:
        return None
    kept.append(view[begin:])
    return InferParts(b"".join(kept), request_id or b"", raw)


def write_infer(head: bytes, request_id: str, raw: Sequence[Buffer]) -> list[Buffer]:
    """Write a ``ModelInferResponse``, in parts that are to be joined.

    Args:
        head: the message without these fields.
        request_id: empty for none.
        raw: the ``raw_output_contents``.
    """
    parts: list[Buffer] = [head]
    if request_id:
        encoded = request_id.encode()
        parts += (_start(_ID_TAG, len(encoded)), encoded)
    for each in raw:
        parts += (_start(_RAW_OUTPUTS_TAG, len(each)), each)
    return parts


def write_stream(parts: list[Buffer]) -> list[Buffer]:
    """Put a ``ModelInferResponse`` into a ``ModelStreamInferResponse``."""
    return [_start(_STREAMED_TAG, sum(map(len, parts))), *parts]


def _behind_field(data: bytes, at: int) -> int:
    """Where a field ends that begins there; -1 where protobuf has to say whether it does."""
    tag = data[at]
    kind = tag & 7
    at += 1
    if tag & _MORE and (at := _behind_varint(data, at)) < 0:
        return -1
    if kind == _BYTES:
        length, at = _length(data, at)
        return at + length if length >= 0 else -1
    if kind == _VARINT:
        return _behind_varint(data, at)
    return at + _FIXED_BYTES[kind] if kind in _FIXED_BYTES else -1


def _length(data: bytes, at: int) -> tuple[int, int]:
    """A length and where it ends; -1 where protobuf has to say what it is."""
    if at < len(data) and data[at] < _MORE:
        return data[at], at + 1
    length = shift = 0
    for byte in data[at : at + _LONGEST_LENGTH]:
        at += 1
        length |= (byte & ~_MORE) << shift
        shift += 7
        if byte < _MORE:
            return length, at
    return -1, at


def _behind_varint(data: bytes, at: int) -> int:
    for place in range(at, min(at + _LONGEST_VARINT, len(data))):
        if data[place] < _MORE:
            return place + 1
    return -1


def _start(tag: int, length: int) -> bytes:
    found = bytearray((tag,))
    while length >= _MORE:
        found.append(length & (_MORE - 1) | _MORE)
        length >>= 7
    found.append(length)
    return bytes(found)
