"""Histograms count what they are told, and their copies add, subtract and tell quantiles as Prometheus does."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.errors import DataError
from onecard.telemetry.histogram import DIFFERENCES, ROWS, SECONDS, Distribution, Histogram

SECONDS_VALUES = st.lists(st.floats(1e-7, 1e3), max_size=50)


def of(values: list[float], bounds: tuple[float, ...] = SECONDS) -> Distribution:
    histogram = Histogram(bounds)
    histogram.observe_many(values)
    return histogram.copy()


def test_the_bounds_are_what_people_choose_as_limits():
    assert SECONDS[0] == 50e-6
    assert SECONDS[-1] == 60.0
    assert {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0} <= set(SECONDS)
    assert max(b / a for a, b in itertools.pairwise(SECONDS)) < 1.7
    for bounds in (SECONDS, ROWS, DIFFERENCES):
        assert list(bounds) == sorted(set(bounds))


def test_a_value_counts_in_the_bucket_whose_bound_it_is():
    found = of([1.0, 1.5, 2.0, 2.1, 99.0], (1.0, 2.0, 3.0))
    assert found.counts == (1, 2, 1, 1)
    assert found.sum == pytest.approx(105.6)
    assert found.count == 5
    assert found.mean == pytest.approx(21.12)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(SECONDS_VALUES)
def test_one_by_one_or_all_at_once_is_the_same(values):
    one = Histogram()
    for value in values:
        one.observe(value)
    assert one.copy().counts == of(values).counts
    assert one.copy().sum == pytest.approx(of(values).sum)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(SECONDS_VALUES, SECONDS_VALUES)
def test_parts_add_up_and_are_taken_apart_again(first, second):
    both = of(first + second)
    added = of(first).plus(of(second))
    assert added.counts == both.counts
    assert added.sum == pytest.approx(both.sum)
    assert both.minus(of(first)).counts == of(second).counts
    assert of(first).plus(Distribution()) == Distribution().plus(of(first)) == of(first)


def test_a_copy_does_not_change_with_what_comes_later():
    histogram = Histogram()
    before = histogram.copy()
    histogram.observe(0.1)
    assert before.count == 0
    assert histogram.copy().count == 1


def test_a_histogram_that_began_anew_is_all_new():
    assert of([1.0]).minus(of([1.0, 2.0])) == of([1.0])


def test_other_bounds_are_refused():
    for combine in (Distribution.plus, Distribution.minus):
        with pytest.raises(DataError, match="bounds"):
            combine(of([1.0]), of([1.0], ROWS))


def test_quantiles_lie_in_the_right_bucket():
    random.seed(1)
    values = [random.lognormvariate(-5, 1) for _ in range(20_000)]
    found = of(values)
    cuts = statistics.quantiles(values, n=100)
    for percent in (1, 10, 50, 90, 99):
        assert found.quantile(percent / 100) == pytest.approx(cuts[percent - 1], rel=0.1)


def test_quantiles_at_the_ends():
    assert math.isnan(of([]).quantile(0.5))
    assert math.isnan(Distribution().quantile(0.5))
    assert math.isnan(Distribution().mean)
    assert of([1e6]).quantile(0.5) == 60.0  # above all bounds: at least this
    assert of([1.5, 1.5], (1.0, 2.0)).quantile(0.5) == 1.5  # in the middle of its bucket
    assert of([0.5], (1.0, 2.0)).quantile(1.0) == 1.0


def test_it_travels_as_json():
    sent = of([0.1, 0.2])
    assert msgspec.json.decode(msgspec.json.encode(sent), type=Distribution) == sent
    assert set(msgspec.json.decode(msgspec.json.encode(sent))) == {"bounds", "counts", "sum"}
