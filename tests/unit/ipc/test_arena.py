"""Where parts of a segment come to lie: examples."""

from __future__ import annotations

import random

import pytest

from onecard.ipc.arena import RECENT_BLOCKS, Arena, ArenaFullError


def test_parts_are_whole_units_side_by_side():
    arena = Arena(10 * 4096)
    offsets = [arena.take(n) for n in (1, 4096, 4097, 0)]
    assert offsets == [0, 4096, 8192, 16384]
    assert [arena.size_of(offset) for offset in offsets] == [4096, 4096, 8192, 4096]
    assert (arena.used_bytes, arena.free_bytes, arena.nbytes) == (5 * 4096, 5 * 4096, 10 * 4096)


def test_what_is_left_after_the_last_whole_unit_is_not_handed_out():
    arena = Arena(1000, unit_bytes=64)
    assert arena.nbytes == 960
    assert arena.take(960) == 0
    with pytest.raises(ArenaFullError):
        arena.take(1)


def test_what_was_freed_last_is_handed_out_first():
    arena = Arena(1 << 20)
    _, second, _ = (arena.take(5000) for _ in range(3))
    arena.free(second)
    assert arena.take(8192) == second


def test_a_full_arena_says_what_was_wanted_and_what_is_free():
    arena = Arena(4 * 4096)
    offsets = [arena.take(4096) for _ in range(4)]
    arena.free(offsets[0])
    arena.free(offsets[2])
    with pytest.raises(
        ArenaFullError, match=r"5000 bytes do not fit: 8192 are free, not all of them in one piece"
    ) as e:
        arena.take(5000)
    assert (e.value.wanted_bytes, e.value.free_bytes) == (5000, 8192)
    assert arena.used_bytes == 8192
    arena.free(offsets[1])
    assert arena.take(3 * 4096) == 0


@pytest.mark.parametrize("order", ["first to last", "last to first", "inside out"])
def test_neighbours_join_in_any_order(order):
    arena = Arena(7 * 4096)
    offsets = [arena.take(1) for _ in range(7)]
    sequence = {
        "first to last": offsets,
        "last to first": offsets[::-1],
        "inside out": sorted(offsets, key=lambda offset: abs(offset - offsets[3])),
    }[order]
    for offset in sequence:
        arena.free(offset)
    assert arena.take(7 * 4096) == 0


def test_the_smallest_hole_that_fits_is_filled():
    arena = Arena(20 * 4096)
    large, _, small, _ = (arena.take(n * 4096) for n in (6, 1, 3, 1))
    arena.free(large)
    arena.free(small)
    assert arena.take(2 * 4096) > small  # from the run behind all of them: joining waits until it is needed
    assert arena.take(7 * 4096) > small
    assert arena.take(2 * 4096) == small


def test_few_blocks_stay_unjoined_so_that_little_memory_is_ever_touched():
    """Sizes that never come again would otherwise walk through the whole segment."""
    arena = Arena(1 << 30, unit_bytes=64)
    chance = random.Random(0)
    highest = 0
    for _ in range(20_000):
        nbytes = chance.randrange(1, 1 << 20)
        offset = arena.take(nbytes)
        highest = max(highest, offset + nbytes)
        arena.free(offset)
    assert highest <= (RECENT_BLOCKS + 1) << 20


@pytest.mark.parametrize("offset", [4096, 1, -4096, 1 << 40])
def test_what_is_not_taken_can_be_neither_freed_nor_measured(offset):
    arena = Arena(8 * 4096)
    arena.take(8192)
    with pytest.raises(ValueError, match=f"nothing that begins at {offset} is taken"):
        arena.free(offset)
    with pytest.raises(ValueError, match=f"nothing that begins at {offset} is taken"):
        arena.size_of(offset)
    assert arena.used_bytes == 8192


def test_a_part_is_freed_once():
    arena = Arena(8 * 4096)
    offset = arena.take(1)
    arena.free(offset)
    with pytest.raises(ValueError, match="nothing that begins at 0"):
        arena.free(offset)
    assert (arena.used_bytes, arena.take(8 * 4096)) == (0, 0)


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least 0 bytes, not -1"):
        Arena(4096).take(-1)
    for nbytes, unit_bytes in ((4095, 4096), (0, 1), (-5, 64), (64, 0)):
        with pytest.raises(ValueError, match="at least one unit"):
            Arena(nbytes, unit_bytes)
