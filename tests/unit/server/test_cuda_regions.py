"""CUDA shared memory is used within its true size, and given back when nothing uses it any more.

The card's driver is stood in for by one that shares the host's memory; the last test has a real card.
"""

import contextlib
import ctypes
import gc
import subprocess
import sys

import numpy as np
import pytest
import torch

from onecard.errors import UsageError
from onecard.server.cuda_regions import HANDLE_BYTES, CudaRegions, Driver, IpcMemory, find_driver

HANDLE = bytes(range(HANDLE_BYTES))


class Library:
    """``libcuda`` of a card whose memory is this array."""

    def __init__(self, nbytes: int = 1024) -> None:
        self.memory = np.zeros(nbytes, np.uint8)
        self.pointer = self.memory.ctypes.data
        self.handles: list[bytes] = []
        self.flags: list[int] = []
        self.closed: list[int] = []
        self.failing: dict[str, int] = {}

    def cuIpcOpenMemHandle_v2(self, pointer, handle, flags) -> int:
        self.handles.append(bytes(handle))
        self.flags.append(flags)
        pointer._obj.value = self.pointer
        return self.failing.get("open", 0)

    def cuMemGetAddressRange_v2(self, start, size, pointer) -> int:
        assert pointer.value == self.pointer
        start._obj.value, size._obj.value = self.memory.ctypes.data, self.memory.nbytes
        return self.failing.get("range", 0)

    def cuIpcCloseMemHandle(self, pointer) -> int:
        self.closed.append(pointer.value)
        return self.failing.get("close", 0)


def see(mapped) -> torch.Tensor:
    """As torch sees memory of a card: the tensor keeps the object that it came from."""
    interface = mapped.__cuda_array_interface__
    address, _ = interface["data"]
    (nbytes,) = interface["shape"]
    held = (ctypes.c_uint8 * nbytes).from_address(address)
    held.mapped = mapped
    return torch.frombuffer(held, dtype=torch.uint8)


@pytest.fixture
def library():
    return Library()


@pytest.fixture
def regions(library):
    driver = Driver(library, lambda device: contextlib.nullcontext())
    return CudaRegions(IpcMemory(lambda device: driver, see))


def test_tensors_are_the_memory_itself(regions, library):
    regions.register("r", HANDLE, 0, 1024)
    assert (library.handles, library.flags) == ([HANDLE], [1])
    library.memory[64:88] = np.arange(6, dtype=np.float32).view(np.uint8)
    tensor = regions.tensor("r", 64, torch.float32, (2, 3))
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor.data_ptr() == library.pointer + 64
    tensor.mul_(2)
    assert library.memory[64:88].view(np.float32).tolist() == [0, 2, 4, 6, 8, 10]
    assert regions.tensor("r", 2, torch.bfloat16, (511,)).dtype == torch.bfloat16
    assert regions.tensor("r", 1024, torch.int64, (0, 5)).shape == (0, 5)
    assert regions.tensor("r", 8, torch.int64, ()).item() == 0


@pytest.mark.parametrize(
    ("offset", "dtype", "shape", "match"),
    [
        (0, torch.float32, (257,), "has 1024 bytes: 1028 bytes at offset 0 are not within it"),
        (1020, torch.float32, (2,), "8 bytes at offset 1020"),
        (-4, torch.float32, (1,), "not within it"),
        (0, torch.float32, (-1,), "not within it"),
        (0, torch.uint8, (1 << 62, 4), "not within it"),
        (2, torch.float32, (1,), "the offset 2 in CUDA shared memory 'r' does not suit torch.float32"),
    ],
)
def test_places_stay_within_the_region(regions, offset, dtype, shape, match):
    regions.register("r", HANDLE, 0, 1024)
    with pytest.raises(UsageError, match=match):
        regions.tensor("r", offset, dtype, shape)


def test_an_output_is_written_to_its_place(regions, library):
    regions.register("r", HANDLE, 0, 1024)
    regions.write("r", 512, 64, torch.arange(4, dtype=torch.float32))
    assert library.memory[512:528].view(np.float32).tolist() == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="the output has 16 bytes, but its 'shared_memory_byte_size' is 15"):
        regions.write("r", 512, 15, torch.zeros(4))
    with pytest.raises(UsageError, match="64 bytes at offset 1000"):
        regions.write("r", 1000, 64, torch.zeros(4))
    with pytest.raises(UsageError, match="'s': it is not registered"):
        regions.write("s", 0, 16, torch.zeros(4))


