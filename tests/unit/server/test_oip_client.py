"""Triton's own client is the oracle: what it writes is read, and what is written it reads, for every datatype."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.runtime.request import Intake
from onecard.server.oip_contract import InferContract
from onecard.server.oip_request import engine_inputs, parse_infer
from onecard.server.oip_response import encode_infer
from onecard.server.oip_types import DATATYPES, InferRequest, InferResponse, ProtocolError, RequestedOutput
from onecard.spec import DTYPES, Range, Spec, TensorSpec
from tests.unit.server.shared_objects import OneMemory

client = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
ALL = sorted(DATATYPES)
IN_JSON = [dtype for dtype in ALL if DATATYPES[dtype].in_json]
HTTP = client.InferenceServerClient


def contract_of(*dtypes: str, shape=("B", 3)) -> InferContract:
    tensors = [TensorSpec(f"x{i}", dtype, shape) for i, dtype in enumerate(dtypes)]
    outputs = [TensorSpec(f"y{i}", dtype, shape) for i, dtype in enumerate(dtypes)]
    symbols = {dim: Range(1, 8) for dim in shape if isinstance(dim, str)}
    return InferContract(Spec(tuple(tensors), tuple(outputs), symbols))


def values_of(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values over the dtype's whole range, as the client takes them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype == "bfloat16":
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    numpy = DATATYPES[dtype].numpy
    if numpy.kind == "f":
        limit = float(np.finfo(numpy).max)
        edges = [-limit, limit, 0.0, -0.0, float(np.finfo(numpy).tiny)]
        drawn = rng.standard_normal(shape)
    else:
        edges = [np.iinfo(numpy).min, np.iinfo(numpy).max]
        drawn = rng.integers(edges[0], edges[1], shape, dtype=numpy, endpoint=True)
    array = drawn.astype(numpy)
    array.reshape(-1)[: len(edges)] = edges[: array.size]
    return array


def request_body(arrays, binary: bool, outputs=None, **options):
    inputs = []
    for name, array in arrays.items():
        dtype = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.name
        item = client.InferInput(name, list(array.shape), DATATYPES[dtype].name)
        inputs.append(item.set_data_from_numpy(array, binary_data=binary))
    return HTTP.generate_request_body(inputs, outputs=outputs, **options)


def read(response: InferResponse):
    body = b"".join(bytes(buffer) for buffer in response.body)
    assert len(body) == response.content_length
    return HTTP.parse_response_body(body, header_length=response.json_length)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def request_for(outputs, id: str = "") -> InferRequest:
    return InferRequest(id, {}, {}, tuple(outputs))


@pytest.mark.parametrize("dtype", ALL)
def test_binary_inputs(dtype):
    array = values_of(dtype, (5, 3))
    body, length = request_body({"x0": array}, binary=True, request_id="7", priority=2, timeout=1500)
    request = parse_infer(body, length, contract_of(dtype))
    found = request.inputs["x0"]
    assert (found.shape, found.tobytes(), request.dtypes) == (array.shape, array.tobytes(), {"x0": dtype})
    assert (request.id, request.priority, request.timeout_us) == ("7", 2, 1500)
    assert request.outputs == (RequestedOutput("y0", True),)  # the client asks for binary data if it names no output


@pytest.mark.parametrize("dtype", IN_JSON)
def test_json_inputs(dtype):
    array = values_of(dtype, (5, 3))
    wanted = [client.InferRequestedOutput("y0", binary_data=False)]
    body, length = request_body({"x0": array}, binary=False, outputs=wanted)
    assert length is None
    request = parse_infer(body, length, contract_of(dtype))
    assert same(request.inputs["x0"], array)
    assert request.outputs == (RequestedOutput("y0", False),)


@pytest.mark.parametrize("dtype", ALL)
def test_binary_outputs(dtype):
    array = values_of(dtype, (4, 3))
    answer = array.view(np.int16) if dtype == "bfloat16" else array
    response = encode_infer(
        request_for([RequestedOutput("y0", True)], "a"), {"y0": answer}, contract_of(dtype), ("m", "3")
    )
    result = read(response)
    assert same(result.as_numpy("y0"), array)
    head = result.get_response()
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "3", "a")


@pytest.mark.parametrize("dtype", IN_JSON)
def test_json_outputs(dtype):
    array = values_of(dtype, (4, 3))
    response = encode_infer(request_for([RequestedOutput("y0", False)]), {"y0": array}, contract_of(dtype), ("m", ""))
    assert (response.json_length, response.content_type) == (None, b"application/json")
    result = read(response)
    assert same(result.as_numpy("y0"), array)
    assert not {"id", "model_version"} & set(result.get_response())


@pytest.mark.parametrize("dtype", [dtype for dtype in ALL if not DATATYPES[dtype].in_json])
def test_sixteen_bit_floats_are_refused_in_json(dtype):
    contract = contract_of(dtype)
    item = client.InferInput("x0", [1, 3], DATATYPES[dtype].name)
    item._data = [1.0, 2.0, 3.0]
    body, length = HTTP.generate_request_body([item])
    with pytest.raises(ProtocolError, match=r"input 'x0' is [BFP]+16, which cannot be sent as JSON. Send it as binary"):
        parse_infer(body, length, contract)
    wanted = [client.InferRequestedOutput("y0", binary_data=False)]
    body, length = request_body({"x0": values_of(dtype, (1, 3))}, binary=True, outputs=wanted)
    with pytest.raises(ProtocolError, match=r"output 'y0' is [BFP]+16, which cannot be sent as JSON. Ask for binary"):
        parse_infer(body, length, contract)


@pytest.mark.parametrize("form", ["carrier", "widened", "tensor"])
def test_bfloat16_answers_in_each_form_the_engine_gives(form):
    array = values_of("bfloat16", (2, 3))
    forms = {
        "carrier": array.view(np.int16),
        "widened": array.astype(np.float32),
        "tensor": torch.from_numpy(array.view(np.int16)).view(torch.bfloat16),
    }
    request = request_for([RequestedOutput("y0", True)])
    result = read(encode_infer(request, {"y0": forms[form]}, contract_of("bfloat16"), ("m", "")))
    assert same(result.as_numpy("y0"), array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("writable", [True, False])
def test_the_engine_takes_what_was_read(dtype, writable):
    array = values_of(dtype, (5, 3))
    contract = contract_of(dtype)
    body, length = request_body({"x0": array}, binary=True)
    request = parse_infer(bytearray(body) if writable else body, length, contract)
    arrays, rows, _, nbytes, _ = Intake(contract.spec).take(engine_inputs(request))
    assert (rows, nbytes) == (5, array.nbytes)
    taken = arrays["x0"]
    assert (taken.view(torch.int16).numpy() if isinstance(taken, torch.Tensor) else taken).tobytes() == array.tobytes()


dims = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(ALL), min_size=1, max_size=4),
    dims=dims,
    binary=st.booleans(),
    out_binary=st.booleans(),
    seed=st.integers(0, 1000),
    id=st.text(max_size=20),
)
def test_there_and_back(dtypes, dims, binary, out_binary, seed, id):
    shape = tuple("BCDE"[: len(dims)])
    if not (binary and out_binary):
        dtypes = [dtype for dtype in dtypes if DATATYPES[dtype].in_json] or ["float32"]
    contract = contract_of(*dtypes, shape=shape)
    arrays = {f"x{i}": values_of(dtype, tuple(dims), seed + i) for i, dtype in enumerate(dtypes)}
    wanted = [client.InferRequestedOutput(f"y{i}", binary_data=out_binary) for i in reversed(range(len(dtypes)))]
    body, length = request_body(arrays, binary, outputs=wanted, request_id=id)
    request = parse_infer(body, length, contract)
    assert {name: a.tobytes() for name, a in request.inputs.items()} == {n: a.tobytes() for n, a in arrays.items()}
    result = read(
        encode_infer(request, {n.replace("x", "y"): a for n, a in request.inputs.items()}, contract, ("m", "1"))
    )
    assert result.get_response().get("id", "") == id
    assert [output["name"] for output in result.get_response()["outputs"]] == [w.name() for w in wanted]
    for name, array in arrays.items():
        assert same(result.as_numpy(name.replace("x", "y")), array)


@pytest.mark.parametrize("binary", [True, False])
def test_classification(binary):
    wanted = [client.InferRequestedOutput("y0", binary_data=binary, class_count=2)]
    body, length = request_body({"x0": np.zeros((2, 3), np.float32)}, binary=True, outputs=wanted)
    spec = contract_of("float32").spec
    contract = InferContract(spec, labels={"y0": ["apple", "pear"]})
    request = parse_infer(body, length, contract)
    scores = np.array([[1, 5, 10.5], [7, 7, 7]], np.float32)
    result = read(encode_infer(request, {"y0": scores}, contract, ("m", "")))
    found = [item.decode() if isinstance(item, bytes) else item for item in result.as_numpy("y0").reshape(-1)]
    assert result.get_output("y0")["shape"] == [2, 2]
    assert found == ["10.500000:2", "5.000000:1:pear", "7.000000:0:apple", "7.000000:1:pear"]


def test_shared_memory_both_ways():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    regions = OneMemory(bytearray(256))
    regions.memory[32 : 32 + array.nbytes] = array.tobytes()

    item = client.InferInput("x0", [2, 3], "FP32")
    item.set_shared_memory("in", array.nbytes, offset=32)
    wanted = client.InferRequestedOutput("y0")
    wanted.set_shared_memory("out", 64, offset=144)
    body, length = HTTP.generate_request_body([item], outputs=[wanted])
    contract = contract_of("float32")
    request = parse_infer(body, length, contract, regions)
    assert same(request.inputs["x0"], array)
    response = encode_infer(request, {"y0": array * 2}, contract, ("m", ""), regions)
    assert bytes(regions.memory[144 : 144 + array.nbytes]) == (array * 2).tobytes()
    assert read(response).get_output("y0")["parameters"] == {
        "shared_memory_region": "out",
        "shared_memory_byte_size": 24,
        "shared_memory_offset": 144,
    }
    body, length = HTTP.generate_request_body([item])
    with pytest.raises(ProtocolError, match=r"input 'x0' is in shared memory 'in', which is not enabled"):
        parse_infer(body, length, contract)


def test_not_a_number_reaches_the_client():
    array = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    response = encode_infer(
        request_for([RequestedOutput("y0", False)]), {"y0": array}, contract_of("float32"), ("m", "")
    )
    np.testing.assert_array_equal(read(response).as_numpy("y0"), array)
    body, length = request_body({"x0": array}, binary=False)
    with pytest.raises(ProtocolError, match="JSON has no NaN and no Infinity: send such numbers as binary data"):
        parse_infer(body, length, contract_of("float32"))
