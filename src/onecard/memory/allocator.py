"""What PyTorch's caching allocator would take from the driver for a sequence of allocations, simulated.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings: sizes in steps of 512 bytes;
segments of 2 MiB for what is at most 1 MiB, of 20 MiB below 10 MiB, and of the size itself in steps of 2 MiB above;
the smallest free block that fits is taken and its rest split off; free neighbours are joined. Memory is never
returned to the driver here, which the real one does before it gives up.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

_STEP = 512
_SMALL = 1 << 20
_SMALL_SEGMENT = 2 << 20
_LARGE_SEGMENT = 20 << 20
_LARGE_FROM = 10 << 20
_LARGE_STEP = 2 << 20


@dataclass(eq=False, slots=True)
class Piece:
    """A part of a segment: where it starts, its bytes, whether it is in use, and its neighbours there."""

    start: int
    nbytes: int
    is_small: bool
    in_use: bool = False
    before: Piece | None = None
    after: Piece | None = None


class CachingAllocator:
    """Hands out pieces of segments and counts what it took for them.

    Attributes:
        reserved_bytes: of all segments.
    """

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._free: dict[bool, list[tuple[int, int, Piece]]] = {True: [], False: []}  # by size, then address

    def allocate(self, nbytes: int) -> Piece:
        """A piece of at least this size."""
        size = rounded(nbytes)
        is_small = size <= _SMALL
        free = self._free[is_small]
        place = bisect.bisect_left(free, (size, 0), key=lambda entry: entry[:2])
        piece = free.pop(place)[2] if place < len(free) else self._segment(size, is_small)
        rest = piece.nbytes - size
        if rest >= _STEP if is_small else rest > _SMALL:
            left = Piece(piece.start + size, rest, is_small, before=piece, after=piece.after)
            if piece.after is not None:
                piece.after.before = left
            piece.after, piece.nbytes = left, size
            self._put(left)
        piece.in_use = True
        return piece

    def release(self, piece: Piece) -> None:
        """Give a piece back; it joins the free pieces beside it."""
        piece.in_use = False
        for other in (piece.before, piece.after):
            if other is not None and not other.in_use:
                self._take(other)
                first, second = (other, piece) if other is piece.before else (piece, other)
                first.nbytes += second.nbytes
                first.after = second.after
                if first.after is not None:
                    first.after.before = first
                piece = first
        self._put(piece)

    def _segment(self, size: int, is_small: bool) -> Piece:
        taken = segment_bytes(size)
        piece = Piece(self.reserved_bytes, taken, is_small)
        self.reserved_bytes += taken
        return piece

    def _put(self, piece: Piece) -> None:
        bisect.insort(self._free[piece.is_small], (piece.nbytes, piece.start, piece), key=lambda entry: entry[:2])

    def _take(self, piece: Piece) -> None:
        free = self._free[piece.is_small]
        place = bisect.bisect_left(free, (piece.nbytes, piece.start), key=lambda entry: entry[:2])
        del free[place]


def rounded(nbytes: int) -> int:
    """What an allocation of this size takes of a segment."""
    return max(_STEP, -(-nbytes // _STEP) * _STEP)


def segment_bytes(size: int) -> int:
    """The segment that is taken from the driver for a rounded size."""
    if size <= _SMALL:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if size < _LARGE_FROM else -(-size // _LARGE_STEP) * _LARGE_STEP


def reserved_for(held: Iterable[int], moves: Iterable[tuple[int, int]]) -> int:
    """Bytes that the allocator reserves for lasting allocations and then a pass.

    Args:
        held: sizes that are allocated first and stay (weights, inputs), in order.
        moves: then, in order: a number and the size to allocate under it, or the number and 0 to release it.
    """
    allocator = CachingAllocator()
    for nbytes in held:
        allocator.allocate(nbytes)
    pieces: dict[int, Piece] = {}
    for number, nbytes in moves:
        if nbytes:
            pieces[number] = allocator.allocate(nbytes)
        else:
            allocator.release(pieces.pop(number))
    return allocator.reserved_bytes
