"""What fits is read without a copy; what does not is refused with a message that names the field."""

import itertools
import json

import numpy as np
import pytest

from onecard.errors import SpecError, UsageError
from onecard.server.oip_contract import InferContract
from onecard.server.oip_request import binary_lead, engine_inputs, parse_infer
from onecard.server.oip_types import DeviceInput, OipLimits, ProtocolError, Region, RequestedOutput
from onecard.spec import Range, Spec, TensorSpec
from tests.unit.server.oip_bodies import RAW_IMAGE, SPEC, body, contract, data, head, image, json_body, mask, one
from tests.unit.server.shared_objects import OneMemory


def refused(request, match, binary=None, **options):
    whole, length = body(request, binary)
    with pytest.raises(ProtocolError, match=match):
        parse_infer(whole, length, contract(**options))


def test_a_right_request():
    whole, length = body(head())
    request = parse_infer(whole, length, contract())
    np.testing.assert_array_equal(request.inputs["image"], np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    np.testing.assert_array_equal(request.inputs["mask"], np.array([0, 1] * 5, bool).reshape(2, 5))
    assert request.dtypes == {"image": "float32", "mask": "bool"}
    assert request.outputs == (RequestedOutput("scores", True), RequestedOutput("half", True))
    assert issubclass(ProtocolError, UsageError) and ProtocolError.http_status == 400


@pytest.mark.parametrize("shift", range(4))
def test_aligned_data_is_a_view_and_other_data_a_copy(shift):
    whole, length = body(head())
    lead = binary_lead(length)
    buffer = bytearray(len(whole) + 256)
    start = -np.frombuffer(buffer, np.uint8).ctypes.data % 64 + lead + shift
    received = memoryview(buffer)[start : start + len(whole)]
    received[:] = whole
    array = parse_infer(received, length, contract()).inputs["image"]
    assert array.flags.aligned
    assert np.shares_memory(array, np.frombuffer(buffer, np.uint8)) == (shift == 0)
    np.testing.assert_array_equal(array, np.arange(12, dtype=np.float32).reshape(2, 2, 3))


def test_inputs_in_another_order_and_in_both_ways():
    items = [mask(parameters={}, data=[[True] * 5, [False] * 5]), image()]
    request = parse_infer(*body(head(inputs=items), data()[:48]), contract())
    assert list(request.inputs) == ["mask", "image"]
    assert request.inputs["mask"].tolist() == [[True] * 5, [False] * 5]


def test_a_further_form_of_an_input():
    raw = image(datatype="UINT8", shape=[2, 3, 2], parameters={"binary_data_size": 12})
    request = parse_infer(*body(head(inputs=[raw, mask()]), bytes(22)), contract(also=(RAW_IMAGE,)))
    assert (request.inputs["image"].dtype, request.dtypes["image"]) == (np.uint8, "uint8")
    refused(head(inputs=[raw, mask()]), "input 'image' has datatype 'UINT8', expected FP32", bytes(22))
    wrong = {**raw, "datatype": "FP32"}
    refused(head(inputs=[wrong, mask()]), r"input 'image' has size 3 in dimension 1|2 dimensions", bytes(22))


@pytest.mark.parametrize(
    ("request_head", "match"),
    [
        (head(inputs=[]), r"inputs \['image', 'mask'\] are missing"),
        (head(inputs=[image()]), r"inputs \['mask'\] are missing"),
        (head(inputs=[image(), image(), mask()]), "input 'image' is given twice"),
        (head(inputs=[image(name="picture"), mask()]), r"unknown input 'picture': the model takes \['image', 'mask'\]"),
        (head(inputs=[image(name="p" * 500), mask()]), r"unknown input 'p{77}\.\.\.': "),
        (head(inputs=[image(name="a\nb"), mask()]), r"unknown input 'a\\nb'"),
        (head(inputs=[image(datatype="FP64"), mask()]), "input 'image' has datatype 'FP64', expected FP32"),
        (head(inputs=[image(datatype="fp32"), mask()]), "input 'image' has datatype 'fp32', expected FP32"),
        (head(inputs=[image(datatype="BYTES"), mask()]), "'BYTES', expected FP32; the model takes no strings"),
        (head(inputs=[image(shape=[2, 6]), mask()]), r"input 'image' has 2 dimensions \[2, 6\]"),
        (head(inputs=[image(shape=[2, 3, 2]), mask()]), "input 'image' has size 3 in dimension 1"),
        (head(inputs=[image(shape=[-1, 2, 3]), mask()]), r"Expected `int` >= 0 - at `\$\.inputs\[0\]\.shape\[0\]`"),
        (head(inputs=[image(shape=[1 << 62, 2, 3]), mask(shape=[1 << 62, 5])]), "outside the range B=1..4"),
        (head(inputs=[image(shape=[1 << 70, 2, 3]), mask()]), r"inputs\[0\]\.shape\[0\]"),
        (head(inputs=[image(shape=[0, 2, 3]), mask(shape=[0, 5])]), "outside the range B=1..4"),
        (head(inputs=[image(shape=[2.0, 2, 3]), mask()]), r"got `float` - at `\$\.inputs\[0\]\.shape\[0\]`"),
        (head(inputs=[image(shape=[True, 2, 3]), mask()]), r"got `bool` - at `\$\.inputs\[0\]\.shape\[0\]`"),
        (head(inputs=[image(shape=[1] * 65), mask()]), "length <= 64"),
        (head(inputs=[image(), mask(shape=[1, 10])]), "input 'mask' has size 1 in dimension 0, expected 2"),
        (head(inputs=[image(), mask(shape=[2, 17])]), "S=17 is outside the range S=1..16"),
        (head(inputs=[image(parameters={}), mask()]), "input 'image' must have its data in just one of"),
        (head(inputs=[image(data=[1] * 12), mask()]), "input 'image' must have its data in just one of"),
        (
            head(inputs=[image(parameters={"binary_data_size": 47}), mask()]),
            "'image' has 47 bytes of data, expected 48",
        ),
        (head(inputs=[image(parameters={"binary_data_size": -48}), mask()]), "binary_data_size"),
        (head(inputs=[image(parameters={"binary_data_size": 1 << 62}), mask()]), "but 58 bytes of data are left"),
        (
            head(inputs=[image(), mask(shape=[2, 6], parameters={"binary_data_size": 12})]),
            "but 10 bytes of data are left",
        ),
        (
            head(inputs=[image(), mask(shape=[2, 4], parameters={"binary_data_size": 8})]),
            "2 bytes behind the last input",
        ),
        (head(inputs="image"), r"Expected `array`, got `str` - at `\$\.inputs`"),
        (head(inputs=None), r"at `\$\.inputs`"),
        (head(id=7), r"at `\$\.id`"),
        (head(id="x" * 513), "'id' has 513 characters, at most 512"),
        (head(parameters={"priority": -1}), "priority"),
        (head(parameters={"priority": 1.5}), "priority"),
        (head(parameters={"timeout": "soon"}), "timeout"),
        (head(parameters={"binary_data_output": 1}), "binary_data_output"),
        (head(parameters={"sequence_id": 4}), "'sequence_id' is given"),
        (head(parameters={"sequence_id": "chat"}), "'sequence_id' is given"),
        (head(parameters=[]), r"at `\$\.parameters`"),
        (head(parameters={}), "output 'half' is FP16, which cannot be sent as JSON. Ask for binary data"),
        (head(outputs=[{"name": "other"}]), r"unknown output 'other': the model gives \['half', 'scores'\]"),
        (head(outputs=[{"name": "half"}, {"name": "half"}]), "output 'half' is requested twice"),
        (head(outputs=[{"name": "half", "parameters": {"binary_data": False}}]), "output 'half' is FP16"),
        (head(outputs=[{"name": "half", "parameters": {"classification": -2}}]), "classification"),
        (
            head(outputs=[{"name": "half", "parameters": {"classification": 2, "shared_memory_region": "r"}}]),
            "classes cannot be written to shared memory",
        ),
        (head(outputs=[{}]), "missing required field `name`"),
    ],
)
def test_refused(request_head, match):
    refused(request_head, match)


@pytest.mark.parametrize(
    ("whole", "length", "match"),
    [
        (b"", None, "the JSON cannot be read"),
        (b"{", None, "the JSON cannot be read"),
        (b"[]", None, "Expected `object`, got `array`"),
        (b"{}", None, "missing required field `inputs`"),
        (b'{"inputs":[]} x', None, "the JSON cannot be read.*trailing"),
        (b"\xef\xbb\xbf{}", None, "the JSON cannot be read"),
        (b'{"id":"\xff","inputs":[]}', None, "the JSON cannot be read"),
        (b'{"id":"\\ud800","inputs":[]}', None, "the JSON cannot be read"),
        (b"{}", 3, "Inference-Header-Content-Length is 3, but the body has 2 bytes"),
        (b"{}", -1, "Inference-Header-Content-Length is -1"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deep"),
        (b'{"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, None, "nested too deep"),
        (b'{"inputs":[{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}", None, "nested too deep"),
        (b"[" * 1_000_000, None, "protocol|cannot be read"),
    ],
)
def test_refused_before_it_is_understood(whole, length, match):
    with pytest.raises(ProtocolError, match=match):
        parse_infer(whole, length, contract())


def test_binary_data_needs_its_header():
    whole = json.dumps(head()).encode()
    with pytest.raises(ProtocolError, match="no header Inference-Header-Content-Length"):
        parse_infer(whole, None, contract())


def test_too_much_json():
    whole, length = body(head())
    with pytest.raises(ProtocolError, match=r"at most 100 are taken\. Send large tensors as binary data"):
        parse_infer(whole, length, contract(limits=OipLimits(max_json_bytes=100)))


def test_a_truth_value_is_zero_or_one():
    refused(head(), "input 'mask' is BOOL, but has bytes that are neither 0 nor 1", data()[:-1] + b"\x02")


def test_unknown_parameters_and_fields_are_passed_over():
    extra = {"binary_data_output": True, "mine": {"a": [1]}, "sequence_id": 0, "headers": "x"}
    given = head(parameters=extra, model_name="m", inputs=[image(content="x"), mask()])
    assert parse_infer(*body(given), contract()).id == "1"


def test_optional_fields_may_be_null():
    wanted = [{"name": "half", "parameters": {"binary_data": True}}, {"name": "scores", "parameters": None}]
    given = head(id=None, parameters=None, outputs=wanted, inputs=[image(), mask(parameters=None, data=[True] * 10)])
    request = parse_infer(*body(given, data()[:48]), contract())
    assert (request.id, request.priority, request.timeout_us) == ("", 0, 0)
    assert request.outputs == (RequestedOutput("half", True), RequestedOutput("scores", False))


def test_each_output_may_override_the_request():
    wanted = [
        {"name": "half"},
        {"name": "scores", "parameters": {"binary_data": False, "classification": 3}},
    ]
    request = parse_infer(*body(head(outputs=wanted)), contract())
    assert request.outputs == (RequestedOutput("half", True), RequestedOutput("scores", False, 3))


@pytest.mark.parametrize("given", [[1, 2, 3, 4], [[1, 2], [3, 4]], [1.0, 2, 3e0, 4]])
def test_json_data_flat_and_nested(given):
    request = parse_infer(json_body(data=given), None, one("float32", "B", 2))
    assert request.inputs["x"].tolist() == [[1, 2], [3, 4]]


def test_json_of_a_tensor_without_dimensions():
    request = parse_infer(json_body(shape=[], data=[2.5]), None, one("float32"))
    assert (request.inputs["x"].shape, float(request.inputs["x"])) == ((), 2.5)


def test_json_with_spaces():
    text = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2], [3, 4]]}]}, indent=3
    )
    assert parse_infer(text.encode(), None, one("float32", "B", 2)).inputs["x"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("dtype", "datatype", "given", "match"),
    [
        ("float32", "FP32", [1, 2, 3], "has 3 elements of data, expected 4"),
        ("float32", "FP32", [1, 2, 3, 4, 5], "has 5 elements of data, expected 4"),
        ("float32", "FP32", [], "elements of data, expected 4"),
        ("float32", "FP32", [[1, 2, 3], [4]], r"nested arrays do not have the shape \[2, 2\]"),
        ("float32", "FP32", [[1, 2, 3, 4], []], r"elements of data|nested arrays do not have"),
        ("float32", "FP32", [[1, 2, 3, 4]], r"data of shape \[1, 4\], expected \[2, 2\] or a flat array"),
        ("float32", "FP32", [[[1, 2], [3, 4]]], r"Expected `float`, got `array`"),
        ("float32", "FP32", [1, 2, [3], 4], r"Expected `float`, got `array` - at `\$\[2\]`"),
        ("float32", "FP32", [1, 2, None, 4], r"got `null` - at `\$\[2\]`"),
        ("float32", "FP32", [1, 2, "3", 4], r"got `str` - at `\$\[2\]`"),
        ("float32", "FP32", [1, 2, True, 4], r"got `bool` - at `\$\[2\]`"),
        ("float32", "FP32", "1,2,3,4", "got `str`"),
        ("float32", "FP32", 5, "elements of data, expected 4"),
        ("float32", "FP32", {"a": 1, "b": 2, "c": 3, "d": 4}, "got `object`"),
        ("float32", "FP32", [1, 2, 3, 3.5e38], "out of the range of FP32"),
        ("float32", "FP32", [1, 2, 3, -(10**60)], "out of the range of FP32"),
        ("float32", "FP32", [1, 2, 3, 10**400], "out of range"),
        ("int8", "INT8", [1, 2, 3, 128], r"Expected `int` <= 127 - at `\$\[3\]`"),
        ("int8", "INT8", [1, 2, 3, -129], r"Expected `int` >= -128 - at `\$\[3\]`"),
        ("uint8", "UINT8", [[1, 2], [3, 256]], r"Expected `int` <= 255 - at `\$\[1\]\[1\]`"),
        ("uint8", "UINT8", [1, 2, 3, -1], r"Expected `int` >= 0"),
        ("int64", "INT64", [1, 2, 3, 1 << 63], r"Expected `int` <= 9223372036854775807|out of range"),
        ("uint64", "UINT64", [1, 2, 3, 1 << 64], "out of the range of UINT64"),
        ("uint64", "UINT64", [1, 2, 3, -1], "Expected `int` >= 0"),
        ("int32", "INT32", [1, 2, 3, 1.5], "got `float`"),
        ("int32", "INT32", [1, 2, 3, True], "got `bool`"),
        ("bool", "BOOL", [True, False, True, 1], "Expected `bool`, got `int`"),
    ],
)
def test_json_data_refused(dtype, datatype, given, match):
    with pytest.raises(ProtocolError, match=match) as caught:
        parse_infer(json_body(datatype=datatype, data=given), None, one(dtype, "B", 2))
    assert "input 'x'" in str(caught.value)


