"""An answer is what was asked for, in as few copies as can be, and an error is a JSON object."""

import json

import numpy as np
import pytest
import torch

from onecard.errors import EngineError
from onecard.server.oip_classify import classify, length_prefixed
from onecard.server.oip_response import encode_infer
from onecard.server.oip_types import DATATYPES, InferRequest, ProtocolError, Region, RequestedOutput, Written
from tests.unit.server.oip_bodies import contract, one
from tests.unit.server.shared_objects import OneMemory


def request(*outputs: RequestedOutput, id: str = "") -> InferRequest:
    return InferRequest(id, {}, {}, outputs)


def test_only_what_was_asked_for_in_the_order_asked():
    scores, half = np.ones((2, 4), np.float32), np.full((2, 4), 2, np.float16)
    wanted = request(RequestedOutput("half", True), RequestedOutput("scores", False), id="é")
    response = encode_infer(wanted, {"scores": scores, "half": half, "unasked": scores}, contract(), ("m", "2"))
    whole = b"".join(response.body)
    assert response.json_length is not None and response.content_type == b"application/octet-stream"
    assert json.loads(whole[: response.json_length]) == {
        "model_name": "m",
        "model_version": "2",
        "id": "é",
        "outputs": [
            {"name": "half", "datatype": "FP16", "shape": [2, 4], "parameters": {"binary_data_size": 16}},
            {"name": "scores", "datatype": "FP32", "shape": [2, 4], "data": [1.0] * 8},
        ],
    }
    assert whole[response.json_length :] == half.tobytes()
    assert len(response.body) == 1  # small parts are joined


def test_large_tensors_are_not_copied():
    array = np.zeros((8, 50_000), np.float32)
    response = encode_infer(request(RequestedOutput("y", True)), {"y": array}, one("float32", "B", "S"), ("m", ""))
    assert len(response.body) == 2
    assert np.shares_memory(np.frombuffer(response.body[1], np.uint8), array)
    assert response.content_length == response.json_length + array.nbytes


@pytest.mark.parametrize(
    "turn", [np.asfortranarray, lambda a: a[:, ::-1], lambda a: torch.from_numpy(a.copy()).t().t()]
)
def test_any_layout_is_sent_row_major(turn):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    turned = turn(array)
    response = encode_infer(request(RequestedOutput("y", True)), {"y": turned}, one("float32", "B", "S"), ("m", ""))
    assert b"".join(response.body)[response.json_length :] == np.asarray(turned).tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (2, 0)])
@pytest.mark.parametrize("binary", [True, False])
def test_odd_shapes(shape, binary):
    array = np.ones(shape, np.float32)
    response = encode_infer(request(RequestedOutput("y", binary)), {"y": array}, one("float32", *shape), ("m", ""))
    text = json.loads(b"".join(response.body)[: response.json_length])
    assert text["outputs"][0]["shape"] == list(shape)
    assert response.content_length - (response.json_length or response.content_length) == array.nbytes * binary


def test_an_output_is_named_by_what_it_is():
    response = encode_infer(
        request(RequestedOutput("y", True)), {"y": np.ones(3, np.int64)}, one("float32", "B"), ("m", "")
    )
    assert b'"INT64"' in response.body[0]


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        ({}, "the model gave no output 'y'"),
        ({"y": np.ones(2, np.complex64)}, "output 'y' as complex64, expected float32"),
        ({"y": np.ones(2, np.float16)}, "output 'y' as FP16, which cannot be sent as JSON. Ask for binary data"),
    ],
)
def test_answers_that_cannot_be_sent(answers, match):
    with pytest.raises(EngineError, match=match):
        encode_infer(request(RequestedOutput("y", False)), answers, one("float32", "B"), ("m", ""))


def test_what_the_engine_wrote_to_the_device_is_only_told():
    written = {"y": Written("bfloat16", (2, 3))}
    wanted = request(RequestedOutput("y", False, region=Region("r", 64, 8)))
    response = encode_infer(wanted, written, one("float32", "B"), ("m", ""), OneMemory(bytearray(), "device"))
    assert response.json_length is None
    assert json.loads(response.body[0])["outputs"] == [
        {
            "name": "y",
            "datatype": "BF16",
            "shape": [2, 3],
            "parameters": {
                "shared_memory_region": "r",
                "shared_memory_byte_size": 12,
                "shared_memory_offset": 8,
            },
        }
    ]
    with pytest.raises(EngineError, match="output 'y' was left on the device, but is to be sent"):
        encode_infer(request(RequestedOutput("y", True)), written, one("float32", "B"), ("m", ""))


def test_a_place_in_shared_memory_that_is_too_small():
    wanted = request(RequestedOutput("y", False, region=Region("r", 7)))
    array = np.ones(2, np.float32)
    with pytest.raises(ProtocolError, match="output 'y' has 8 bytes, but its 'shared_memory_byte_size' is 7"):
        encode_infer(wanted, {"y": array}, one("float32", "B"), ("m", ""), OneMemory(bytearray(7)))
    with pytest.raises(ProtocolError, match="not enabled on this server"):
        encode_infer(wanted, {"y": array}, one("float32", "B"), ("m", ""))


@pytest.mark.parametrize("dtype", sorted(set(DATATYPES) - {"bool", "bfloat16"}))
def test_classes_are_the_highest_in_order(dtype):
    datatype = DATATYPES[dtype]
    row = np.random.default_rng(0).permutation(100).astype(datatype.numpy)
    (found,) = classify(row, datatype, 5, (), batched=False)
    order = np.argsort(row)[::-1][:5]
    assert [int(text.split(":")[1]) for text in found] == order.tolist()
    assert [float(text.split(":")[0]) for text in found] == row[order].tolist()


def test_classes_with_ties_and_what_is_not_a_number():
    nan, inf = np.nan, np.inf
    rows = np.array([[1, nan, 1, -inf], [nan, nan, nan, nan], [inf, 0, inf, nan]], np.float32)
    found = classify(rows, DATATYPES["float32"], 3, (), batched=True)
    assert found == [
        ["1.000000:0", "1.000000:2", "-inf:3"],
        ["nan:0", "nan:1", "nan:2"],
        ["inf:0", "inf:2", "0.000000:1"],
    ]
    assert classify(rows, DATATYPES["float32"], 99, (), batched=True)[0][3] == "nan:1"


def test_classes_of_bfloat16():
    carrier = torch.tensor([[0.5, 2.0, -1.0]], dtype=torch.bfloat16).view(torch.int16).numpy()
    assert classify(carrier, DATATYPES["bfloat16"], 2, ["a"], batched=True) == [["2.000000:1", "0.500000:0:a"]]


def test_classes_without_a_batch_are_one_row():
    wanted = request(RequestedOutput("y", False, classes=2))
    response = encode_infer(wanted, {"y": np.array([[1, 4], [3, 2]], np.float32)}, one("float32", 2, 2), ("m", ""))
    (output,) = json.loads(response.body[0])["outputs"]
    assert output == {"name": "y", "datatype": "BYTES", "shape": [2], "data": ["4.000000:1", "3.000000:2"]}


def test_strings_are_counted_in_bytes():
    assert length_prefixed(["é", ""]) == b"\x02\x00\x00\x00\xc3\xa9\x00\x00\x00\x00"
