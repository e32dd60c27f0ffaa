"""The largest batch on straight lines between what is known."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.memory.largest import largest_under, need_at


def test_one_point_means_growth_in_proportion():
    assert need_at({4: 400}, 8) == 800


def test_between_and_beyond_the_points_the_need_is_linear():
    points = {1: 100, 3: 200, 5: 600}
    assert [need_at(points, batch) for batch in (1, 2, 3, 4, 5, 6)] == [100, 150, 200, 400, 600, 800]


def test_noise_does_not_turn_growth_around():
    assert need_at({1: 120, 8: 100}, 64) == 100


@pytest.mark.parametrize(("limit", "expected"), [(49, 0), (100, 1), (149, 1), (150, 2), (100_000, 64)])
def test_the_largest_under_a_limit(limit, expected):
    assert largest_under({1: 100, 3: 200}, limit, 1, 64) == expected


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(st.integers(0, 1000), st.integers(1, 100), st.integers(0, 12_000), st.integers(1, 128))
def test_it_is_the_largest(fixed, each, limit, high):
    points = {1: fixed + each, 2: fixed + 2 * each}
    found = largest_under(points, limit, 1, high)
    assert found == 0 or fixed + found * each <= limit
    assert found == high or fixed + (found + 1) * each > limit
