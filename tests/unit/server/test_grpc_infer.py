"""What a gRPC request may hold, and what its answer does: the official client writes and reads, wrong ones by hand."""

import contextlib
import re

import ml_dtypes
import numpy as np
import pytest

from onecard.errors import DeadlineError, EngineError
from onecard.server.grpc_answer import encode_answer
from onecard.server.grpc_infer import parse_infer, plan_infer
from onecard.server.grpc_messages import inference_messages
from onecard.server.oip_contract import InferContract
from onecard.server.oip_types import DATATYPES, InferRequest, ProtocolError, RequestedOutput
from onecard.spec import Range, Spec, TensorSpec
from tests.unit.server.grpc_faces import ECHO, Given, echo_face

pytest.importorskip("google.protobuf", reason="needs protobuf")
REQUEST, RESPONSE = inference_messages()["ModelInferRequest"], inference_messages()["ModelInferResponse"]
ALL = sorted(DATATYPES)
TYPED = {
    "bool": "bool_contents",
    **dict.fromkeys(("int8", "int16", "int32"), "int_contents"),
    "int64": "int64_contents",
    **dict.fromkeys(("uint8", "uint16", "uint32"), "uint_contents"),
    "uint64": "uint64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
}


def contract_of(*dtypes):
    inputs = tuple(TensorSpec(f"x{i}", dtype, ("B", 3)) for i, dtype in enumerate(dtypes))
    outputs = tuple(TensorSpec(f"y{i}", dtype, ("B", 3)) for i, dtype in enumerate(dtypes))
    return InferContract(Spec(inputs, outputs, {"B": Range(1, 8)}), labels={"y0": ["a", "b"]})


def values_of(dtype):
    if dtype == "bool":
        return np.array([[True, False, True]])
    numpy = DATATYPES[dtype].numpy
    bounds = np.finfo(numpy) if numpy.kind == "f" else np.iinfo(numpy)
    return np.array([[bounds.min, 1, bounds.max]], numpy)


def message_of(*dtypes, name="x0", datatype="", shape=(1, 3)):
    """Of inputs x0, x1, ...; the first one may be described differently."""
    message = REQUEST(model_name="m")
    for i, dtype in enumerate(dtypes):
        message.inputs.add(name=f"x{i}", datatype=DATATYPES[dtype].name, shape=[1, 3])
    message.inputs[0].name = name
    message.inputs[0].datatype = datatype or message.inputs[0].datatype
    message.inputs[0].shape[:] = shape
    return message


def parse(message, raw=(), contract=None, remaining_s=None):
    """By both ways, where there are both; they agree."""
    contract = contract or contract_of("float32")
    views = [memoryview(each) for each in raw]
    errors, found = [], []
    for way in (
        lambda: parse_infer(message, "7", views, contract, None, remaining_s),
        lambda: plan_infer(message, contract).request("7", views, remaining_s),
    ):
        try:
            found.append(way())
        except AttributeError:  # no plan: typed contents or shared memory
            pass
        except (ProtocolError, DeadlineError) as error:
            errors.append(error)
    if errors:
        assert not found
        raise errors[0]
    for each in found[1:]:
        assert (each.id, each.dtypes, each.outputs, each.priority) == (
            found[0].id,
            found[0].dtypes,
            found[0].outputs,
            found[0].priority,
        )
        assert all(np.array_equal(each.inputs[name], found[0].inputs[name], equal_nan=False) for name in each.inputs)
    return found[0]


@pytest.mark.parametrize("dtype", ALL)
def test_raw_contents_of_every_datatype(dtype):
    array = values_of(dtype)
    request = parse(message_of(dtype), [array.tobytes()], contract_of(dtype))
    found = request.inputs["x0"]
    assert (found.dtype, found.shape, found.tobytes()) == (DATATYPES[dtype].numpy, (1, 3), array.tobytes())
    assert request.dtypes == {"x0": dtype}
    assert request.id == "7"


def test_raw_contents_are_not_copied():
    raw = values_of("uint8").tobytes()
    request = parse_infer(message_of("uint8"), "", [memoryview(raw)], contract_of("uint8"))
    assert np.shares_memory(request.inputs["x0"], np.frombuffer(raw, np.uint8))


