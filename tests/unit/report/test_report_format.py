import math

import pytest

from onecard.report import format as fmt


@pytest.mark.parametrize(
    ("ms", "shown"),
    [
        (0.43, "430 µs"),
        (4.1, "4.10 ms"),
        (25.44, "25.4 ms"),
        (250.2, "250 ms"),
        (11000, "11.0 s"),
        (math.nan, "\u2013"),
    ],
)
def test_a_latency_has_three_digits_and_its_unit(ms, shown):
    assert fmt.duration_ms(ms) == shown


@pytest.mark.parametrize(
    ("error", "shown"), [(0.0, "0"), (0.0031, "0.31 %"), (2.1e-7, "2.1e-7"), (math.inf, "∞"), (math.nan, "\u2013")]
)
def test_a_small_error_is_a_power_of_ten_and_a_large_one_percent(error, shown):
    assert fmt.relative_error(error) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.41, "0.4 s"), (12, "12 s"), (200, "3 min 20 s"), (3840, "1 h 04 min")]
)
def test_a_wait_is_said_as_people_say_it(seconds, shown):
    assert fmt.duration_s(seconds) == shown


def test_agreement_is_never_rounded_up_to_all():
    assert fmt.agreement(0.9999) == "99.9 %"
    assert fmt.agreement(1.0) == "100.0 %"


def test_a_column_has_one_number_of_decimals():
    assert fmt.column_decimals([4.1, 25.4, math.nan]) == 2
    assert fmt.column_decimals([]) == 0
    assert fmt.fixed(25.4, 2) == "25.40"


def test_sizes_and_counts():
    assert fmt.bytes_(97.8 * 2**20) == "97.8 MiB"
    assert fmt.bytes_(12) == "12 B"
    assert fmt.mib(0) == "\u2013"
    assert fmt.count(25_557_032) == "25.6 M"
    assert fmt.count(9410.2) == "9,410"
    assert fmt.sizes({}) == "fixed shape"


def test_terminal_escapes_and_direction_marks_are_taken_out():
    assert fmt.clean("a\x1b[31mb\x1b[0m\x07\u202ec\x00\x9b") == "abc"
    assert fmt.tail("\n".join(map(str, range(100))), lines=2) == "98\n99"


def test_a_long_name_is_cut_in_its_middle():
    assert fmt.shorten("abcdefghij", 10) == "abcdefghij"
    assert len(fmt.shorten("abcdefghijk", 10)) == 10
    assert fmt.shorten("abcdefghijk", 10).endswith("ijk")
