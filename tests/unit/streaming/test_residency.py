"""What stays on the device: within the budget always, as much as fits, evenly spread, and the smallest budget named."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.errors import DeviceMemoryError
from onecard.streaming.residency import Budget, Residency, aligned, plan_residency, text

EQUAL = [{f"w{i}": 1024} for i in range(20)]


@st.composite
def models(draw: st.DrawFn) -> list[dict[str, int]]:
    """Parts with weights of their own and some that several parts use."""
    shared = {f"s{i}": draw(st.integers(1, 5000)) for i in range(draw(st.integers(0, 3)))}
    parts = []
    for index in range(draw(st.integers(1, 12))):
        own = {f"p{index}.{i}": draw(st.integers(0, 5000)) for i in range(draw(st.integers(0, 3)))}
        parts.append(own | {name: size for name, size in shared.items() if draw(st.booleans())})
    return parts


def left_of(part: dict[str, int], plan: Residency) -> int:
    return sum(aligned(size) for name, size in part.items() if name not in plan.kept)


def everything(parts: list[dict[str, int]]) -> int:
    return sum({name: aligned(size) for part in parts for name, size in part.items()}.values())


@settings(max_examples=200, deadline=None)
@given(models(), st.integers(0, 60_000), st.integers(0, 2000), st.integers(1, 3))
def test_a_plan_keeps_to_its_budget_or_names_one_that_works(parts, device_bytes, activation_bytes, slots):
    budget = Budget(device_bytes, activation_bytes, slots)
    try:
        plan = plan_residency(parts, budget)
    except DeviceMemoryError as error:
        smallest = int(re.search(r"\((\d+) bytes\)", error.cure)[1])
        assert smallest > device_bytes
        assert plan_residency(parts, Budget(smallest, activation_bytes, slots)).device_bytes <= smallest
        with pytest.raises(DeviceMemoryError):
            plan_residency(parts, Budget(smallest - 1, activation_bytes, slots))
        return
    left = [left_of(part, plan) for part in parts]
    kept = {name: aligned(size) for part in parts for name, size in part.items() if name in plan.kept}
    assert plan.device_bytes <= device_bytes
    assert plan.kept_bytes == sum(kept.values())
    assert plan.streamed == tuple(i for i, size in enumerate(left) if size)
    assert plan.slot_bytes == max(left) and plan.pass_bytes == sum(left)
    assert plan.slots <= slots
    # Otherwise a slot would be copied into what it holds already.
    assert not plan.streamed or len(plan.streamed) > plan.slots > 0


def test_nothing_is_copied_where_all_fits():
    plan = plan_residency(EQUAL, Budget(20 * 1024 + 100, 100))
    assert (plan.streamed, plan.slots, plan.pass_bytes) == ((), 0, 0)
    assert plan.kept == {name for part in EQUAL for name in part}


def test_what_stays_lies_evenly_between_what_is_copied():
    plan = plan_residency(EQUAL, Budget(2 * 1024 + 5 * 1024))
    assert len(plan.streamed) == 15
    stays = sorted(set(range(20)) - set(plan.streamed))
    assert stays == [2, 6, 10, 14, 18]


def test_as_many_parts_stay_as_fit():
    for room in range(2, 19):
        plan = plan_residency(EQUAL, Budget(room * 1024))
        assert len(plan.streamed) == 20 - (room - 2)


def test_one_slot_where_two_do_not_fit():
    one = plan_residency(EQUAL, Budget(2047 + 300, 300, compute_s=1.0, link_bytes_per_s=20 * 1024))
    two = plan_residency(EQUAL, Budget(2048 + 300, 300, compute_s=1.0, link_bytes_per_s=20 * 1024))
    assert (one.slots, two.slots) == (1, 2)
    assert one.pass_s == pytest.approx(2.0)  # one after the other
    assert two.pass_s == pytest.approx(1.0)  # one behind the other


def test_a_part_much_larger_than_the_rest_stays_so_that_slots_are_small():
    parts = [{"table": 64 * 1024}, *EQUAL]
    plan = plan_residency(parts, Budget(70 * 1024))
    assert "table" in plan.kept
    assert plan.slot_bytes == 1024 and len(plan.streamed) == 16


def test_a_weight_of_several_parts_is_kept_once_and_before_others():
    parts = [{"embed": 4096}, *EQUAL, {"embed": 4096}]
    plan = plan_residency(parts, Budget(4096 + 2 * 1024))
    assert plan.kept == {"embed"}
    assert plan.pass_bytes == 20 * 1024
    small = plan_residency(parts, Budget(4096 + 1024))
    assert small.slots == 1 and "embed" in small.kept


def test_the_error_names_the_largest_weight_and_what_would_do():
    with pytest.raises(
        DeviceMemoryError, match=r"too little.*'big'.*8\.00 KiB.*Give at least 9\.00 KiB \(9216 bytes\)"
    ):
        plan_residency([{"a": 100}, {"big": 8192}], Budget(4096, 1024))


@pytest.mark.parametrize(
    ("nbytes", "shown"), [(10, "10 B"), (2048, "2.00 KiB"), (3 << 20, "3.00 MiB"), (5 << 30, "5.00 GiB")]
)
def test_bytes_for_people(nbytes, shown):
    assert text(nbytes) == shown
