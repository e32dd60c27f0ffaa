"""What a bundle says of its variants: what they are held to wherever it is loaded, and the times they ranked by."""

from __future__ import annotations

import msgspec
import pytest

from onecard.evidence import INCOMPARABLE, Candidate, Measurement, Metric, OutputError, Verdict
from onecard.publish import _allowed, _manifest, kept_variants
from onecard.recipe import Recipe
from onecard.search.choose import Wishes, choose
from onecard.verify.cases import Case
from onecard.verify.compare import THRESHOLDS
from tests.unit.report.evidence_sample import sample, timing

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


def test_a_manifest_has_the_times_that_its_ranks_came_from(tmp_path):
    """In the play-off the two that were fastest before it come in the other order."""
    evidence = sample()
    first, second = evidence.ranks[0].variants[:2]
    assert {first, second} <= set(evidence.playoff)
    playoff = dict(evidence.playoff)
    for name, median in ((first, 9.0), (second, 0.01)):
        playoff[name] = tuple(timing(t.bucket, median, 1, first_call_ms=0.0) for t in playoff[name])
    evidence = msgspec.structs.replace(evidence, playoff=playoff)
    evidence = msgspec.structs.replace(evidence, ranks=choose(evidence, Wishes()).ranks, chosen=second)
    kept = kept_variants(evidence)
    manifest = _manifest(tmp_path, evidence, kept, THRESHOLDS, Case(evidence.buckets[0], 0, False))
    for rank in manifest.ranks:
        assert rank.variants[0] == second
        for name in rank.variants:
            written, own = manifest.variant(name).measurement, evidence.candidate(name).measurement
            (median,) = written.timing(rank.bucket).samples_ms
            assert median == pytest.approx(evidence.timing(name, rank.bucket).median_ms, abs=1e-5)
            assert written.timing(rank.bucket).first_call_ms == own.timing(rank.bucket).first_call_ms > 0
            assert (written.peak_bytes, written.size_bytes) == (own.peak_bytes, own.size_bytes)