@pytest.mark.parametrize("text", ["1e400", "1" * 5000, "-" + "9" * 5000])
def test_numbers_beyond_everything(text):
    whole = json_body(data=[1, 2, 3, 4]).replace(b"4]}", text.encode() + b"]}")
    for dtype in ("float32", "int64"):
        with pytest.raises(ProtocolError):
            parse_infer(whole.replace(b"FP32", b"INT64" if dtype == "int64" else b"FP32"), None, one(dtype, "B", 2))


@pytest.mark.parametrize(
    ("model", "nbytes", "shape"),
    [
        (one("float32", "B", 2), 24, (3, 2)),
        (one("float32", 3, 2), 24, (3, 2)),
        (one("float32", "B", "S"), 24, (1, 6)),
    ],
)
def test_a_body_without_json(model, nbytes, shape):
    values = np.arange(nbytes // 4, dtype="<f4")
    request = parse_infer(values.tobytes(), 0, model)
    np.testing.assert_array_equal(request.inputs["x"], values.reshape(shape))
    assert request.outputs == (RequestedOutput("y", True),)


@pytest.mark.parametrize(
    ("model", "nbytes", "match"),
    [
        (contract(), 8, "a model with one input"),
        (one("float32", "B", 2), 0, "B=0 is outside the range"),
        (one("float32", "B", 2), 10, "10 bytes, expected a multiple of 8"),
        (one("float32", "B", 2), 80, "B=10 is outside the range"),
        (one("float32", 2, 2), 32, "has 32 bytes of data, expected 16"),
        (one("float32", "B", "S", "T"), 16, "more than one dimension"),
        (InferContract(SPEC, also=(RAW_IMAGE,)), 8, "one input in one datatype"),
    ],
)
def test_a_body_without_json_refused(model, nbytes, match):
    with pytest.raises(ProtocolError, match=match):
        parse_infer(bytes(nbytes), 0, model)


def test_shared_memory_of_the_wrong_size():
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 44}
    whole, length = body(head(inputs=[image(parameters=place), mask()]), data()[48:])
    regions = OneMemory(bytearray(64))
    with pytest.raises(ProtocolError, match="input 'image' has a 'shared_memory_byte_size' of 44, expected 48"):
        parse_infer(whole, length, contract(), regions)
    assert not regions.asked


