"""Taking requests apart by hand gives what protobuf's own classes give, for whatever bytes come."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onecard.server.grpc_messages import inference_messages
from onecard.server.grpc_wire import read_message, split_infer, write_infer, write_stream
from onecard.server.oip_types import ProtocolError

pytest.importorskip("google.protobuf", reason="needs protobuf")
REQUEST = inference_messages()["ModelInferRequest"]
RESPONSE = inference_messages()["ModelInferResponse"]
STREAMED = inference_messages()["ModelStreamInferResponse"]


def theirs(data: bytes):
    """The message as protobuf reads it, or None."""
    try:
        return read_message(REQUEST, data)
    except ProtocolError:
        return None


def ours(data: bytes):
    """The message as it is put together from its parts; ``unusual`` where it is left to protobuf."""
    parts = split_infer(data)
    if parts is None:
        return "unusual"
    message = theirs(parts.head)
    if message is None:
        return None
    if message.raw_input_contents:
        return "unusual"
    try:
        message.id = parts.id.decode()
    except UnicodeDecodeError:
        return None
    message.raw_input_contents.extend(bytes(each) for each in parts.raw)
    return message


def varint(number: int, padding: int = 0) -> bytes:
    found = bytearray()
    while number > 127 or padding:
        found.append(number & 127 | 128)
        number >>= 7
        padding = max(padding - 1, 0) if number == 0 else padding
    return bytes((*found, number))


def field(number: int, kind: int, data: bytes) -> bytes:
    return varint(number << 3 | kind) + data


def of_bytes(number: int, data: bytes, padding: int = 0) -> bytes:
    return field(number, 2, varint(len(data), padding) + data)


texts = st.text(max_size=8).map(str.encode) | st.binary(max_size=8)
tensor = st.builds(
    lambda name, shape: REQUEST.InferInputTensor(name=name, datatype="FP32", shape=shape).SerializeToString(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 300), max_size=4),
)
pieces = st.one_of(
    st.builds(of_bytes, st.sampled_from([1, 2, 3, 7, 7, 7, 9, 100]), texts, st.sampled_from([0, 0, 0, 1, 4])),
    st.builds(of_bytes, st.just(7), st.binary(max_size=300)),
    st.builds(of_bytes, st.sampled_from([5, 6]), tensor),
    st.builds(field, st.sampled_from([1, 7, 12]), st.just(0), st.integers(0, 2**64 - 1).map(varint)),
    st.builds(field, st.sampled_from([7, 12]), st.just(1), st.binary(min_size=8, max_size=8)),
    st.builds(field, st.sampled_from([7, 12]), st.just(5), st.binary(min_size=4, max_size=4)),
    st.sampled_from(
        [b"\xba\x00\x01x", b"\x3a\x81\x00x", b"\x1b\x1c", b"\x3b\x3c", b"\x00", b"\x3a\xff\xff\xff\xff\x7f"]
    ),
    st.binary(max_size=6),
)
messages = st.lists(pieces, max_size=8).map(b"".join)


@settings(max_examples=1500, deadline=None)
@given(messages)
def test_any_bytes_read_as_protobuf_reads_them(data):
    found = ours(data)
    assume(found != "unusual")
    assert found == theirs(data)


@settings(max_examples=300, deadline=None)
@given(messages.filter(lambda data: theirs(data) is not None), st.data())
def test_a_message_cut_off_or_changed_in_one_byte_reads_as_protobuf_reads_it(data, draw):
    assume(data)
    place = draw.draw(st.integers(0, len(data) - 1))
    byte = draw.draw(st.integers(0, 255))
    for changed in (data[:place], data[:place] + bytes([byte]) + data[place + 1 :]):
        found = ours(changed)
        if found != "unusual":
            assert found == theirs(changed)


def test_what_a_client_writes_is_taken_apart_without_copies():
    message = REQUEST(model_name="m", id="seven", raw_input_contents=[bytes(200_000), b"", b"ab"])
    message.inputs.add(name="x", datatype="UINT8", shape=[1, 200_000])
    data = message.SerializeToString()
    parts = split_infer(data)
    assert parts is not None
    assert parts.id == b"seven"
    assert [len(each) for each in parts.raw] == [200_000, 0, 2]
    assert all(each.obj is data for each in parts.raw)
    message.ClearField("id")
    message.ClearField("raw_input_contents")
    assert parts.head == message.SerializeToString()


def test_two_ids_are_left_to_protobuf():
    assert split_infer(of_bytes(3, b"\x80") + of_bytes(1, b"m") + of_bytes(3, b"two")) is None


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_protobuf_reads_what_is_written(size):
    head = RESPONSE(model_name="m", outputs=[{"name": "y", "shape": [size]}])
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    expected = RESPONSE(model_name="m", id="é", raw_output_contents=[data, b""], outputs=head.outputs)
    parts = write_infer(head.SerializeToString(), "é", [memoryview(data), b""])
    assert RESPONSE.FromString(b"".join(parts)) == expected
    assert STREAMED.FromString(b"".join(write_stream(parts))) == STREAMED(infer_response=expected)


def test_bytes_that_are_no_message_are_refused_by_name():
    with pytest.raises(ProtocolError, match=r"inference\.ModelInferRequest"):
        read_message(REQUEST, b"\x0a\xff")
