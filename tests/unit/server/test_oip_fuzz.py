"""Broken requests: whatever the bytes, an answer or a ProtocolError, and never a tensor that does not fit."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.server.oip_repository import check_change, parse_index
from onecard.server.oip_request import parse_infer
from onecard.server.oip_types import DATATYPES, ProtocolError
from tests.unit.server.oip_bodies import RAW_IMAGE, body, contract, head, image, json_body, mask, one

MUTANTS = 6000
TOKENS = [
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\\ud800", b"null", b"true", b"NaN", b"-", b"1e999", b"0.5"),
    *(b"99999999999999999999", b"-1", b"\x00", b"\xff", b"[[[[", b'"data":', b'"shape":[', b"9" * 4400),
]
SEEDS = [
    (*body(head()), contract(also=(RAW_IMAGE,))),
    (*body(head(inputs=[mask(), image()], outputs=[{"name": "half"}]), bytes(10) + bytes(48)), contract()),
    (*body(head(inputs=[image(parameters={}, data=[0.5] * 12), mask()]), bytes(10)), contract()),
    (json_body(), None, one("float32", "B", 2)),
    (json_body(data=[[1, 2], [3, 4]], datatype="INT8"), None, one("int8", "B", 2)),
    (json_body(data=[True, False, True, False], datatype="BOOL"), None, one("bool", "B", "S")),
    (bytes(32), 0, one("float32", "B", 2)),
]


def mutate(random: random.Random, whole: bytes) -> bytes:
    changed = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(changed) + 1)
        stop = min(len(changed), at + random.choice((0, 1, 1, 3, 20)))
        kind = random.randrange(4)
        if kind == 0:
            changed[at:stop] = random.choice(TOKENS)
        elif kind == 1:
            changed[at:stop] = random.randbytes(stop - at)
        elif kind == 2:
            changed[at:stop] = b""
        else:
            again = random.randrange(len(changed) + 1)
            changed[at:at] = changed[again : again + random.randrange(40)]
    return bytes(changed)


def check(whole: bytes, length: int | None, model) -> bool:
    """Whether it was taken; if so, the inputs fit the spec."""
    try:
        request = parse_infer(whole, length, model)
    except ProtocolError as error:
        assert 0 < len(str(error)) < 1000 and str(error).isprintable()
        return False
    if "uint8" not in request.dtypes.values():  # the further form has a shape of its own
        model.spec.bind({name: array.shape for name, array in request.inputs.items()})
    for name, array in request.inputs.items():
        assert array.dtype == DATATYPES[request.dtypes[name]].numpy
        assert array.flags.c_contiguous and array.flags.aligned
    return True


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_mutated_bodies(seed):
    whole, length, model = SEEDS[seed]
    assert check(whole, length, model)
    chance = random.Random(seed)
    taken = 0
    for _ in range(MUTANTS):
        mutant = mutate(chance, whole)
        given = length
        if length is not None and chance.random() < 0.6:  # often the length follows the change, so that more is reached
            given = max(length + len(mutant) - len(whole), 0)
        elif chance.random() < 0.1:
            given = chance.choice((None, 0, 1, len(mutant), 1 << 40))
        taken += check(mutant, given, model)
    assert taken < MUTANTS


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(["id", "inputs", "outputs", "parameters", "name", "shape", "datatype", "data", "x"])


@settings(max_examples=400, deadline=None)
@given(fields=st.dictionaries(names, anything), item=st.dictionaries(names, anything))
def test_json_of_other_shapes(fields, item):
    right = json.loads(json_body())
    right["inputs"][0].update(item)
    right.update(fields)
    check(json.dumps(right).encode(), None, one("float32", "B", 2))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_any_bytes(whole, length):
    check(whole, length, contract())
    for read in (parse_index, check_change):
        try:
            read(whole)
        except ProtocolError:
            continue


@pytest.mark.parametrize("cut", range(0, len(SEEDS[0][0])))
def test_every_shorter_body_is_refused(cut):
    whole, length, model = SEEDS[0]
    assert not check(whole[:cut], length, model)


def test_what_is_refused_leaves_nothing_behind():
    """A parser that kept views of refused bodies would keep their buffers from being resized."""
    whole, length, model = SEEDS[0]
    buffer = bytearray(whole[:-1])
    assert not check(buffer, length, model)
    buffer.append(0)
    request = parse_infer(buffer, length, model)
    with pytest.raises(BufferError):
        buffer.append(0)  # the inputs are views
    assert np.shares_memory(request.inputs["mask"], np.frombuffer(buffer, np.uint8))
    del request
    buffer.append(0)
