"""How far two answers are apart: every figure, and the places where they cannot be compared."""

import pytest
import torch

from onecard.evidence import INCOMPARABLE
from onecard.recipe import COMPRESSIONS, PRECISIONS
from onecard.verify.compare import (
    THRESHOLDS,
    compare,
    decisive_flips,
    looks_like_logits,
    rounding_error,
    worst_row,
)

NAN, INF = float("nan"), float("inf")


def logits(rows: int = 6, classes: int = 10) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))


def test_every_precision_has_a_threshold():
    assert set(THRESHOLDS) == {*PRECISIONS, *COMPRESSIONS}


def test_equal_answers():
    error = compare("y", logits(), logits(), "B6")
    assert (error.output, error.case) == ("y", "B6")
    assert (error.relative_l2, error.max_abs, error.top1_agreement) == (0.0, 0.0, 1.0)
    assert error.cosine == pytest.approx(1.0)


def test_scaled_answer_has_that_relative_error_and_the_same_direction():
    error = compare("y", logits() * 1.05, logits(), "")
    assert error.relative_l2 == pytest.approx(0.05, rel=1e-4)
    assert error.cosine == pytest.approx(1.0)
    assert error.max_abs == pytest.approx(0.05 * float(logits().abs().max()), rel=1e-4)


def test_half_answers_are_compared_with_the_fp32_reference():
    assert 0 < compare("y", logits().half(), logits(), "").relative_l2 < 1e-3


def test_another_shape_cannot_be_compared():
    assert compare("y", logits(3), logits(4), "").max_abs == INCOMPARABLE


@pytest.mark.parametrize(("out", "ref"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (INF, -INF), (INF, NAN)])
def test_special_values_in_other_places_cannot_be_compared(out, ref):
    error = compare("y", torch.tensor([1.0, out]), torch.tensor([1.0, ref]), "")
    assert error.relative_l2 == error.max_abs == INCOMPARABLE


def test_special_values_in_the_same_places_are_equal():
    values = torch.tensor([NAN, INF, -INF, 2.0])
    assert compare("y", values, values.clone(), "").relative_l2 == 0
    assert compare("y", torch.tensor([NAN, INF, -INF, 2.2]), values, "").relative_l2 == pytest.approx(0.1)


def test_integers_count_the_share_that_differs():
    error = compare("y", torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 3, 4]), "")
    assert (error.relative_l2, error.cosine, error.top1_agreement) == (0.25, 0.75, None)
    assert compare("y", torch.tensor([True, False]), torch.tensor([True, True]), "").relative_l2 == 0.5


def test_answers_to_nothing_are_equal():
    for dtype in (torch.float32, torch.int64):
        empty = torch.zeros(0, 3, dtype=dtype)
        assert compare("y", empty, empty, "").relative_l2 == 0


def test_a_reference_of_zeros():
    assert compare("y", torch.zeros(2, 2), torch.zeros(2, 2), "").relative_l2 == 0
    error = compare("y", torch.ones(2, 2), torch.zeros(2, 2), "")
    assert (error.relative_l2, error.cosine) == (INCOMPARABLE, 0.0)


def test_top1_is_the_share_of_rows_with_the_same_largest_element():
    flipped = logits(4)
    flipped[0] = -flipped[0]
    assert compare("y", flipped, logits(4), "").top1_agreement == 0.75
    assert compare("y", logits()[:, :1], logits()[:, :1], "").top1_agreement is None


def test_worst_row():
    out = logits()
    out[4] *= 1.5
    assert worst_row(out, logits()) == (4, pytest.approx(0.5, rel=1e-5))
    assert worst_row(logits()[:, 0], logits()[:, 0]) == (0, 0.0)


def test_a_row_of_almost_nothing_is_measured_against_the_others():
    ref = torch.ones(4, 8)
    ref[1] = 1e-6
    out = ref.clone()
    out[1] = 2e-6
    assert worst_row(out, ref)[1] < 1e-4


def test_an_infinity_hides_no_other_row():
    ref = logits()
    ref[0, 0] = -INF
    out = ref.clone()
    out[4] *= 1.5
    assert worst_row(out, ref) == (4, pytest.approx(0.5, rel=1e-5))


@pytest.mark.parametrize("ref", [torch.tensor(1.0), torch.zeros(0, 3), torch.tensor([1, 2])])
def test_what_has_no_rows_of_floats_has_no_worst_row(ref):
    assert worst_row(ref.clone(), ref) == (0, 0.0)


def test_only_clear_rows_flip():
    ref = torch.tensor([[10.0, 1.0, 0.0], [10.0, 9.999, 0.0]])
    out = ref.flip(1)
    assert decisive_flips(out, ref, 1e-3) == 1
    assert decisive_flips(ref.clone(), ref, 1e-3) == 0
    assert decisive_flips(out[:1], ref, 1e-3) == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((4, 2), torch.float32, True),
        ((4, 1), torch.float32, False),
        ((4, 2, 2), torch.float32, False),
        ((4, 2), torch.int64, False),
    ],
)
def test_what_looks_like_logits(shape, dtype, expected):
    assert looks_like_logits(torch.zeros(shape, dtype=dtype)) is expected


def test_the_rounding_error_is_that_of_the_worst_output():
    exact = {name: logits().double() / 3 for name in "yz"}
    single = {"y": exact["y"].float(), "z": (exact["z"] * 1.01).float()}
    assert rounding_error(single, exact, "B1") == pytest.approx(0.01, rel=1e-4)
    assert 0 < rounding_error({**single, "z": single["y"]}, exact, "B1") < 1e-7


@pytest.mark.parametrize(
    ("single", "exact"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3)),
        (torch.full((4, 3), NAN), torch.full((4, 3), NAN)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.tensor([INF, 1.0]), torch.tensor([1e300, 1.0], dtype=torch.float64)),
    ],
)
def test_without_a_number_to_compare_there_is_no_rounding_error(single, exact):
    assert rounding_error({"y": single}, {"y": exact.double()}, "B1") is None
    sound = logits()
    assert rounding_error({"y": single, "z": sound}, {"y": exact.double(), "z": sound.double()}, "B1") == 0.0
