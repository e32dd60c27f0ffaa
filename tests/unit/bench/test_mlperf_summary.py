"""LoadGen's summaries, as its version 6.0.17 wrote them, read back; and what is advised where it says INVALID."""

from __future__ import annotations

import pytest

from onecard.bench.mlperf_job import MlperfSettings
from onecard.bench.mlperf_summary import advise, parse_summary, read_summary
from onecard.errors import EngineError, UsageError

SINGLE = """\
================================================
MLPerf Results Summary
================================================
SUT name : PySUT
Scenario : SingleStream
Mode     : PerformanceOnly
90.0th percentile latency (ns) : 2192129
Result is : VALID
  Min duration satisfied : Yes
  Min queries satisfied : Yes
  Early stopping satisfied: Yes
Early Stopping Result:
 * Processed at least 64 queries (198).
 * Would discard 9 highest latency queries.
 * Early stopping 90.0th percentile estimate: 2295172
 * Not enough queries processed for 99.0th percentile
 early stopping estimate (would need to process at
 least 662 total queries).

================================================
Additional Stats
================================================
QPS w/ loadgen overhead         : 392.33
QPS w/o loadgen overhead        : 395.19

Min latency (ns)                : 2093897
Max latency (ns)                : 34525477
Mean latency (ns)               : 2530433
50.00 percentile latency (ns)   : 2130515
99.90 percentile latency (ns)   : 34525477

================================================
Test Parameters Used
================================================
samples_per_query : 1
target_qps : 1000
min_duration (ms): 500

No warnings encountered during test.

No errors encountered during test.
"""
SERVER = """\
================================================
MLPerf Results Summary
================================================
SUT name : PySUT
Scenario : Server
Mode     : PerformanceOnly
Completed samples per second    : 101.02
Result is : INVALID
  Performance constraints satisfied : NO
  Min duration satisfied : Yes
  Min queries satisfied : Yes
  Early stopping satisfied: NO
Recommendations:
 * Reduce target QPS to improve latency.
Early Stopping Result:
 * Run unsuccessful.
 * Processed 54 queries.
 * Would need to run at least 7307 more queries,
 with the run being successful if every additional
 query were under latency.

================================================
Additional Stats
================================================
Scheduled samples per second : 101.50
Min latency (ns)                : 2161024

2 warnings encountered. See detailed log.

1 ERROR encountered. See detailed log.
"""
OFFLINE = """\
Samples per second: 20305.3
Result is : INVALID
  Min duration satisfied : NO
  Min queries satisfied : Yes
  Early stopping satisfied: Yes
Recommendations:
 * Increase expected QPS so the loadgen pre-generates a larger (coalesced) query.

================================================
Test Parameters Used
================================================
target_qps : 100
"""
BOUND = MlperfSettings("Server", qps=100, latency_s=0.001)


def test_a_valid_run_is_read():
    found = parse_summary(SINGLE)
    assert found.valid is True
    assert found.unmet == ()
    assert found.latency_percentile == pytest.approx(0.9)
    assert found.latency_ns == {
        "result": 2192129,
        "min": 2093897,
        "max": 34525477,
        "mean": 2530433,
        "p50": 2130515,
        "p99.9": 34525477,
    }
    assert found.parameters["target_qps"] == "1000"
    assert found.samples_per_s is None
    assert (found.warnings, found.errors) == (0, 0)
    assert found.remarks[0] == "Processed at least 64 queries (198)."
    assert found.remarks[-1].endswith("(would need to process at least 662 total queries).")
    assert advise(found, MlperfSettings("SingleStream")) == []


def test_an_invalid_run_says_what_was_not_met():
    found = parse_summary(SERVER)
    assert found.valid is False
    assert found.unmet == ("Performance constraints", "Early stopping")
    assert found.samples_per_s == 101.02
    assert (found.warnings, found.errors) == (2, 1)
    assert "Reduce target QPS to improve latency." in found.remarks
    assert advise(found, BOUND) == [
        "latency bound missed, the p99 is above 1 ms: lower --qps (now 100), or allow more with --latency."
    ]


def test_advice_on_a_run_that_was_too_short():
    found = parse_summary(OFFLINE)
    (line,) = advise(found, MlperfSettings("Offline", min_duration_s=0.5))
    assert line.startswith("min duration of 0.5 s not met")
    assert "more than 2.031e+04 samples/s with --qps" in line
    early = parse_summary(SERVER.replace("constraints satisfied : NO", "constraints satisfied : Yes"))
    assert advise(early, BOUND) == [
        "too few queries to be sure of the percentile, LoadGen wants at least 7307 more: "
        "raise --min-duration or --min-queries."
    ]
    streams = SINGLE.replace("VALID", "INVALID").replace("duration satisfied : Yes", "duration satisfied : NO")
    (line,) = advise(parse_summary(streams), MlperfSettings("SingleStream", latency_s=0.001))
    assert "expect less than 1 ms with --latency" in line


def test_a_condition_nobody_knows_yet_is_not_lost():
    found = parse_summary(SERVER.replace("Min queries satisfied : Yes", "Phase of the moon satisfied : NO"))
    assert "Phase of the moon: not satisfied; see the summary." in advise(found, BOUND)


def test_without_a_verdict_there_is_no_result(tmp_path):
    settings = MlperfSettings("SingleStream")
    with pytest.raises(EngineError, match="cannot be read"):
        read_summary(tmp_path, settings)
    (tmp_path / "mlperf_log_summary.txt").write_text(SINGLE[: SINGLE.index("Result is")])
    with pytest.raises(EngineError, match="neither VALID nor INVALID"):
        read_summary(tmp_path, settings)
    assert read_summary(tmp_path, MlperfSettings("SingleStream", "accuracy")).valid is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scenario": "Serving"}, "unknown scenario 'Serving': expected one of SingleStream"),
        ({"scenario": "Offline", "mode": "peak"}, "unknown mode 'peak'"),
        ({"scenario": "Server", "qps": 10}, "needs a rate and a bound"),
        ({"scenario": "Server", "latency_s": 0.1}, "needs a rate and a bound"),
        ({"scenario": "SingleStream", "qps": 10}, "has no --qps"),
        ({"scenario": "Offline", "latency_s": 0.1}, "has no --latency"),
        ({"scenario": "Offline", "qps": float("nan")}, "qps is nan"),
        ({"scenario": "Offline", "min_queries": 0}, "min_queries is 0"),
        ({"scenario": "SingleStream", "percentile": 99.0}, "between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        MlperfSettings(**arguments)
