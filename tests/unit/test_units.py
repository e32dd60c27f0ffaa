"""Durations and sizes as people write them."""

import pytest

from onecard.errors import UsageError
from onecard.units import parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5us", 5e-6),
        ("5µs", 5e-6),
        ("5ms", 0.005),
        ("90s", 90),
        ("90", 90),
        (" 1.5 m ", 90),
        ("10min", 600),
        ("1H", 3600),
        ("30d", 2_592_000),
        ("2w", 1_209_600),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("7B", 7),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("1kb", 1000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "s", "-5s", "0", "0.0s", "5 parsecs", "5 GiB", "1e3", "nan", "inf", "9" * 400, f"{'9' * 308}h"]
)
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match="is not a duration such as 5ms"):
        parse_duration(text)


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1MB", "0", "5ms", "5 g", "1e3", "9" * 400, f"{'9' * 300}TiB", "9000000TiB"]
)
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size such as 500MB"):
        parse_size(text)
