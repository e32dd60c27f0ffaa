"""Peak memory of a process is its own: neither another's nor its parent's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onecard.measure.memory import MemoryWatch

MIB = 1 << 20
CHILD = """
import sys
from onecard.measure.memory import MemoryWatch
watch = MemoryWatch("cpu")
block = b"x" * (int(sys.argv[1]) << 20)
del block
print(watch.peak_process_bytes())
"""


def peak_of_child(mib: int) -> int:
    done = subprocess.run([sys.executable, "-c", CHILD, str(mib)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_cpu_has_no_device_memory():
    assert MemoryWatch("cpu").peak_device_bytes() == 0


def test_the_peak_stays_after_the_memory_is_free_again():
    assert peak_of_child(400) - peak_of_child(0) > 350 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child's peak from its parent's")
def test_the_peak_is_not_that_of_the_process_that_started_it():
    block = b"x" * (900 * MIB)
    assert peak_of_child(0) < 800 * MIB
    del block


class FakeAllocator:
    """Just enough of ``torch.cuda`` for a watch: one allocator, one driver."""

    def __init__(self) -> None:
        self.peak = self.reserved = self.peak_reserved = self.outside = 0
        self.segments: list[dict] = []

    def hold(self, allocated: int, reserved: int) -> None:
        self.peak, self.reserved = max(self.peak, allocated), reserved
        self.peak_reserved = max(self.peak_reserved, reserved)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def reset(device: str) -> None:
            self.peak, self.peak_reserved = 0, self.reserved

        for name, stand_in in {
            "init": lambda: None,
            "synchronize": lambda device: None,
            "reset_peak_memory_stats": reset,
            "max_memory_allocated": lambda device: self.peak,
            "max_memory_reserved": lambda device: self.peak_reserved,
            "memory_reserved": lambda device: self.reserved,
            "mem_get_info": lambda device: (1000 - self.reserved - self.outside, 1000),
            "memory_snapshot": lambda: self.segments,
        }.items():
            monkeypatch.setattr(f"torch.cuda.{name}", stand_in)

    def keep(self, total: int, allocated: int, pool: tuple[int, int], device: int = 0) -> None:
        self.segments.append(
            {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}
        )


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> FakeAllocator:
    fake = FakeAllocator()
    fake.outside = 100  # the context
    fake.install(monkeypatch)
    return fake


def test_what_a_graph_keeps_for_its_replays_is_in_use(allocator):
    watch = MemoryWatch("cuda:0")
    allocator.hold(150, 200)  # while the graph is captured
    allocator.keep(total=120, allocated=20, pool=(0, 1))
    allocator.keep(total=70, allocated=30, pool=(0, 0))  # anyone may have the rest of it
    allocator.keep(total=500, allocated=0, pool=(0, 1), device=1)
    watch.loaded()
    allocator.hold(90, 200)
    allocator.outside += 7
    assert watch.peak_allocated_bytes() == 90 + 100
    assert watch.outside_bytes() == 7
    assert watch.peak_device_bytes() == 197


def test_the_peak_of_loading_counts_where_it_is_the_higher_one(allocator):
    watch = MemoryWatch("cuda:0")
    allocator.hold(400, 450)
    allocator.hold(50, 300)  # emptied
    watch.loaded()
    allocator.hold(60, 300)
    assert watch.peak_allocated_bytes() == 400
    assert watch.peak_reserved_bytes() == 450