def test_truth_values_in_shared_memory_are_checked():
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 10}
    whole, length = body(head(inputs=[image(), mask(parameters=place)]), data()[:48])
    assert parse_infer(whole, length, contract(), OneMemory(bytearray([0, 1] * 5))).inputs["mask"].sum() == 5
    with pytest.raises(ProtocolError, match="input 'mask' is BOOL, but has bytes that are neither 0 nor 1"):
        parse_infer(whole, length, contract(), OneMemory(bytearray([0, 2] * 5)))


def test_what_lies_on_a_device_is_left_there():
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 48, "shared_memory_offset": 64}
    whole, length = body(head(inputs=[image(parameters=place), mask()]), data()[48:])
    request = parse_infer(whole, length, contract(), OneMemory(bytearray(64), "device"))
    assert request.on_device == (DeviceInput("image", "float32", (2, 2, 3), Region("r", 48, 64)),)
    assert list(request.inputs) == list(request.dtypes) == ["mask"]
    assert list(engine_inputs(request)) == ["mask"]


def test_the_place_of_an_output_is_looked_for_before_the_model_is_run():
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 16}
    whole, length = body(head(outputs=[{"name": "scores", "parameters": place}]))
    regions = OneMemory(bytearray(64))
    (wanted,) = parse_infer(whole, length, contract(), regions).outputs
    assert regions.asked == [wanted.region] == [Region("r", 16)]
    with pytest.raises(ProtocolError, match="output 'scores' is in shared memory 'r', which is not enabled"):
        parse_infer(whole, length, contract())


def test_remembered_shapes_stay_few(monkeypatch):
    monkeypatch.setattr("onecard.server.oip_contract._MOST_SHAPES", 5)
    model = contract()
    for rows, length in itertools.product(range(1, 5), range(1, 17)):
        items = [
            image(shape=[rows, 2, 3], parameters={"binary_data_size": rows * 24}),
            mask(shape=[rows, length], parameters={"binary_data_size": rows * length}),
        ]
        request = parse_infer(*body(head(inputs=items), bytes(rows * 24 + rows * length)), model)
        assert request.inputs["mask"].shape == (rows, length)
        assert len(model._seen) <= 5


def test_a_contract_that_the_protocol_has_no_words_for():
    with pytest.raises(SpecError, match="the protocol has no datatype for 'x: complex64"):
        one("complex64", "B")
    with pytest.raises(SpecError, match=r"further forms are given of \['other'\]"):
        contract(also=(TensorSpec("other", "uint8", ("B",)),))
    symbolless = Spec((TensorSpec("x", "float32", (2,)),), (), {"B": Range(1, 2)})
    assert InferContract(symbolless).batched is False
