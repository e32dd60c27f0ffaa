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
