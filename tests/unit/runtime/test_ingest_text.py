"""The grammar of raw forms: what is computed of them, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from onecard.errors import SpecError
from onecard.runtime.ingest import Cast, Picture
from onecard.runtime.ingest_text import make_ingests, read_forms

IMAGENET = "image=uint8 NHWC mean=0.485,0.456,0.406 std=0.229,0.224,0.225"


def test_a_picture_is_scaled_then_normalised() -> None:
    (picture,) = make_ingests([f"{IMAGENET} scale=1/127.5"])
    raw = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    out = torch.empty(2, 3, 4, 5)
    picture(raw, out)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    wanted = ((raw.double() / 127.5 - mean) / std).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "ingest"),
    [
        ("image=uint8 NHWC", Picture("image", (0.0,), (255.0,), "NHWC")),
        ("image=uint8 NCHW scale=1", Picture("image", (0.0,), (1.0,), "NCHW")),
        ("image=uint8 mean=0.5 std=0.5 NHWC", Picture("image", (127.5,), (127.5,), "NHWC")),
        ("image=uint8 NHWC scale=1 mean=127 std=128", Picture("image", (127.0,), (128.0,), "NHWC")),
        ("image=uint8 NHWC scale=2e-2 mean=-1", Picture("image", (-50.0,), (50.0,), "NHWC")),
        ("image=uint8", Cast("image", "uint8")),
        ("input_ids=int32", Cast("input_ids", "int32")),
        (" x.y-z=float16 ", Cast("x.y-z", "float16")),
    ],
)
def test_what_a_text_stands_for(text: str, ingest: Picture | Cast) -> None:
    assert make_ingests([text]) == (ingest,)


def test_several_forms_in_one_text_or_in_many_words() -> None:
    apart = make_ingests([IMAGENET, "mean=int32", "ids=int32"])
    together = make_ingests([f"{IMAGENET} mean=int32  ids=int32"])
    in_words = make_ingests(f"{IMAGENET} mean=int32 ids=int32".split())  # as the environment's are given
    assert apart == together == in_words
    assert [ingest.input for ingest in apart] == ["image", "mean", "ids"]
    assert make_ingests([]) == ()


def test_a_form_may_be_one_models() -> None:
    texts = ["first.1:image=uint8  NHWC", "other:image=uint8 NCHW", "ids=int32"]
    assert [form.text for form in read_forms(texts)] == ["image=uint8 NHWC", "image=uint8 NCHW", "ids=int32"]
    assert [form.model for form in read_forms(texts)] == ["first.1", "other", ""]
    assert [getattr(i, "layout", "") for i in make_ingests(texts, "first.1")] == ["NHWC", ""]
    assert [i.input for i in make_ingests(texts)] == ["ids"]


@pytest.mark.parametrize("text", [f"{IMAGENET} scale=1/255", "a=uint8 NCHW", "b=int8"])
def test_a_text_read_again_is_the_same(text: str) -> None:
    (form,) = read_forms([f"model:{text}"])
    assert (form.text, form.model) == (text, "model")
    assert read_forms([form.text])[0].ingest() == form.ingest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image", "'image' names no input and dtype"),
        ("NHWC image=uint8", "'NHWC' names no input and dtype"),
        ("=uint8", "names no input"),
        ("image=", "names no input"),
        ("a b:image=uint8", "names no input"),
        ("image=uint9 NHWC", "unknown dtype 'uint9' in 'image=uint9 NHWC': expected one of float64,"),
        ("image=uint8 HWC", "'HWC' is neither NHWC, NCHW nor scale=, mean= or std="),
        ("image=uint8 NHWC men=0.5", "'men=0.5' is neither"),
        ("image=uint8 NHWC mean=0.5, 0.5, 0.5", "'' is no number"),
        ("image=uint8 NHWC NCHW", "two layouts"),
        ("image=uint8 NHWC mean=0.5 mean=0.4", "mean is given twice"),
        ("image=float32 NHWC", "pictures .NHWC. are uint8, not float32"),
        ("image=uint8 mean=0.5", "mean is for pictures: NHWC or NCHW is missing"),
        ("image=uint8 NHWC scale=1,2", "scale is one number"),
        ("image=uint8 NHWC scale=0", "scale and std cannot be 0"),
        ("image=uint8 NHWC std=0.5,0,0.5", "scale and std cannot be 0"),
        ("image=uint8 NHWC mean=1/0", "'1/0' is no number"),
        ("image=uint8 NHWC mean=nan", "'nan' is no number"),
        ("image=uint8 NHWC scale=1e999999999", "'1e999999999' is no number"),
        ("image=uint8 NHWC mean=123.675 std=58.4", "not one of numbers from 0 to 1, which scale=1/255 makes"),
    ],
)
def test_what_cannot_be_read_says_how_to_write_it(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as refused:
        read_forms([text])
    assert refused.value.cure or "expected one of" in refused.value.message


def test_a_text_of_any_length_gives_a_short_message() -> None:
    with pytest.raises(SpecError) as refused:
        read_forms(["image=uint8 " + "x" * 10_000])
    assert len(str(refused.value)) < 700


def test_reading_imports_no_torch() -> None:
    code = f"import sys; from onecard.runtime.ingest_text import read_forms; read_forms([{IMAGENET!r}]); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
