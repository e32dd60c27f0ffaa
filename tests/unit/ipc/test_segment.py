"""Memory that two mappings share, and what is refused as such."""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onecard.errors import EngineError, StorageError, UsageError
from onecard.ipc.segment import FIXED_SIZE, Segment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="segments need Linux")
NBYTES = 3 * 4096 + 100
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_WRITE = 1033, 2, 8
MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2


def is_mapped(name: str) -> bool:
    return f"/memfd:{name} " in Path("/proc/self/maps").read_text()


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def anonymous_file(nbytes: int, seals: int) -> int:
    fd = os.memfd_create("foreign", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


@pytest.fixture
def segment():
    made = Segment.create("tested", NBYTES)
    yield made
    made.close()


def test_a_new_segment_is_zeros_to_write_in(segment):
    assert (segment.nbytes, len(segment.memory), segment.array.shape) == (NBYTES, NBYTES, (NBYTES,))
    assert (segment.memory.readonly, segment.memory.format, segment.array.dtype) == (False, "B", np.uint8)
    assert not segment.array.any()
    segment.memory[7:9] = b"ab"
    assert segment.array[7:10].tolist() == [97, 98, 0]


def test_both_mappings_see_what_either_writes(segment):
    other = Segment.attach(os.dup(segment.fd), NBYTES)
    segment.array[4000:5000] = 1
    other.array[4500] = 2
    assert segment.array.sum() == 1001
    assert other.array.sum() == 1001
    other.close()
    assert segment.array.sum() == 1001


def test_its_descriptor_is_not_inherited_and_its_size_never_changes(segment):
    assert not os.get_inheritable(segment.fd)
    for size in (0, NBYTES - 1, NBYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, F_ADD_SEALS, F_SEAL_WRITE)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_segment_has_bytes(nbytes):
    with pytest.raises(UsageError, match=f"at least 1 byte, not {nbytes}"):
        Segment.create("empty", nbytes)


@pytest.mark.parametrize("nbytes", [1 << 62, 1 << 80])
def test_more_than_the_system_gives_is_refused_with_a_cure(nbytes):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StorageError, match=r"No shared memory of [\d,]+ bytes for 'huge'.*smaller segment"):
        Segment.create("huge", nbytes)
    assert os.listdir("/proc/self/fd") == before


def test_without_descriptors_left_the_error_says_so():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(StorageError, match=r"Too many open files.*ulimit -n"):
            Segment.create("many", 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_buffer_inside_is_found(segment):
    numbers = segment.array[4096:8192].view(np.float32)
    assert segment.offset_of(numbers) == 4096
    assert segment.offset_of(numbers.reshape(4, 256)[2:]) == 4096 + 2048
    assert segment.offset_of(segment.memory) == 0
    assert segment.offset_of(segment.view(NBYTES - 1, 1)) == NBYTES - 1
    assert segment.offset_of(segment.view(8, 64).cast("d")) == 8
    assert segment.offset_of(segment.view(8, 64).toreadonly()) == 8
    assert segment.offset_of(numbers.reshape(4, 256)[:1].T) == 4096  # one row lies in one piece either way


def test_a_buffer_elsewhere_or_in_pieces_is_not(segment):
    other = Segment.attach(os.dup(segment.fd), NBYTES)
    numbers = segment.array[:4096].reshape(64, 64)
    elsewhere = [other.array, np.zeros(10), memoryview(b"abc"), numbers[:, :32], numbers.T, numbers[:0], numbers[::-1]]
    assert [segment.offset_of(buffer) for buffer in elsewhere] == [None] * len(elsewhere)
    other.close()


def test_a_buffer_that_ends_behind_the_segment_is_not_inside(segment):
    """The last page is mapped whole, so an array can be made that reaches beyond the segment's end."""
    interface = {**segment.array.__array_interface__, "shape": (NBYTES + 1,)}
    holder = type("Holder", (), {"__array_interface__": interface, "segment": segment})()
    assert segment.offset_of(np.asarray(holder)) is None
    assert segment.offset_of(np.asarray(holder)[:-1]) == 0


def test_a_view_is_writable_and_checked(segment):
    segment.view(10, 3)[:] = b"xyz"
    assert bytes(segment.memory[9:14]) == b"\0xyz\0"
    assert len(segment.view(NBYTES, 0)) == 0
    for offset, nbytes in ((-1, 1), (0, -1), (0, NBYTES + 1), (NBYTES, 1), (NBYTES + 1, 0), (1 << 70, 1)):
        with pytest.raises(ValueError, match=f"do not lie in a segment of {NBYTES}"):
            segment.view(offset, nbytes)


def test_closing_leaves_views_alive_and_the_last_one_unmaps():
    segment = Segment.create("closing", NBYTES)
    fd = segment.fd
    numbers, view = segment.array[4096:8192].view(np.int32), segment.view(0, 10)
    numbers[:] = 5
    segment.close()
    segment.close()
    assert not is_open(fd)
    assert (numbers.sum(), bytes(view)) == (5 * 1024, bytes(10))
    del view
    gc.collect()
    assert is_mapped("closing")
    numbers[:] = 6
    del numbers
    gc.collect()
    assert not is_mapped("closing")


def test_a_closed_segment_is_empty():
    segment = Segment.create("closed", NBYTES)
    kept = segment.array[:10]
    segment.close()
    assert (segment.fd, segment.nbytes, len(segment.memory), segment.array.size) == (-1, 0, 0, 0)
    assert segment.offset_of(kept) is None
    with pytest.raises(ValueError, match="segment of 0"):
        segment.view(0, 1)


def test_a_forgotten_segment_closes_itself():
    segment = Segment.create("forgotten", NBYTES)
    fd = segment.fd
    del segment
    gc.collect()
    assert not is_open(fd)
    assert not is_mapped("forgotten")


@pytest.mark.parametrize("said", [NBYTES - 1, NBYTES + 1, 0, -1, 1 << 70])
def test_a_size_that_is_not_the_segments_is_refused(segment, said):
    fd = os.dup(segment.fd)
    with pytest.raises(EngineError, match=f"has {NBYTES:,} bytes, and it said"):
        Segment.attach(fd, said)
    assert not is_open(fd)


@pytest.mark.parametrize("seals", [0, F_SEAL_SHRINK, FIXED_SIZE & ~F_SEAL_SHRINK])
def test_memory_that_could_still_shrink_is_refused(seals):
    fd = anonymous_file(NBYTES, seals)
    with pytest.raises(EngineError, match="has to be sealed"):
        Segment.attach(fd, NBYTES)
    assert not is_open(fd)


def test_memory_that_cannot_be_written_is_refused():
    fd = anonymous_file(NBYTES, FIXED_SIZE | F_SEAL_WRITE)
    with pytest.raises(EngineError, match="cannot be mapped"):
        Segment.attach(fd, NBYTES)
    assert not is_open(fd)


def test_what_is_open_for_reading_alone_is_refused(segment):
    fd = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDONLY)
    with pytest.raises(EngineError, match="cannot be mapped"):
        Segment.attach(fd, NBYTES)
    assert not is_open(fd)


def test_files_and_pipes_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(NBYTES))
    reading, writing = os.pipe()
    os.close(writing)
    for fd in (os.open(path, os.O_RDWR), reading):
        with pytest.raises(EngineError):
            Segment.attach(fd, NBYTES)
        assert not is_open(fd)


def test_other_systems_are_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="needs Linux, and this is darwin"):
        Segment.create("elsewhere", NBYTES)


def test_the_front_stays_light():
    modules = "arena, onecard.ipc.segment, onecard.ipc.packets"
    code = f"import sys, onecard.ipc.{modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
