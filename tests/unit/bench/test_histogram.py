"""The histogram: three digits everywhere, and HdrHistogram's own bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onecard.bench.histogram import Histogram
from onecard.errors import DataError

# Written by HdrHistogram_py 0.10.8: HdrHistogram(1, 3_600_000_000_000, 3) with 1000, 1000, 2_500_000, 7_000_000_000.
FOREIGN = "HISTFAAAAC14nJNpmSzMwMDAzQABzFCaEch0M9ixgMH+A0TgPD/L1s2MTH+3MTIBAJmsCFk="


def test_every_value_is_kept_to_three_digits():
    values = np.concatenate([np.arange(2000, 2100) * 1e-9, [0.0, 1e-9], np.logspace(-8, math.log10(3600), 200)])
    for value in values:
        found = Histogram(np.array([value, 3600.0])).percentile_s(50)
        assert found >= round(value * 1e9) / 1e9 * (1 - 1e-12)
        assert found <= value * 1.001 + 1e-9


def test_percentiles_are_those_of_the_samples():
    samples = np.random.default_rng(1).lognormal(-6, 1.5, 20_001)
    histogram = Histogram(samples[:7])
    histogram.add(samples[7:])
    ordered = np.sort(samples)
    for percentile in (0.01, 1, 50, 90, 99, 99.9, 99.99, 100):
        rank = max(1, math.ceil(percentile / 100 * len(ordered) - 1e-9))
        assert histogram.percentile_s(percentile) == pytest.approx(ordered[rank - 1], rel=1e-3)
    assert histogram.percentile_s(100) == ordered[-1]
    assert histogram.mean_s == pytest.approx(samples.mean())
    assert sum(count for _, count in histogram.buckets()) == histogram.total == len(samples)


def test_nothing_has_no_percentile():
    empty = Histogram()
    assert math.isnan(empty.percentile_s(99)) and math.isnan(empty.mean_s) and empty.total == 0
    assert Histogram.decode(empty.encode()).total == 0


def test_what_is_above_an_hour_counts_as_an_hour():
    assert Histogram(np.array([5000.0])).percentile_s(50) == pytest.approx(3600, rel=1e-3)


def test_hdr_histograms_own_bytes_are_read_and_written():
    known = np.array([1000, 1000, 2_500_000, 7_000_000_000]) / 1e9
    foreign, ours = Histogram.decode(FOREIGN), Histogram(known)
    assert [count for _, count in foreign.buckets()] == [2, 1, 1]
    assert [value for value, _ in foreign.buckets()] == pytest.approx([1e-6, 2.5e-3, 7.0], rel=1e-3)
    assert Histogram.decode(ours.encode()).encode() == ours.encode() == foreign.encode()


@pytest.mark.parametrize("text", ["", "xx", "HISTFAAAAC14nJNp", FOREIGN[:-8] + "AAAAAAA=", "é"])
def test_other_text_is_refused(text):
    with pytest.raises(DataError, match="no histogram"):
        Histogram.decode(text)
