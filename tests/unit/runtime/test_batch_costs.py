"""Predicted seconds: measured, between measurements, beyond them, and without any."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.runtime.cost import Costs

ROWS = [({"B": 1}, 1.0), ({"B": 4}, 2.0), ({"B": 8}, 6.0)]


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (4, 2.0), (2, 4 / 3), (6, 4.0), (8, 6.0), (16, 12.0)])
def test_measured_between_and_above(rows, seconds):
    assert Costs(("B",), "B", ROWS).seconds((rows,)) == pytest.approx(seconds)


def test_below_the_smallest_as_the_smallest():
    assert Costs(("B",), "B", ROWS[1:]).seconds((1,)) == 2.0


def test_the_order_of_names_in_a_size_does_not_matter():
    costs = Costs(("S", "B"), "B", [({"B": 2, "S": 16}, 3.0)])
    assert costs.key({"S": 16, "B": 2}) == costs.key({"B": 2, "S": 16}) == (16, 2)
    assert costs.split((16, 2)) == (2, (16,))
    assert costs.with_rows((16, 2), 5) == (16, 5)
    assert costs.seconds((16, 4)) == 6.0


def test_lengths_that_never_ran_take_the_dearer_neighbour_in_elements():
    costs = Costs(("B", "S"), "B", [({"B": 1, "S": 10}, 1.0), ({"B": 1, "S": 100}, 5.0)])
    assert costs.has_lengths((7, 10))
    assert not costs.has_lengths((7, 50))
    assert costs.seconds((1, 50)) == 5.0
    assert costs.seconds((1, 5)) == 1.0
    assert costs.seconds((4, 50)) == 10.0  # 200 elements: in proportion to 100


def test_without_a_batch_symbol():
    costs = Costs(("S",), None, [({"S": 10}, 1.0)])
    assert costs.split((10,)) == (1, (10,))
    assert costs.with_rows((10,), 3) == (10,)
    assert costs.seconds((20,)) == 2.0
    assert Costs(()).seconds(()) > 0


def test_measurements_are_averaged_and_a_hiccup_counts_little():
    costs = Costs(("B",), "B", [({"B": 1}, 1.0)])
    for _ in range(30):
        costs.observe({"B": 1}, 0.5)
    assert costs.seconds((1,)) == pytest.approx(0.5, rel=0.01)
    before = costs.version
    costs.observe({"B": 1}, 1000.0)
    assert costs.seconds((1,)) == pytest.approx(0.6, rel=0.01)
    assert costs.version > before
    for _ in range(60):
        costs.observe({"B": 1}, 1000.0)
    assert costs.seconds((1,)) > 900  # a change that stays is followed


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -1.0])
def test_what_is_no_time_is_passed_over(nonsense):
    costs = Costs(("B",), "B", ROWS)
    costs.observe({"B": 1}, nonsense)
    assert costs.seconds((1,)) == 1.0


def test_memory_is_bounded():
    costs = Costs(("B", "S"), "B")
    for length in range(1, 6001):
        costs.observe({"B": 1, "S": length}, 1.0)
        costs.observe({"B": 1, "S": 1}, 1.0)
    assert len(costs._known) == len(costs._elements) == sum(map(len, costs._curves.values())) <= 4096
    assert costs.has_lengths((1, 1)), "what is used stays"
    assert not costs.has_lengths((1, 2))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(st.dictionaries(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.floats(0, 10), max_size=12), st.data())
def test_any_prediction_is_above_zero_and_finite(measured, data):
    costs = Costs(("B", "S"), "B", [({"B": b, "S": s}, seconds) for (b, s), seconds in measured.items()])
    key = data.draw(st.tuples(st.integers(1, 99), st.integers(1, 99)))
    assert 0 < costs.seconds(key) < math.inf
