"""What is said of one output, in the words of the gate."""

from __future__ import annotations

import pytest
import torch

from onecard.verify.compare import THRESHOLDS, compare
from onecard.verify.judge import Rule, problem

torch.manual_seed(0)
REF = torch.randn(8, 5)
REF[3] = torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0])


def put(row: int, column: int, value: float) -> torch.Tensor:
    out = REF.clone()
    out[row, column] = value
    return out


def judged(out: torch.Tensor, precision: str = "fp32", **rule: bool) -> str:
    held_to = Rule(THRESHOLDS[precision], rule.get("batched", True), rule.get("only_sane", False))
    return problem(out, REF, compare("y", out, REF, "a case"), held_to, "output 'y'")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (REF, ""),
        (REF * 1.0005, ""),
        (REF[:, :4], "output 'y' has shape [8, 4], expected [8, 5]"),
        (put(0, 0, float("inf")), "output 'y' has NaN or infinity where the original has none, or the reverse"),
        (REF * 1.05, "output 'y': relative error 5.00e-02 exceeds 1e-03"),
    ],
)
def test_the_first_thing_that_is_wrong_is_said(out, said):
    assert judged(out) == said


def test_one_row_of_many_may_not_be_off_by_far_more_than_the_whole():
    small = int(REF.norm(dim=1).argmin())
    off = REF.clone()
    off[small] *= 1.006
    assert judged(off).startswith(f"output 'y': row {small} has relative error")
    assert judged(off, batched=False) == ""


def test_a_clear_answer_may_not_become_another_one():
    flipped = put(3, 1, 5.1)
    assert "relative error" in judged(flipped, "fp8")
    assert judged(flipped, "fp8", only_sane=True) == ""
    large = REF.clone()
    large[0] *= 100  # beside which row 3 counts for little
    out = large.clone()
    out[3, 1] = 5.2
    rule = Rule(THRESHOLDS["fp8"], batched=False)
    said = problem(out, large, compare("y", out, large, "a case"), rule, "it")
    assert said == "it: 1 rows have another largest element where the original was clear"


def test_where_a_metric_decides_shape_and_finiteness_are_still_asked_for():
    assert judged(-REF, only_sane=True) == ""
    assert "has shape" in judged(REF[:7], only_sane=True)
    assert "NaN" in judged(put(1, 1, float("nan")), only_sane=True)


def said_of(out: torch.Tensor, ref: torch.Tensor, precision: str) -> str:
    return problem(out, ref, compare("y", out, ref, "a case"), Rule(THRESHOLDS[precision], batched=True), "it")


@pytest.mark.parametrize("filling", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_a_masks_filling_hides_nothing(filling):
    ref, right, wrong = REF.clone(), REF * 1.0001, torch.randn(8, 5)
    for each in (ref, right, wrong):
        each[:, 0] = filling
    unmasked = right.clone()
    unmasked[2, 0] = 0.0
    assert said_of(right, ref, "fp32") == ""
    assert "relative error" in said_of(wrong, ref, "fp16")
    assert "relative error" in said_of(unmasked, ref, "fp16")


def boxes_and_scores() -> torch.Tensor:
    """Coordinates in pixels and the scores of 80 classes, few of which are there: [3, 84, 8400]."""
    boxes, scores = torch.rand(3, 4, 8400) * 640, torch.rand(3, 80, 8400) ** 200
    return torch.cat([boxes, scores], 1)


def test_large_numbers_hide_no_lost_scores():
    ref = boxes_and_scores()
    lost = ref.clone()
    lost[:, 4:] = 0
    assert "along dimension 1" in said_of(lost, ref, "fp32")
    swapped = torch.cat([ref[:, :4], ref[:, 4:].flip(0)], 1)
    assert "though the whole is near" in said_of(swapped, ref, "fp32")
    assert said_of(ref.half().float(), ref, "fp16") == ""
    assert said_of(ref.bfloat16().float(), ref, "bf16") == ""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_long_sequence_hides_no_lost_token(precision):
    ref = torch.randn(2, 6000, 64)
    lost = ref.clone()
    lost[:, -1] = torch.randn(2, 64)
    assert "part 5999 along dimension 1" in said_of(lost, ref, precision)


def test_parts_that_are_next_to_nothing_are_let_be():
    ref = torch.randn(4, 32, 64)
    ref[:, 7] *= 1e-9  # a channel that is noise in any precision
    noisy = ref + 1e-4 * torch.randn(ref.shape)
    assert said_of(noisy, ref, "fp32") == ""
    ref[:, 1:] = 0.0  # and one that alone is there
    assert said_of(ref + 1e-6 * torch.randn(ref.shape), ref, "fp32") == ""


def test_a_rare_truth_is_not_lost_among_many():
    ref = torch.zeros(3, 100_000, dtype=torch.bool)
    ref[:, :30] = True
    near = ref.clone()
    near[:, :5] = False
    assert said_of(near, ref, "fp16") == ""
    assert (
        said_of(torch.zeros_like(ref), ref, "fp16") == "it: 90 elements are wrong, which is most of the rarer answer's"
    )
