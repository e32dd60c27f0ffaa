"""The simulated caching allocator: its documented rules, and no byte given out twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.memory.allocator import CachingAllocator, Piece, reserved_for, rounded, segment_bytes

MIB = 1 << 20


@pytest.mark.parametrize(("nbytes", "expected"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB)])
def test_sizes_are_rounded_to_512_bytes(nbytes, expected):
    assert rounded(nbytes) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(512, 2), (MIB, 2), (MIB + 512, 20), (5 * MIB, 20), (10 * MIB, 10), (11 * MIB, 12)]
)
def test_segments_have_the_sizes_of_the_real_allocator(size, expected):
    assert segment_bytes(size) == expected * MIB


def test_small_allocations_share_a_segment():
    assert reserved_for([MIB // 2] * 4, []) == 2 * MIB
    assert reserved_for([MIB // 2] * 5, []) == 4 * MIB


def test_what_was_released_is_used_again():
    moves = [(0, 16 * MIB), (0, 0), (1, 16 * MIB), (1, 0), (2, 15 * MIB + 512 * 1024)]
    assert reserved_for([], moves) == 16 * MIB


def test_a_rest_of_more_than_one_mib_is_split_off():
    assert reserved_for([], [(0, 30 * MIB), (0, 0), (1, 14 * MIB), (2, 16 * MIB)]) == 30 * MIB
    assert reserved_for([], [(0, 30 * MIB), (0, 0), (1, 14 * MIB), (2, 17 * MIB)]) == 48 * MIB


def test_free_neighbours_join():
    moves = [(0, 30 * MIB), (0, 0), (1, 10 * MIB), (2, 10 * MIB), (3, 10 * MIB), (1, 0), (3, 0), (2, 0), (4, 30 * MIB)]
    assert reserved_for([], moves) == 30 * MIB


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 30)), max_size=60))
def test_no_two_pieces_in_use_overlap(steps):
    allocator = CachingAllocator()
    held: list[Piece] = []
    for nbytes, drop in steps:
        held.append(allocator.allocate(nbytes))
        assert held[-1].nbytes >= nbytes
        if drop < len(held):
            allocator.release(held.pop(drop))
        spans = sorted((piece.start, piece.start + piece.nbytes) for piece in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert sum(piece.nbytes for piece in held) <= allocator.reserved_bytes