@pytest.mark.parametrize("dtype", sorted(TYPED))
def test_typed_contents_of_every_datatype_that_has_them(dtype):
    message, array = message_of(dtype), values_of(dtype)
    getattr(message.inputs[0].contents, TYPED[dtype]).extend(array.reshape(-1).tolist())
    found = parse(message, contract=contract_of(dtype)).inputs["x0"]
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_floats_have_no_typed_contents(dtype):
    message = message_of(dtype)
    message.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    with pytest.raises(ProtocolError, match="Send it in 'raw_input_contents'"):
        parse(message, contract=contract_of(dtype))


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16"])
def test_a_number_beyond_the_datatype_is_refused(dtype):
    for beyond in (np.iinfo(dtype).max + 1, np.iinfo(dtype).min - 1):
        message = message_of(dtype)
        with contextlib.suppress(ValueError):  # below zero, protobuf's own field refuses it
            getattr(message.inputs[0].contents, TYPED[dtype]).extend([0, 0, beyond])
            with pytest.raises(ProtocolError, match="out of the range"):
                parse(message, contract=contract_of(dtype))


def broken():
    raw = np.zeros(3, np.float32).tobytes()
    both = message_of("float32")
    both.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    other = message_of("float32")
    other.inputs[0].contents.int_contents.extend([1, 2, 3])
    few = message_of("float32")
    few.inputs[0].contents.fp32_contents.extend([1, 2])
    twice = message_of("float32")
    twice.inputs.add().CopyFrom(twice.inputs[0])
    outputs = message_of("float32")
    outputs.outputs.add(name="z")
    again = message_of("float32")
    again.outputs.add(name="y0")
    again.outputs.add(name="y0")
    strings = message_of("float32", datatype="BYTES")
    priority = message_of("float32")
    priority.parameters["priority"].string_param = "high"
    late = message_of("float32")
    late.parameters["timeout"].int64_param = -1
    sequence = message_of("float32")
    sequence.parameters["sequence_id"].uint64_param = 3
    shared = message_of("float32")
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    region = message_of("float32")
    region.inputs[0].parameters["shared_memory_region"].int64_param = 1
    there = message_of("float32")
    there.outputs.add(name="y0").parameters["shared_memory_region"].string_param = "r"
    classes = message_of("float32")
    classes.outputs.add(name="y0").parameters["classification"].bool_param = True
    return [
        (message_of("float32"), [], "no data|expected 1"),
        (message_of("float32"), [raw, raw], "2 'raw_input_contents'"),
        (message_of("float32"), [raw[:-1]], "has 11 bytes of data, expected 12"),
        (message_of("float32", shape=[1, 4]), [raw], "x0"),
        (message_of("float32", shape=[9, 3]), [raw], "B"),
        (message_of("float32", shape=[-1, 3]), [raw], "negative"),
        (message_of("float32", shape=[1] * 65), [raw], "64 dimensions"),
        (message_of("float32", name="q"), [raw], "unknown input 'q'"),
        (message_of("float32", datatype="INT8"), [raw], "datatype 'INT8', expected FP32"),
        (strings, [raw], "takes no strings"),
        (REQUEST(model_name="m"), [], "missing"),
        (both, [raw], "in one place"),
        (other, [], "expected 'fp32_contents' alone"),
        (few, [], "2 elements"),
        (twice, [raw, raw], "given twice"),
        (outputs, [raw], "unknown output 'z'"),
        (again, [raw], "requested twice"),
        (priority, [raw], "'priority' of the request must be a whole number"),
        (late, [raw], "'timeout' of the request must be a whole number"),
        (sequence, [raw], "sequence_id"),
        (shared, [], "not enabled"),
        (region, [], "must be a string"),
        (there, [raw], "not enabled"),
        (classes, [raw], "'classification' of output 'y0'"),
    ]


@pytest.mark.parametrize("case", range(len(broken())))
def test_what_does_not_fit_is_refused_with_the_field(case):
    message, raw, reason = broken()[case]
    with pytest.raises(ProtocolError, match=reason):
        parse(message, raw)


