"""The knee follows from the curve by its rule alone."""

from __future__ import annotations

import pytest

from onecard.runtime.knee import growth_per_doubling, knee
from onecard.tuning import LoadPoint


def curve(rates: dict[int, float], lanes: int = 1) -> list[LoadPoint]:
    return [LoadPoint(batch, lanes, rate, 1.0, 1.0, 100) for batch, rate in rates.items()]


def affine(fixed: float, per_row: float, batches: tuple[int, ...]) -> dict[int, float]:
    """Rows a second of a model that takes ``fixed + per_row * batch`` seconds."""
    return {batch: batch / (fixed + per_row * batch) for batch in batches}


def found(points: list[LoadPoint]) -> tuple[int, int]:
    point = knee(points)
    assert point is not None
    return point.batch, point.lanes


POWERS = tuple(1 << n for n in range(10))


def test_a_model_with_a_fixed_cost():
    # From b to 2 b the rate grows by (f + r b) / (f / 2 + r b) - 1, which is below 10 % from b = 4 f / r on: 200.
    assert found(curve(affine(1e-3, 2e-5, POWERS))) == (256, 1)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 100.0}, 1),
        ({1: 100.0, 2: 100.0, 4: 100.0}, 1),
        ({1: 100.0, 2: 200.0, 4: 400.0}, 4),
        ({1: 100.0, 2: 200.0, 4: 150.0, 8: 300.0, 16: 310.0}, 8),  # a dip is no end
        ({1: 100.0, 2: 109.0, 4: 118.0}, 1),
        ({1: 100.0, 2: 109.0, 4: 125.0}, 4),  # 9 % and then 15 %: 11.8 % a doubling over both
        ({1: 100.0, 8: 130.0}, 1),  # three doublings, 9.1 % each
        ({1: 100.0, 8: 140.0}, 8),
        ({8: 90.0, 1: 100.0}, 1),
    ],
)
def test_the_rule(rates, expected):
    batch, _ = found(curve(rates))
    assert batch == expected


def test_growth_is_counted_per_doubling():
    small, large = curve({3: 100.0, 12: 144.0})
    assert growth_per_doubling(small, large) == pytest.approx(0.2)


def test_points_that_failed_are_passed_over():
    assert found([*curve({1: 100.0, 2: 150.0}), LoadPoint(4, 1, failed="out of memory")]) == (2, 1)
    assert knee([LoadPoint(4, 1, failed="out of memory")]) is None
    assert knee([]) is None


def test_more_lanes_must_be_worth_it():
    one = curve({1: 100.0, 2: 150.0})
    assert found([*one, *curve({1: 120.0, 2: 160.0}, lanes=2)]) == (2, 1)
    assert found([*one, *curve({1: 165.0, 2: 170.0}, lanes=2)]) == (1, 2)
