"""Which parts of a segment are taken: an allocator of offsets, which touches no memory itself.

What was freed last is kept by its size and handed out again as it is: servers see the same few sizes over and over.
Only when nothing of a size lies there, or too much of it, are free blocks joined with their neighbours into runs, and
the smallest run that is large enough gives its beginning away.
"""

from __future__ import annotations

from bisect import bisect_left, insort

RECENT_BLOCKS = 64
"""Most blocks that stay apart from their free neighbours. Bounds how much of the segment is ever touched."""


class ArenaFullError(Exception):
    """No free run is large enough.

    Args:
        wanted_bytes: asked for.
        free_bytes: in all; may be more than asked for, in parts that are too small.
    """

    def __init__(self, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{wanted_bytes} bytes do not fit: {free_bytes} are free, not all of them in one piece")
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class Arena:
    """Which parts of a segment are taken. For one thread alone: it has no locks.

    Args:
        nbytes: of the segment; what is left after the last whole unit is never handed out.
        unit_bytes: offsets and sizes are multiples of it.

    Raises:
        ValueError: there is not even one unit.
    """

    def __init__(self, nbytes: int, unit_bytes: int = 4096) -> None:
        if unit_bytes < 1 or nbytes < unit_bytes:
            raise ValueError(f"an arena holds at least one unit of at least 1 byte, not {nbytes} by {unit_bytes}")
        self._unit_bytes = unit_bytes
        self._nbytes = nbytes // unit_bytes * unit_bytes
        self._used_bytes = 0
        self._taken: dict[int, int] = {}  # offset: size
        self._recent: dict[int, list[int]] = {}  # size: offsets
        self._recent_blocks = 0
        self._runs = _FreeRuns()
        self._runs.add(0, self._nbytes)

    @property
    def nbytes(self) -> int:
        """What can be taken in all."""
        return self._nbytes

    @property
    def used_bytes(self) -> int:
        """What is taken, whole units."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """What is not taken, in one piece or many."""
        return self._nbytes - self._used_bytes

    def take(self, nbytes: int) -> int:
        """Take a part of the segment; none is shorter than a unit.

        Returns:
            Where it begins, a multiple of the unit.

        Raises:
            ArenaFullError: there is no such part.
            ValueError: ``nbytes`` is negative.
        """
        if nbytes < 0:
            raise ValueError(f"a part has at least 0 bytes, not {nbytes}")
        size = -(-nbytes // self._unit_bytes) * self._unit_bytes or self._unit_bytes
        offsets = self._recent.get(size)
        if offsets is None:
            offset = self._carve(size, nbytes)
        else:
            offset = offsets.pop()
            self._recent_blocks -= 1
            if not offsets:
                del self._recent[size]
        self._taken[offset] = size
        self._used_bytes += size
        return offset

    def free(self, offset: int) -> None:
        """Give a part back.

        Raises:
            ValueError: no part that is taken begins there.
        """
        size = self._taken.pop(offset, 0)
        if not size:
            raise ValueError(f"nothing that begins at {offset} is taken")
        self._used_bytes -= size
        self._recent.setdefault(size, []).append(offset)
        self._recent_blocks += 1
        if self._recent_blocks > RECENT_BLOCKS:
            self._join_recent()

    def size_of(self, offset: int) -> int:
        """How many bytes are taken there, whole units.

        Raises:
            ValueError: no part that is taken begins there.
        """
        size = self._taken.get(offset, 0)
        if not size:
            raise ValueError(f"nothing that begins at {offset} is taken")
        return size

    def _carve(self, size: int, wanted_bytes: int) -> int:
        offset = self._runs.take(size)
        if offset is None:
            self._join_recent()
            offset = self._runs.take(size)
        if offset is None:
            raise ArenaFullError(wanted_bytes, self.free_bytes)
        return offset

    def _join_recent(self) -> None:
        for size, offsets in self._recent.items():
            for offset in offsets:
                self._runs.add(offset, size)
        self._recent.clear()
        self._recent_blocks = 0


class _FreeRuns:
    """Free runs, of which no two touch."""

    def __init__(self) -> None:
        self._by_size: list[tuple[int, int]] = []  # (size, offset), ascending
        self._size_at: dict[int, int] = {}  # offset: size
        self._ending_at: dict[int, int] = {}  # offset + size: offset

    def add(self, offset: int, size: int) -> None:
        """Add a block, joined with the runs before and behind it."""
        behind = self._size_at.get(offset + size)
        if behind is not None:
            self._remove(offset + size, behind)
            size += behind
        before = self._ending_at.get(offset)
        if before is not None:
            self._remove(before, offset - before)
            size += offset - before
            offset = before
        insort(self._by_size, (size, offset))
        self._size_at[offset] = size
        self._ending_at[offset + size] = offset

    def take(self, size: int) -> int | None:
        """Cut the beginning off the smallest run of at least ``size``, the lowest of several; None if there is none."""
        at = bisect_left(self._by_size, (size, 0))
        if at == len(self._by_size):
            return None
        run, offset = self._by_size[at]
        self._remove(offset, run)
        if run > size:
            self.add(offset + size, run - size)
        return offset

    def _remove(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._size_at[offset]
        del self._ending_at[offset + size]