def test_unknown_parameters_are_ignored():
    message = message_of("float32")
    message.parameters["binary_data_output"].bool_param = True
    message.parameters["mine"].double_param = 1.5
    message.inputs[0].parameters["binary_data_size"].int64_param = 12
    assert parse(message, [bytes(12)]).outputs == (RequestedOutput("y0", True),)


@pytest.mark.parametrize(
    ("asked_us", "remaining_s", "expected_us"),
    [(0, None, 0), (5000, None, 5000), (5000, 1.0, 5000), (5000, 0.001, 1000), (0, 2.5, 2_500_000)],
)
def test_the_shorter_of_timeout_and_deadline_counts(asked_us, remaining_s, expected_us):
    message = message_of("float32")
    if asked_us:
        message.parameters["timeout"].int64_param = asked_us
        message.parameters["priority"].uint64_param = 2
    request = parse(message, [bytes(12)], remaining_s=remaining_s)
    assert request.timeout_us == expected_us
    assert request.priority == (2 if asked_us else 0)


def test_a_deadline_that_passed_is_said():
    with pytest.raises(DeadlineError, match="deadline passed"):
        parse(message_of("float32"), [bytes(12)], remaining_s=0.0)


def answer(outputs, contract, wanted, **options):
    request = InferRequest("7", {}, {}, wanted)
    given = Given(outputs, "3", echo_face())
    return encode_answer("m", request, given, contract, **options)


@pytest.mark.parametrize("dtype", ALL)
def test_answers_of_every_datatype_are_read_by_the_official_client(dtype):
    client = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient and grpcio")
    array = np.asfortranarray(np.concatenate([values_of(dtype)] * 2))
    data = answer({"y0": array}, contract_of(dtype), (RequestedOutput("y0", True),))
    result = client.InferResult(client.service_pb2.ModelInferResponse.FromString(data))
    found = result.as_numpy("y0")
    assert found.shape == (2, 3)
    if dtype == "bfloat16":
        assert np.array_equal(found, array.copy().view(ml_dtypes.bfloat16).astype(found.dtype), equal_nan=True)
    else:
        assert np.array_equal(found, array)
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "7")


def test_classes_come_as_strings():
    client = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient and grpcio")
    array = np.array([[0.5, 2.0, 1.0], [3, 2, 1]], np.float32)
    data = answer({"y0": array}, contract_of("float32"), (RequestedOutput("y0", True, classes=2),))
    found = client.InferResult(client.service_pb2.ModelInferResponse.FromString(data)).as_numpy("y0")
    assert found.tolist() == [[b"2.000000:1:b", b"1.000000:2"], [b"3.000000:0:a", b"2.000000:1:b"]]


def test_an_answer_without_an_output_or_of_another_dtype_is_an_error_of_the_engine():
    wanted = (RequestedOutput("y0", True),)
    with pytest.raises(EngineError, match="no output 'y0'"):
        answer({}, contract_of("float32"), wanted)
    with pytest.raises(EngineError, match="complex64"):
        answer({"y0": np.zeros((1, 3), np.complex64)}, contract_of("float32"), wanted)


def test_answers_of_other_shapes_and_versions_are_not_mixed_up():
    contract, wanted = contract_of("float32"), (RequestedOutput("y0", True),)
    for rows in (1, 2, 1, 3):
        array = np.full((rows, 3), rows, np.float32)
        message = RESPONSE.FromString(answer({"y0": array}, contract, wanted))
        assert list(message.outputs[0].shape) == [rows, 3]
        assert message.raw_output_contents[0] == array.tobytes()


def test_a_plan_is_only_made_of_what_comes_as_raw_contents():
    contract = InferContract(ECHO)
    message = REQUEST(model_name="m")
    item = message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    assert plan_infer(message, contract) is not None
    item.contents.fp32_contents.extend([1, 2, 3])
    assert plan_infer(message, contract) is None
    assert re.match(r"\[\[1\. 2\. 3\.\]\]", str(parse_infer(message, "", [], contract).inputs["x"]))