def test_memory_is_given_back_with_its_last_tensor(regions, library):
    regions.register("r", HANDLE, 0, 1024)
    with pytest.raises(UsageError, match="registered already"):
        regions.register("r", HANDLE, 0, 1024)
    tensor = regions.tensor("r", 0, torch.float32, (4,))
    regions.unregister("r")
    regions.unregister("r")
    gc.collect()
    assert library.closed == []
    tensor.fill_(1)
    del tensor
    gc.collect()
    assert library.closed == [library.pointer]
    regions.register("r", HANDLE, 0, 1024)
    regions.close()
    gc.collect()
    assert library.closed == [library.pointer] * 2


def test_a_region_larger_than_the_memory_is_refused(regions, library):
    with pytest.raises(UsageError, match="has 1024 bytes, but the region is to have 1025"):
        regions.register("r", HANDLE, 0, 1025)
    library.pointer += 24
    with pytest.raises(UsageError, match="has 1000 bytes, but the region is to have 1001"):
        regions.register("r", HANDLE, 0, 1001)
    gc.collect()
    assert library.closed == [library.pointer - 24, library.pointer]
    with pytest.raises(UsageError, match="not registered"):
        regions.tensor("r", 0, torch.uint8, (1,))


@pytest.mark.parametrize(
    ("failing", "match", "closed"),
    [("open", "handle cannot be opened on card 3: CUDA error 201", 0), ("range", "size .* CUDA error 201", 1)],
)
def test_errors_of_the_driver(regions, library, failing, match, closed):
    library.failing[failing] = 201
    with pytest.raises(UsageError, match=match):
        regions.register("r", HANDLE, 3, 1024)
    gc.collect()
    assert len(library.closed) == closed
    library.failing.clear()
    regions.register("r", HANDLE, 3, 1024)


def test_a_failed_close_is_logged(regions, library, caplog):
    library.failing["close"] = 4
    regions.register("r", HANDLE, 0, 1024)
    regions.close()
    gc.collect()
    assert "could not be closed: CUDA error 4" in caplog.text


@pytest.mark.parametrize(("handle", "size"), [(HANDLE[1:], 1), (HANDLE + b"x", 1), (HANDLE, 0), (HANDLE, -1)])
def test_handles_that_cannot_be(regions, library, handle, size):
    with pytest.raises(UsageError, match="expected 64 bytes and at least 1"):
        regions.register("r", handle, 0, size)
    assert not library.handles


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_it_is_said():
    with pytest.raises(UsageError, match=r"needs an NVIDIA card, and there is none here\. Use system shared memory"):
        CudaRegions().register("r", HANDLE, 0, 16)


SHARER = """
import ctypes, sys, torch
torch.cuda.mem_get_info(0)
cuda = ctypes.CDLL("libcuda.so.1")
pointer, handle = ctypes.c_uint64(), (ctypes.c_char * 64)()
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(4 << 20)) == 0
cuda.cuMemsetD32_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t]
assert cuda.cuMemsetD32_v2(pointer.value, 7, 1 << 20) == 0
assert cuda.cuCtxSynchronize() == 0
cuda.cuIpcGetMemHandle.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
assert cuda.cuIpcGetMemHandle(handle, pointer.value) == 0
print(bytes(handle).hex(), flush=True)
sys.stdin.readline()
back = (ctypes.c_int32 * 4)()
cuda.cuMemcpyDtoH_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t]
assert cuda.cuMemcpyDtoH_v2(back, pointer.value, 16) == 0
print(list(back), flush=True)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.timeout(120)
def test_another_processs_memory_on_a_card():
    with pytest.raises(UsageError, match="there is no card 99"):
        find_driver(99)
    regions = CudaRegions()
    with subprocess.Popen(
        [sys.executable, "-c", SHARER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sharer:
        try:
            handle = bytes.fromhex(sharer.stdout.readline())
            with pytest.raises(UsageError, match="CUDA shared memory has 4194304 bytes"):
                regions.register("r", handle, 0, 1 << 30)
            gc.collect()
            regions.register("r", handle, 0, 4 << 20)
            tensor = regions.tensor("r", 0, torch.int32, (1 << 20,))
            assert tensor.device == torch.device("cuda", 0)
            assert bool((tensor == 7).all())
            regions.write("r", 0, 16, torch.tensor([1, 2, 3, 4], dtype=torch.int32))
            sharer.stdin.write("\n")
            sharer.stdin.flush()
            assert sharer.stdout.readline() == "[1, 2, 3, 4]\n"
            del tensor
            regions.close()
            gc.collect()
        finally:
            sharer.kill()
    with pytest.raises(UsageError, match="cannot be opened"):
        regions.register("r", bytes(64), 0, 16)
