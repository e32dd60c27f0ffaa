"""Raw forms of inputs: what they become, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onecard.errors import SpecError
from onecard.runtime.ingest import Cast, Picture, check_ingests, in_model_form, model_shapes, raw_inputs, raw_spec
from onecard.spec import Range, parse_spec

SPEC = parse_spec(["image: float32[B,3,H,W], B=1..4, H=1..9, W=1..9", "ids: int64[B,S], S=1..8", "flag: bool[B]"])


def test_pictures_become_what_the_usual_preprocessing_gives() -> None:
    picture = Picture.unit("image", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    raw = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    out = torch.empty(2, 3, 4, 5)
    picture(raw, out)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(out, ((raw / 255 - mean) / std).permute(0, 3, 1, 2))
    assert picture.raw_shape((2, 3, 4, 5)) == (2, 4, 5, 3)
    assert picture.model_shape((2, 4, 5, 3)) == (2, 3, 4, 5)


def test_one_mean_serves_all_channels_and_planes_stay_planes() -> None:
    picture = Picture("image", (127.0,), (128.0,), "NCHW")
    raw = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    out = torch.empty(2, 3, 4, 5, dtype=torch.float16)
    picture(raw, out)
    assert torch.equal(out, ((raw - 127.0) / 128.0).half())
    assert picture.raw_shape((2, 3, 4, 5)) == picture.model_shape((2, 3, 4, 5)) == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("ingest", "message"),
    [
        (Picture("picture"), "no input 'picture': it has image, ids, flag"),
        (Picture("image", layout="HWC"), "unknown picture layout 'HWC'.*NHWC or NCHW"),
        (Picture("ids"), "four dimensions .* not ids: int64"),
        (Picture("image", mean=(1.0, 2.0)), "'image' has 3 channels, but mean has 2 values"),
        (Picture("image", std=(1.0, 0.0, 2.0)), "std of 0"),
        (Cast("ids", "float32"), "cannot be made from float32 without loss.*bool, int8, uint8, int16, int32"),
        (Cast("ids", "int64"), "without loss"),
        (Cast("image", "int32"), "without loss.*bool, int8, uint8, int16, float16, bfloat16"),
        (Cast("image", "float64"), "without loss"),
        (Cast("flag", "uint8"), "without loss.*Narrower are none"),
        (Cast("image", "string"), "without loss"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(ingest: Picture | Cast, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_ingests(SPEC, [ingest])


def test_one_input_has_one_raw_form() -> None:
    with pytest.raises(SpecError, match="'image' was given two raw forms"):
        check_ingests(SPEC, [Picture("image"), Cast("image", "float16")])


@pytest.mark.parametrize("raw", ["int32", "int16", "uint8", "int8", "bool"])
def test_every_value_of_a_narrower_dtype_arrives(raw: str) -> None:
    cast = Cast("ids", raw)
    check_ingests(SPEC, [cast])
    dtype = getattr(torch, raw)
    values = [0, 1] if raw == "bool" else [torch.iinfo(dtype).min, 0, torch.iinfo(dtype).max]
    out = torch.empty(1, 3 if raw != "bool" else 2, dtype=torch.int64)
    cast(torch.tensor([values]).to(dtype), out)
    assert out.tolist() == [values]


def test_the_model_sees_the_shapes_of_its_own_form() -> None:
    ingests = check_ingests(SPEC, [Picture("image"), Cast("ids", "int32")])
    given = {
        "image": np.zeros((2, 4, 5, 3), np.uint8),
        "ids": torch.zeros(2, 7, dtype=torch.int32),
        "flag": np.zeros(2, bool),
    }
    shapes = model_shapes(SPEC, ingests, given)
    assert shapes == {"image": (2, 3, 4, 5), "ids": (2, 7), "flag": (2,)}
    assert SPEC.bind(shapes) == {"B": 2, "H": 4, "W": 5, "S": 7}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("picture", np.zeros(3), "no input 'picture'"),
        ("image", np.zeros((2, 3, 4, 5)), "'image' is float64, expected image: float32.* or uint8"),
        ("ids", np.zeros((2, 3), np.int32), r"'ids' is int32, expected ids: int64\[B,S\]\."),
        ("image", np.zeros((4, 5, 3), np.uint8), r"uint8 NHWC, but got the shape \[4, 5, 3\]"),
        ("image", np.zeros((2, 3, 4, 5), ">f4"), "another machine's byte order"),
        ("image", torch.zeros(2, 3, 4, 5, device="meta"), "on meta, expected it in host memory"),
    ],
)
def test_arrays_in_no_known_form_are_refused(name: str, array: np.ndarray | torch.Tensor, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        model_shapes(SPEC, check_ingests(SPEC, [Picture("image")]), {name: array})


def test_the_raw_forms_in_a_specs_words() -> None:
    ingests = [Cast("ids", "uint8"), Picture("image")]
    assert list(map(str, raw_inputs(SPEC, ingests))) == ["image: uint8[B,H,W,3] in 0..255", "ids: uint8[B,S]"]
    assert list(map(str, raw_spec(SPEC, ingests).inputs)) == [
        "image: uint8[B,H,W,3] in 0..255",
        "ids: uint8[B,S]",
        "flag: bool[B]",
    ]
    assert raw_spec(SPEC, ()) == SPEC
    with pytest.raises(SpecError, match="no input 'picture'"):
        raw_inputs(SPEC, [Picture("picture")])


@pytest.mark.parametrize(
    ("values", "raw", "expected"),
    [("in 0..30521", "int32", (0, 30521)), ("in 0..30521", "int8", (0, 127)), ("in 300..400", "uint8", (255, 255))],
)
def test_values_that_a_narrower_dtype_cannot_hold_are_not_drawn(values: str, raw: str, expected: tuple) -> None:
    spec = parse_spec([f"ids: int64[B] {values}, B=1..4"])
    (tensor,) = raw_inputs(spec, [Cast("ids", raw)])
    assert tensor.values == Range(*expected)


def test_a_request_in_raw_forms_is_made_what_the_model_takes() -> None:
    ingests = [Picture("image"), Cast("ids", "int32")]
    raw = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    raw.flags.writeable = False
    flag, ids = np.ones(2, bool), torch.arange(4, dtype=torch.int32).view(2, 2)
    made = in_model_form(SPEC, ingests, {"image": raw, "ids": ids, "flag": flag})
    assert [str(v.dtype) for v in made.values()] == ["torch.float32", "torch.int64", "bool"]
    np.testing.assert_allclose(made["image"], raw.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    assert made["ids"].tolist() == ids.tolist() and made["flag"] is flag
    again = in_model_form(SPEC, ingests, made)
    assert all(again[name] is made[name] for name in made)
