"""Heads that were seen before mean what they meant when they were read; nothing else is taken for one."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.server.engine_memory import RequestMemory
from onecard.server.oip_contract import InferContract
from onecard.server.oip_request import binary_lead, parse_infer
from onecard.server.oip_response import encode_infer
from onecard.server.oip_seen import SeenHeads
from onecard.spec import TensorSpec, parse_spec
from tests.unit.server.oip_bodies import body, contract, data, head, one

SPEC = msgspec.structs.replace(
    parse_spec(["x: float32[B,16], B=1..8", "n: int64[B,8]"]),
    outputs=(TensorSpec("y", "float32", ("B", 4)), TensorSpec("z", "int32", ("B", 2))),
)
TWO = InferContract(SPEC)


def two(rows: int = 2, **changes) -> tuple[memoryview, int]:
    x, n = np.arange(rows * 16, dtype=np.float32), np.arange(rows * 8, dtype=np.int64)
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [rows, 16], "parameters": {"binary_data_size": x.nbytes}},
        {"name": "n", "datatype": "INT64", "shape": [rows, 8], "parameters": {"binary_data_size": n.nbytes}},
    ]
    request = {"inputs": inputs, "parameters": {"binary_data_output": True}, **changes}
    whole, length = body(request, x.tobytes() + n.tobytes())
    return memoryview(bytearray(whole)), length


def learned(whole: memoryview, length: int, told: InferContract = TWO):
    seen = SeenHeads(told)
    assert seen.find(whole, length) is None
    seen.learn(whole, length, parse_infer(whole, length, told))
    return seen, seen.find(whole, length)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_head_says_where_the_data_lies_and_what_is_asked_for(rows):
    whole, length = two(rows, parameters={"binary_data_output": True, "priority": 5, "timeout": 2_500_000})
    _, found = learned(whole, length)
    asked = parse_infer(whole, length, TWO)
    for place in found.places:
        array = np.ndarray(place.shape, np.dtype(place.dtype), whole[length + place.offset :])
        np.testing.assert_array_equal(array, asked.inputs[place.name])
        assert place.dtype == asked.dtypes[place.name]
    assert (found.priority, found.timeout_s, found.asked.outputs) == (5, 2.5, asked.outputs)


def test_the_same_answer_is_written_without_its_json_being_made_again():
    whole, length = two()
    _, found = learned(whole, length)
    asked = parse_infer(whole, length, TWO)
    for version in ("1", "2", "1"):
        for scale in (1, 7):
            answers = {"y": np.full((2, 4), scale, np.float32), "z": np.full((2, 2), scale, np.int32)}
            full = encode_infer(asked, answers, TWO, ("m", version))
            short = found.answer(answers, version)
            if short is None:
                found.learn(answers, version, full)
                short = found.answer(answers, version)
            assert short is not None
            assert (b"".join(short.body), short.json_length) == (b"".join(full.body), full.json_length)
    assert found.answer({"y": np.zeros((2, 3), np.float32), "z": answers["z"]}, "1") is None
    assert found.answer({"y": np.zeros((2, 4), np.float64), "z": answers["z"]}, "1") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "7"},
        {"parameters": {}},
        {"outputs": [{"name": "y", "parameters": {"binary_data": False}}]},
        {"outputs": [{"name": "y", "parameters": {"classification": 2}}]},
    ],
)
def test_what_is_not_plain_is_read_each_time(changes):
    whole, length = two(**changes)
    assert learned(whole, length)[1] is None


def test_truth_values_and_data_in_json_are_read_each_time():
    whole, length = body(head(id="", inputs=head()["inputs"]), data())
    assert learned(memoryview(whole), length, contract())[1] is None
    text = json.dumps(
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    assert learned(memoryview(text), len(text), one("float32", "B", 2))[1] is None


def test_a_known_head_with_other_data_behind_it_is_read():
    whole, length = two()
    seen, found = learned(whole, length)
    assert found is not None
    assert seen.find(whole[:-1], length) is None
    assert seen.find(memoryview(bytes(whole) + b"x"), length) is None
    assert seen.find(whole, None) is None
    assert seen.find(whole, 0) is None
    assert seen.find(whole, length - 1) is None


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 255))
def test_one_byte_that_differs_makes_another_head(at, value):
    whole, length = two()
    seen, found = learned(whole, length)
    other = memoryview(bytearray(whole))
    at %= length
    other[at] = value
    assert (seen.find(other, length) is found) == (whole[at] == value)


def test_only_so_many_heads_are_remembered():
    seen = SeenHeads(TWO)
    for n in range(1000):
        whole, length = two(parameters={"binary_data_output": True, "priority": n})
        seen.learn(whole, length, parse_infer(whole, length, TWO))
    assert len(seen._heads) <= 256
    assert seen.find(whole, length) is not None


def test_a_body_is_placed_where_it_was_received_and_nowhere_else():
    whole, length = two()
    _, found = learned(whole, length)
    memory = RequestMemory(1 << 20)
    try:
        received = memory.allocate(len(whole), binary_lead(length))
        received[:] = whole
        placed = memory.place_body(received, length, found.places)
        for tensor, place in zip(placed.tensors, found.places, strict=True):
            assert tensor.offset % 64 == 0
            there = memory.segment.array[tensor.offset :]
            expected = np.frombuffer(whole[length + place.offset :], np.uint8)
            assert (there[:64] == expected[:64]).all()
        assert memory.place_body(received, length, found.places) is None, "it has a request already"
        placed.lease.marked = False
        assert memory.place_body(received, length, found.places) is not None
        assert memory.place_body(whole, length, found.places) is None
        crooked = memory.allocate(len(whole), binary_lead(length) + 1)
        assert memory.place_body(crooked, length, found.places) is None
    finally:
        memory.close()
