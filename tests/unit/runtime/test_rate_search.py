"""Candidates and bisection: which settings are tried, and that the rate found is just below one that fails."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.runtime.rate_search import TOLERANCE, candidates, highest_rate
from onecard.tuning import LoadPoint


def point(batch: int, ms: float, lanes: int = 1) -> LoadPoint:
    """A batch that each lane answers one of every ``ms``."""
    return LoadPoint(batch, lanes, 1e3 * batch * lanes / ms, ms, ms, 100)


CURVE = [point(1, 1.0), point(2, 1.1), point(4, 1.4), point(8, 2.0), point(16, 3.2), point(32, 5.6), point(64, 10.4)]


def tried(limit_ms: float, rows: int = 1, points: list[LoadPoint] = CURVE) -> list[tuple[int, float]]:
    return [(c.batch, c.max_delay_ms) for c in candidates(points, limit_ms, rows)]


def test_none_fits():
    assert tried(0.9) == []


def test_the_three_fastest_that_fit_those_with_room_first():
    # Batches of 16 and 32 take 3.2 and 5.6 ms: they fit, but not beside the one that runs when a request comes.
    assert tried(6.0) == [(8, 0.0), (8, 1.0), (4, 0.0), (4, 1.6), (2, 0.0), (2, 1.9), (16, 0.0)]
    assert tried(100.0)[:2] == [(64, 0.0), (64, 39.6)]


def test_a_batch_that_a_smaller_one_outruns_is_not_tried():
    assert tried(100.0, points=[point(1, 1.0), point(2, 2.5), point(4, 3.0)]) == [(4, 0.0), (4, 47.0), (1, 0.0)]


def test_a_delay_only_where_there_is_something_to_wait_for():
    assert tried(100.0, rows=64) == [(64, 0.0)]
    assert tried(2.3) == [(2, 0.0), (1, 0.0), (4, 0.0)], "0.05 ms is none"


def test_requests_are_not_cut_up_where_that_can_be_helped():
    assert {batch for batch, _ in tried(12.0, rows=16)} == {16, 32, 64}
    assert {batch for batch, _ in tried(6.0, rows=16)} == {16}
    assert {batch for batch, _ in tried(2.5, rows=16)} == {1, 2, 4}, "none is as large"


def test_each_number_of_lanes_has_its_own():
    both = candidates([*CURVE, *(point(p.batch, p.service_ms * 1.2, 2) for p in CURVE)], 100.0)
    assert {c.lanes for c in both} == {1, 2}
    assert both[0].lanes == 2  # the higher ceiling
    assert both[0].ceiling == pytest.approx(1e3 * 2 * 64 / (1.2 * 10.4))
    assert both[0].service_ms == pytest.approx(1.2 * 10.4)


def test_points_without_figures_are_not_tried():
    assert tried(100.0, points=[LoadPoint(4, 1, failed="out of memory"), point(1, 1.0)]) == [(1, 0.0)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(st.floats(1.0, 1e6), st.floats(0.07, 0.94))
def test_the_rate_found_is_kept_and_a_tolerance_more_is_not(ceiling, share):
    asked = []

    def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= ceiling * share

    found = highest_rate(holds, ceiling)
    assert found in asked
    assert found <= ceiling * share <= found * (1 + TOLERANCE) * (1 + 1e-9)
    assert len(asked) <= 10
    assert max(asked) < ceiling


def test_a_rate_near_the_ceiling():
    found = highest_rate(lambda rate: True, 100.0)
    assert 100 / (1 + TOLERANCE) <= found < 100


def test_nothing_is_kept():
    asked = []
    assert highest_rate(lambda rate: bool(asked.append(rate)), 100.0) == 0.0
    assert len(asked) == 5


def test_another_setting_is_to_be_beaten():
    asked = []

    def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= 70

    assert highest_rate(holds, 100.0, beat=80.0) == 0.0
    assert asked == [pytest.approx(84.0)]
    assert highest_rate(holds, 100.0, beat=99.0) == 0.0, "its ceiling is not worth a try"
    assert len(asked) == 1
    assert highest_rate(holds, 100.0, beat=60.0) == pytest.approx(68, abs=3)


def test_what_trying_raises_ends_the_search():
    def holds(rate: float) -> bool:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        highest_rate(holds, 100.0)
