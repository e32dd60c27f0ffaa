"""Test inputs follow the spec, are the same for the same seed, and come from the user's rows where they fit."""

import msgspec
import pytest
import torch

from onecard.inputs import is_mask, make_inputs
from onecard.spec import DTYPES, Spec, TensorSpec, parse_spec

TEXT = ["input_ids: int64[B,S] in 5..99, B=1..8, S=1..32", "attention_mask: int64[B,S]"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_dtype_are_the_specs(dtype):
    made = make_inputs(parse_spec([f"x: {dtype}[B,3], B=1..4"]), {"B": 2})["x"]
    assert (made.dtype, made.shape, made.is_contiguous()) == (getattr(torch, dtype), (2, 3), True)


def test_equal_seeds_give_equal_inputs():
    spec = parse_spec(["x: float32[B,4], B=1..4", "ids: int64[B,4] in 0..1000"])
    assert same(make_inputs(spec, {"B": 4}, seed=3), make_inputs(spec, {"B": 4}, seed=3))
    assert not same(make_inputs(spec, {"B": 4}, seed=3), make_inputs(spec, {"B": 4}, seed=4))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    make_inputs(parse_spec(TEXT), {"B": 2, "S": 4})
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["int64", "float32", "uint8"])
def test_values_stay_in_their_range_and_fill_it(dtype):
    made = make_inputs(parse_spec([f"x: {dtype}[1000] in 5..9"]), {})["x"]
    assert 5 <= made.min() < 5.5
    assert 8.5 < made.max() <= 9


def test_masks_are_ones_unless_ragged():
    spec = parse_spec(TEXT)
    assert make_inputs(spec, {"B": 4, "S": 16})["attention_mask"].all()


def test_ragged_masks_end_after_different_lengths():
    mask = make_inputs(parse_spec(TEXT), {"B": 8, "S": 32}, ragged=True)["attention_mask"]
    lengths = mask.sum(1)
    assert lengths[0] == 32
    assert lengths.min() >= 1
    assert len(lengths.unique()) > 2
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attention_mask: int64[2,3]", True),
        ("mask: bool[2,3]", True),
        ("mask: float32[2,3]", False),
        ("mask: int64[2,3,4]", False),
        ("input_ids: int64[2,3]", False),
    ],
)
def test_what_is_a_mask(text, expected):
    assert is_mask(parse_spec([text]).inputs[0]) is expected


def test_rows_of_real_data_are_drawn_together():
    spec = parse_spec(["x: float32[B,2], B=1..64", "y: float32[B,1]"])
    rows = torch.arange(10, dtype=torch.float32)
    data = {"x": torch.stack([rows, rows], 1), "y": -rows[:, None]}
    made = make_inputs(spec, {"B": 64}, data=data)  # more than there are
    assert torch.equal(made["x"][:, :1], -made["y"])
    assert set(made["x"].flatten().tolist()) <= set(rows.tolist())


def fixed(spec: Spec) -> Spec:
    return msgspec.structs.replace(spec, outputs=(TensorSpec("y", "float32", ()),))


def test_data_that_does_not_fit_is_not_used():
    ids = torch.full((10, 8), 7)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    spec = parse_spec(TEXT)
    assert (make_inputs(spec, {"B": 2, "S": 8}, data=data)["input_ids"] == 7).all()
    assert same(make_inputs(spec, {"B": 2, "S": 9}, data=data), make_inputs(spec, {"B": 2, "S": 9}))
    without_batch = fixed(spec)
    assert not (make_inputs(without_batch, {"B": 2, "S": 8}, data=data)["input_ids"] == 7).all()
