"""Whatever is taken and freed in whatever order: no two parts overlap, and nothing that is free stays out of reach."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from onecard.ipc.arena import Arena, ArenaFullError


class Anything(RuleBasedStateMachine):
    """Random calls, with the parts that are taken kept beside."""

    @initialize(units=st.integers(1, 300), unit=st.sampled_from([1, 64, 4096]), rest=st.integers(0, 63))
    def start(self, units, unit, rest):
        self.arena, self.unit, self.whole = Arena(units * unit + rest % unit, unit), unit, units * unit
        self.taken: dict[int, int] = {}  # offset: bytes, whole units

    @rule(units=st.one_of(st.integers(0, 4), st.integers(0, 320)), less=st.integers(0, 4095))
    def take(self, units, less):
        nbytes = max(0, units * self.unit - less % self.unit)
        size = max(1, units) * self.unit
        try:
            offset = self.arena.take(nbytes)
        except ArenaFullError as error:
            assert (error.wanted_bytes, error.free_bytes) == (nbytes, self.whole - sum(self.taken.values()))
            assert size > self.largest_gap(), "it fits"
        else:
            assert offset not in self.taken
            self.taken[offset] = size

    def largest_gap(self) -> int:
        ends = [0, *(offset + size for offset, size in sorted(self.taken.items()))]
        starts = [*sorted(self.taken), self.whole]
        return max(start - end for start, end in zip(starts, ends, strict=True))

    @precondition(lambda self: self.taken)
    @rule(which=st.integers(0, 10**6), count=st.sampled_from([1, 1, 2, 90]))
    def free(self, which, count):
        for _ in range(min(count, len(self.taken))):
            offset = sorted(self.taken)[which % len(self.taken)]
            self.arena.free(offset)
            del self.taken[offset]

    @precondition(lambda self: self.taken)
    @rule(which=st.integers(0, 10**6))
    def free_all_but_one(self, which):
        kept = sorted(self.taken)[which % len(self.taken)]
        for offset in [offset for offset in self.taken if offset != kept]:
            self.arena.free(offset)
        self.taken = {kept: self.taken[kept]}

    @invariant()
    def nothing_overlaps(self):
        end = 0
        for offset, size in sorted(self.taken.items()):
            assert offset % self.unit == 0
            assert offset >= end
            assert self.arena.size_of(offset) == size
            end = offset + size
        assert end <= self.whole

    @invariant()
    def every_byte_is_counted_once(self):
        used = sum(self.taken.values())
        assert (self.arena.used_bytes, self.arena.free_bytes) == (used, self.whole - used)
        assert self.arena.nbytes == self.whole

    def teardown(self):
        for offset in list(getattr(self, "taken", ())):
            self.arena.free(offset)
        if hasattr(self, "arena"):
            assert self.arena.take(self.whole) == 0


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
