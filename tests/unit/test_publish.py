"""What a variant is held to wherever its bundle is loaded."""

from __future__ import annotations

import pytest

from onecard.evidence import INCOMPARABLE, Candidate, Measurement, Metric, OutputError, Verdict
from onecard.publish import _allowed
from onecard.recipe import Recipe
from onecard.verify.compare import THRESHOLDS

METRIC = Metric("accuracy", 1.0, 1.0, 20)


def candidate(error: float, metric: Metric | None) -> Candidate:
    errors = (OutputError("y", error, 1.0, error, None, "B1"), OutputError("z", 0.0, 1.0, 0.0, None, "B1"))
    return Candidate(Recipe("eager", transforms=("pruned",)), Verdict("ok"), Measurement(), errors, metric)


@pytest.mark.parametrize(("error", "metric"), [(0.2, METRIC), (0.5, None), (INCOMPARABLE, METRIC)])
def test_the_precisions_limit_where_it_is_enough(error, metric):
    assert _allowed(candidate(error, metric), THRESHOLDS) == THRESHOLDS["pruned"]


def test_what_passed_on_its_metric_passes_its_own_self_test():
    allowed = _allowed(candidate(0.5, METRIC), THRESHOLDS)
    assert allowed.relative_l2 == pytest.approx(0.6)
    assert allowed.cosine < THRESHOLDS["pruned"].cosine
