"""Evidence is raw numbers: what is derived is right, and nothing is lost on the way through a file."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.evidence import (
    INCOMPARABLE,
    Candidate,
    Evidence,
    Measurement,
    Metric,
    OutputError,
    Timing,
    Verdict,
    quantile,
    to_json,
)
from onecard.recipe import ORIGINAL, Recipe
from tests.unit.report.evidence_sample import B1, B8, INDUCTOR_BF16, sample

FLOATS = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(FLOATS, min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_numpys(samples, q):
    assert quantile(samples, q) == pytest.approx(float(np.quantile(samples, q)), rel=1e-9, abs=1e-6)


def test_quantile_of_nothing_is_nan():
    assert math.isnan(quantile([], 0.5))


def test_evidence_survives_json():
    evidence = sample()
    assert msgspec.json.decode(to_json(evidence), type=Evidence) == evidence


def test_incomparable_errors_survive_json():
    error = OutputError("logits", INCOMPARABLE, -1.0, INCOMPARABLE, None, "B1")
    candidate = Candidate(Recipe("openvino"), Verdict("wrong", "NaN"), errors=(error,))
    evidence = msgspec.structs.replace(sample(), candidates=(candidate,))
    found = msgspec.json.decode(to_json(evidence), type=Evidence)
    assert found == evidence
    assert found.candidates[0].worst_error == INCOMPARABLE


def test_unknown_reasons_are_refused():
    with pytest.raises(msgspec.ValidationError, match="reason"):
        msgspec.json.decode(b'{"reason": "great"}', type=Verdict)


def test_timing_derives_its_figures():
    timing = Timing({"B": 4}, tuple(map(float, range(1, 102))), (10.0, 20.0, 30.0), rows=4)
    assert (timing.label, timing.median_ms, timing.p99_ms, timing.iqr_ms) == ("B4", 51.0, 100.0, 50.0)
    assert timing.throughput == 1000 * 4 / 20.0


def test_throughput_without_blocks_is_that_of_single_calls():
    assert Timing({}, (2.0,)).throughput == 500.0


def test_peak_is_the_devices_where_it_was_used():
    assert Measurement(peak_device_bytes=5, peak_process_bytes=9).peak_bytes == 5
    assert Measurement(peak_process_bytes=9).peak_bytes == 9


def test_metric_drop():
    assert Metric("top-1", 0.70, 0.75, 100).drop == pytest.approx(0.05)


def test_worst_error_is_nan_where_nothing_was_compared():
    assert math.isnan(Candidate(ORIGINAL, Verdict("ok")).worst_error)


def test_the_play_offs_timing_comes_before_the_candidates_own():
    evidence = sample()
    assert evidence.timing(INDUCTOR_BF16.id, B8) is evidence.playoff[INDUCTOR_BF16.id][1]
    absent = next(c for c in evidence.candidates if c.verdict.ok and c.id not in evidence.playoff)
    assert evidence.timing(absent.id, B1) is absent.measurement.timings[0]
    assert evidence.timing(absent.id, {"B": 3}) is None
    assert evidence.timing("nothing", B1) is None
