"""Inputs in a further form: what a front accepts, refuses and tells of them; how they are configured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings

import msgspec
import numpy as np
import pytest

from onecard.bundle.open import OnecardWarning
from onecard.errors import SpecError, UsageError
from onecard.ipc.messages import Answered, Infer, Models, decode_to_front, encode
from onecard.ipc.models import ModelOptions, ModelState
from onecard.ipc.tensors import Tensor
from onecard.runtime.ingest import Picture
from onecard.server.config import read_config
from onecard.server.engine_models import open_bundle
from onecard.server.engine_served import ServedModels
from onecard.server.oip_contract import InferContract
from onecard.server.oip_metadata import model_config, model_metadata
from onecard.server.oip_request import parse_infer
from onecard.server.oip_seen import SeenHeads
from onecard.server.oip_types import ProtocolError
from onecard.server.raw_forms import check_forms
from onecard.spec import Range, Spec, TensorSpec
from tests.services.running_server import golden_of_here
from tests.unit.runtime.hastened_originals import hastened
from tests.unit.server.test_engine_sentinel import front_of, models_of

IMAGE = TensorSpec("image", "float32", ("B", 3, 4, 5))
RAW = TensorSpec("image", "uint8", ("B", 4, 5, 3), Range(0, 255))
IDS = TensorSpec("ids", "int64", ("B", "S"))
SPEC = Spec((IMAGE, IDS), (TensorSpec("y", "float32", ("B", 2)),), {"B": Range(1, 4), "S": Range(1, 8)})
BOTH = r"FP32\[B,3,4,5\] or UINT8\[B,4,5,3\]"


def contract() -> InferContract:
    return InferContract(SPEC, also=(RAW,))


def request(image: np.ndarray, datatype: str, ids: np.ndarray, binary: bool = True) -> tuple[bytes, int | None]:
    """A body, and the length of its JSON."""
    items, data = [], b""
    for name, array, kind in (("ids", ids, "INT64"), ("image", image, datatype)):
        item = {"name": name, "datatype": kind, "shape": list(array.shape)}
        if binary:
            item["parameters"] = {"binary_data_size": array.nbytes}
            data += array.tobytes()
        else:
            item["data"] = array.ravel().tolist()
        items.append(item)
    text = json.dumps({"inputs": items, "parameters": {"binary_data_output": True}}).encode()
    return text + data, len(text) if binary else None


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("datatype", "shape", "dtype"), [("UINT8", (2, 4, 5, 3), "u1"), ("FP32", (2, 3, 4, 5), "<f4")])
def test_either_form_is_taken_and_the_batch_is_one(binary, datatype, shape, dtype):
    image = (np.arange(120) % 251).astype(dtype).reshape(shape)
    asked = parse_infer(*request(image, datatype, np.ones((2, 7), np.int64), binary), contract())
    np.testing.assert_array_equal(asked.inputs["image"], image)
    assert asked.dtypes == {"image": "float32" if datatype == "FP32" else "uint8", "ids": "int64"}


@pytest.mark.parametrize(
    ("image", "datatype", "ids", "message"),
    [
        (np.zeros((2, 4, 5, 3), np.int8), "INT8", (2, 7), f"'image' has datatype 'INT8', expected {BOTH}"),
        (np.zeros((2, 3, 4, 5), np.uint8), "UINT8", (2, 7), f"size 3 in dimension 1, expected 4 .*'image' as {BOTH}"),
        (np.zeros((4, 5, 3), np.uint8), "UINT8", (2, 7), f"3 dimensions .*'image' as {BOTH}"),
        (np.zeros((2, 4, 5, 3), np.float32), "FP32", (2, 7), f"size 4 in dimension 1, expected 3 .*'image' as {BOTH}"),
        (np.zeros((2, 4, 5, 3), np.uint8), "UINT8", (3, 7), f"size 2 in dimension 0, expected 3 .*'image' as {BOTH}"),
        (np.zeros((5, 4, 5, 3), np.uint8), "UINT8", (5, 7), r"B=5 is outside the range B=1..4"),
    ],
)
def test_what_is_in_neither_form_is_refused_with_both(image, datatype, ids, message):
    with pytest.raises(ProtocolError) as refused:
        parse_infer(*request(image, datatype, np.ones(ids, np.int64)), contract())
    assert re.search(message, str(refused.value)), str(refused.value)


@pytest.mark.parametrize(("datatype", "shape", "dtype"), [("UINT8", (2, 4, 5, 3), "u1"), ("FP32", (2, 3, 4, 5), "<f4")])
def test_a_head_in_either_form_is_remembered_as_it_is(datatype, shape, dtype):
    told = contract()
    seen = SeenHeads(told)
    body, length = request(np.zeros(shape, dtype), datatype, np.ones((2, 8), np.int64))
    asked = parse_infer(body, length, told)
    seen.learn(memoryview(body), length, asked)
    found = seen.find(memoryview(body), length)
    assert found is not None
    assert [(p.name, p.dtype, p.shape) for p in found.places] == [
        ("ids", "int64", (2, 8)),
        ("image", asked.dtypes["image"], shape),
    ]


def test_metadata_keeps_the_models_form_and_has_the_other_as_a_parameter():
    plain, told = (json.loads(model_metadata("m", ["1"], SPEC, also)) for also in ((), (RAW,)))
    assert told == {**plain, "parameters": {"ingest.image": "UINT8[-1,4,5,3]"}}
    plain, told = (json.loads(model_config("m", SPEC, 3, also)) for also in ((), (RAW,)))
    assert told == {**plain, "parameters": {"ingest.image": {"string_value": "UINT8[-1,4,5,3]"}}}


def test_the_configuration_over_grpc_has_it_too():
    json_format = pytest.importorskip("google.protobuf.json_format", reason="needs protobuf")
    from onecard.server.grpc_messages import inference_messages

    message = json_format.Parse(model_config("m", SPEC, 3, (RAW,)), inference_messages()["ModelConfig"]())
    theirs = pytest.importorskip("tritonclient.grpc.model_config_pb2").ModelConfig()
    theirs.ParseFromString(message.SerializeToString())
    assert theirs.parameters["ingest.image"].string_value == "UINT8[-1,4,5,3]"


def test_what_the_engine_tells_reaches_the_contract():
    models = ServedModels()
    state = ModelState("m", "1", "READY", "", "/b", SPEC, "cpu", (RAW,))
    (told,) = decode_to_front(encode([Models((state,))]))
    models.tell(told.models)
    first = models.table["m"].contract
    assert first is not None and first.also == (RAW,) and set(first.forms["image"]) == {"FP32", "UINT8"}
    models.tell([msgspec.structs.replace(state, version="2")])
    assert models.table["m"].contract is first, "it knows the shapes that clients send"
    models.tell([msgspec.structs.replace(state, version="3", ingest=())])
    assert set(models.table["m"].contract.forms["image"]) == {"FP32"}


def test_forms_are_checked_before_anything_is_opened():
    check_forms(["image=uint8 NHWC", "a:ids=int32"], ("a", "b"))
    check_forms(["any:ids=int32"], None)
    with pytest.raises(UsageError, match="no model 'c' for the raw form 'ids=int32': expected a, b"):
        check_forms(["c:ids=int32"], ("a", "b"))
    with pytest.raises(SpecError, match="unknown dtype"):
        check_forms(["ids=int"], None)
    code = "import sys, onecard.server.raw_forms; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["image=uint8 NHWC", "ids=int32"]', ""),
        ('"image=uint8 NHWC"', r"models.m.ingest must be a list of texts in quotes"),
        ("[1]", r"models.m.ingest must be a list"),
        ('["image=uint8 HWC"]', r"models.m.ingest: cannot read the raw form 'image=uint8 HWC'"),
        ('["m:image=uint8 NHWC"]', r"no model 'm' .* this place is one model's own. Leave the name out"),
    ],
)
def test_forms_in_a_models_own_table(tmp_path, value, message):
    path = tmp_path / "c.toml"
    path.write_text(f'[models.m]\npath = "b"\ningest = {value}\n')
    if message:
        with pytest.raises(UsageError) as refused:
            read_config(path)
        assert re.search(message, str(refused.value)), str(refused.value)
    else:
        model = read_config(path).model("m")
        assert model is not None and model.options["ingest"] == ["image=uint8 NHWC", "ids=int32"]


def opened(*ingest: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)  # an engine may be missing here: the next variant serves
        return open_bundle("m", golden_of_here(), ModelOptions("cpu", ingest=ingest), lambda stats: None)


def test_a_bundle_is_opened_with_the_forms_that_are_its_own():
    raw = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    with opened("image=uint8 NHWC mean=0.5 std=0.25", "other:image=int8") as engine:
        assert engine.options.ingest == (Picture("image", (127.5,), (63.75,)),)
        found = engine.infer({"image": raw})["output"]
        same = engine.infer({"image": ((raw.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).astype(np.float32)})["output"]
    np.testing.assert_allclose(found, same, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("picture=uint8 NHWC", "the model has no input 'picture': it has image"),
        ("image=float64", "cannot be made from float64 without loss"),
        ("image=uint8 NHWC mean=0.1,0.2", "'image' has 3 channels, but mean has 2 values"),
        ("m:image=uint8 NHWC image=int8", "'image' was given two raw forms"),
        ("image=decode", "unknown dtype 'decode'"),
    ],
)
def test_a_form_that_does_not_fit_the_model_keeps_it_from_opening(form, message):
    with pytest.raises(UsageError, match=message):
        opened(form)


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="shared memory and packets between processes need Linux")
def test_a_sentinel_compares_what_came_in_a_raw_form(tmp_path):
    raw = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    image = (raw.transpose(0, 3, 1, 2) / np.float32(255)).copy()
    options = ModelOptions(sentinel=1, ingest=("image=uint8 NHWC",))
    with hastened(), models_of(open_bundle, options) as models, front_of(models, tmp_path / "s") as peer:
        sentinel = models.find("m").sentinel
        if sentinel is None:
            pytest.skip("only the original runs here")
        for number, (array, dtype) in enumerate(((raw, "uint8"), (image, "float32")), 1):
            mark, offset = peer.place(array)
            peer.send(Infer(number, "m", mark, (Tensor("image", dtype, array.shape, offset),)))
            assert isinstance(peer.answer(number), Answered)
        end = time.monotonic() + 100
        while sum(sentinel.figures()[:3]) < 2 and time.monotonic() < end and not sentinel.off:
            time.sleep(0.05)
        assert sentinel.figures()[:3] == (2, 0, 0), sentinel.off
