"""Limits on device memory: read from text, refused where they make no sense."""

from __future__ import annotations

import pytest

from onecard import host
from onecard.device_memory import (
    check_device_memory,
    device_memory,
    limit_device_memory,
    parse_device_memory,
)
from onecard.errors import UsageError


@pytest.mark.parametrize(("text", "nbytes"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 gib", 3 << 29)])
def test_sizes_are_read(text, nbytes):
    assert parse_device_memory(text) == nbytes


@pytest.mark.parametrize("text", ["8GBs", "8 gigs", "", "-4GiB", "0", "0GiB", "nan", "GiB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="such as 500MB or 2GiB"):
        parse_device_memory(text)


def test_a_number_without_its_unit_is_most_likely_a_mistake():
    with pytest.raises(UsageError, match="8GiB"):
        parse_device_memory("8")


def test_a_limit_above_the_machine_is_refused():
    total = device_memory("cpu")
    assert total == host.usable_memory()
    check_device_memory(total, "cpu")
    with pytest.raises(UsageError, match="more than cpu has") as refused:
        check_device_memory(total + 1, "cpu")
    assert "--no-measure" in refused.value.cure


def test_a_cpu_is_not_limited_from_within_but_nonsense_is_refused():
    limit_device_memory("cpu", 1 << 30)
    with pytest.raises(UsageError, match="leaves nothing"):
        limit_device_memory("cpu", 0)
