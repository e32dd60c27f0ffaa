"""Shared memory is used only within what was registered, and nothing that its owner does to it harms the server."""

import asyncio
import fcntl
import gc
import os
import signal

import numpy as np
import pytest
import torch

from onecard.errors import EngineError, StorageError, UsageError
from onecard.server.cuda_regions import CudaRegions
from onecard.server.device_regions import DeviceRegion, DeviceRegions
from onecard.server.http_types import HttpError
from onecard.server.oip_types import ProtocolError, Region
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import OpenRegion, SystemRegion, SystemRegions
from tests.unit.server.shared_objects import FOLDER, needs_shared_memory, shared_object, unique_prefix

pytestmark = needs_shared_memory
OFF = DeviceRegions(None)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def prefix():
    return unique_prefix()


@pytest.fixture
def memory(prefix):
    with shared_object(prefix, 8192) as made:
        yield made


@pytest.fixture
def regions(prefix):
    return SystemRegions(prefix, max_regions=3, max_bytes=20_000)


def access_to(regions: SystemRegions, device: DeviceRegions = OFF):
    access = SharedRegions(regions, device).access(lambda nbytes: memoryview(bytearray(nbytes)))
    assert access is not None
    return access


def test_what_is_read_and_written_is_the_clients(regions, memory):
    memory.buf[:8192] = np.arange(2048, dtype="<u4").tobytes()
    regions.register(SystemRegion("r", "/" + memory.name, 4096, 4096))
    access = access_to(regions)
    assert access.locate(Region("r", 8, 16)) == "host"
    found = access.read(Region("r", 8, 16))
    assert np.frombuffer(found, "<u4").tolist() == [1028, 1029]
    memory.buf[4112:4116] = bytes(4)
    assert np.frombuffer(found, "<u4")[0] == 1028  # a copy: what was checked cannot change
    access.write(Region("r", 16, 4080), memoryview(b"0123456789abcdef"))
    assert bytes(memory.buf[8176:8192]) == b"0123456789abcdef"
    access.write(Region("r", 16, 0), memoryview(b"xy"))  # an output may be smaller than its place
    assert bytes(memory.buf[4096:4099]) == b"xy\x00"
    assert len(access.read(Region("r", 0, 4096))) == 0


def test_it_reads_into_the_memory_it_is_given(regions, memory):
    regions.register(SystemRegion("r", memory.name, 0, 8192))
    memory.buf[:4] = b"abcd"
    own = bytearray(64)
    access = SharedRegions(regions, OFF).access(lambda nbytes: memoryview(own)[8 : 8 + nbytes])
    assert access.read(Region("r", 4)).obj is own
    assert own[8:12] == b"abcd"


@pytest.mark.parametrize(("offset", "size"), [(0, 4097), (4096, 1), (1, 4096), (1 << 62, 1), (0, (1 << 63) - 1)])
def test_places_stay_within_the_region_though_the_object_is_larger(regions, memory, offset, size):
    regions.register(SystemRegion("r", memory.name, 0, 4096))
    access = access_to(regions)
    place = Region("r", size, offset)
    for use in (
        lambda: access.locate(place),
        lambda: access.read(place),
        lambda: access.write(place, memoryview(b"x")),
    ):
        with pytest.raises(ProtocolError, match=r"'r' has 4096 bytes: .* not within it"):
            use()


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "..", "/..", "/../etc/passwd", "//x", "/other", "{p}x/y", "/{p}/../../etc/passwd", "/{p}x\0"),
        *("/{p}é", "/{p}\n", "./{p}x", "/dev/shm/{p}x", "/{p}" + "x" * 250),
    ],
)
def test_keys_that_are_not_the_servers_never_reach_the_file_system(regions, memory, prefix, key, monkeypatch):
    opened: list[object] = []
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a))
    with pytest.raises(ProtocolError, match="is not one of this server's: expected '/onecard-test-"):
        regions.register(SystemRegion("r", key.format(p=prefix), 0, 1))
    assert not opened


@pytest.mark.parametrize("prefix", ["", ".", "..", "-a", "a/b", "/a", "a\n", "x" * 129])
def test_prefixes_that_cannot_be_one(prefix):
    with pytest.raises(UsageError, match="cannot be a prefix of shared memory"):
        SystemRegions(prefix)


def test_objects_that_are_refused(regions, prefix, tmp_path):
    path = FOLDER / (prefix + "x")
    target = tmp_path / "secret"
    target.write_bytes(bytes(4096))
    region = SystemRegion("r", "/" + path.name, 0, 4096)
    before = descriptors()

    def refused(match):
        with pytest.raises(ProtocolError, match=match):
            regions.register(region)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    with pytest.raises(ProtocolError, match="cannot be opened: No such file"):
        regions.register(region)
    path.symlink_to(target)
    refused("cannot be opened")
    path.mkdir()
    refused("cannot be opened: Is a directory")
    os.mkfifo(path)
    refused("not a plain object")
    path.write_bytes(bytes(4096))
    other = FOLDER / (prefix + "linked")
    os.link(path, other)
    try:
        refused("not a plain object")
    finally:
        other.unlink()
    path.write_bytes(bytes(4095))
    refused("has 4095 bytes, but the region 'r' is to have 4096 bytes at offset 0")
    gc.collect()
    assert descriptors() == before
    assert regions.status() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's object")
def test_another_users_object_is_refused(regions, memory):
    os.chown(FOLDER / memory.name, 12345, -1)
    with pytest.raises(ProtocolError, match="not a plain object of the user"):
        regions.register(SystemRegion("r", memory.name, 0, 1))


def test_a_lease_on_the_object_does_not_stop_the_server(regions, memory):
    descriptor = os.open(FOLDER / memory.name, os.O_RDONLY)
    memory.close()  # a lease is had only by the last who could write
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # it tells the holder that somebody wants to open the file
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:
            pytest.skip("leases are not to be had here")
        with pytest.raises(ProtocolError, match="cannot be opened: Resource temporarily unavailable"):
            regions.register(SystemRegion("r", memory.name, 0, 1))
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def test_an_object_that_is_cut_off_is_an_error_and_no_signal(regions, memory):
    regions.register(SystemRegion("r", memory.name, 0, 8192))
    access = access_to(regions)
    os.truncate(FOLDER / memory.name, 4096 + 3)
    with pytest.raises(ProtocolError, match="'r' was cut off after it was registered"):
        access.read(Region("r", 8192))
    with pytest.raises(ProtocolError, match="'r' was cut off after it was registered"):
        access.write(Region("r", 8192), memoryview(bytes(8192)))
    assert os.stat(FOLDER / memory.name).st_size == 4096 + 3  # writing did not make it longer
    assert len(access.read(Region("r", 4096 + 3))) == 4096 + 3


def test_a_sealed_object_is_refused_when_it_is_written():
    descriptor = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.truncate(descriptor, 64)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    opened = OpenRegion(SystemRegion("r", "/k", 0, 64), descriptor)
    with pytest.raises(ProtocolError, match="cannot be written"):
        opened.write(Region("r", 64), memoryview(bytes(64)))
    opened.read_into(Region("r", 64), memoryview(bytearray(64)))


def test_no_memory_left_is_said_as_such(regions, memory, monkeypatch):
    regions.register(SystemRegion("r", memory.name, 0, 8192))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match=r"No space left on device. Make room in /dev/shm"):
        access_to(regions).write(Region("r", 8), memoryview(bytes(8)))


def test_reads_and_writes_in_several_steps_are_put_together(regions, memory, monkeypatch):
    regions.register(SystemRegion("r", memory.name, 0, 8192))
    memory.buf[:8192] = bytes(range(256)) * 32
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, out, at: read(fd, [out[0][:1000]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, data, at: write(fd, [data[0][:1000]], at))
    access = access_to(regions)
    found = access.read(Region("r", 8000, 100))
    assert found == memory.buf[100:8100]
    access.write(Region("r", 8000), memoryview(bytes(found)))
    assert memory.buf[:8000] == found


def test_names_limits_and_status(regions, memory):
    first, second = SystemRegion("a", memory.name, 0, 4096), SystemRegion("b", "/" + memory.name, 4096, 4096)
    regions.register(first)
    regions.register(second)
    with pytest.raises(ProtocolError, match=r"region 'a' is registered already. Unregister it first"):
        regions.register(SystemRegion("a", memory.name, 1, 1))
    assert regions.status() == [first, second]
    assert regions.status("b") == [second]
    with pytest.raises(HttpError, match="unable to find system shared memory region 'c'") as caught:
        regions.status("c")
    assert caught.value.status == 404
    for name in ("", "x" * 257):
        with pytest.raises(ProtocolError, match=f"name has {len(name)} characters, expected 1 to 256"):
            regions.register(SystemRegion(name, memory.name, 0, 1))
    for offset, size in ((0, 0), (-1, 5), (1, -1), ((1 << 63) - 1, 1)):
        with pytest.raises(ProtocolError, match="expected at least 0 and at least 1"):
            regions.register(SystemRegion("c", memory.name, offset, size))
    with pytest.raises(ProtocolError, match="may have 20000 bytes together"):
        regions.register(SystemRegion("c", memory.name, 0, 20_000 - 8191))
    regions.register(SystemRegion("c", memory.name, 0, 1))
    with pytest.raises(ProtocolError, match="3 regions of system shared memory are registered"):
        regions.register(SystemRegion("d", memory.name, 0, 1))
    regions.unregister("a")
    regions.unregister("never there")
    assert [region.name for region in regions.status()] == ["b", "c"]
    regions.unregister_all()
    assert regions.status() == []
    with pytest.raises(ProtocolError, match="unable to find shared memory region 'b': it is not registered"):
        access_to(regions).locate(Region("b", 1))


def test_nothing_is_registered_where_it_is_not_enabled(memory):
    regions = SystemRegions(None)
    with pytest.raises(ProtocolError, match=r"not enabled on this server\. Start it with --shared-memory-prefix"):
        regions.register(SystemRegion("r", memory.name, 0, 1))
    both = SharedRegions(regions, OFF)
    assert both.access(lambda nbytes: memoryview(b"")) is None
    assert both.extensions == ()
    regions.unregister("r")
    regions.unregister_all()
    assert regions.status() == []


def test_a_request_keeps_what_it_was_checked_against(regions, memory, prefix):
    before = descriptors()
    regions.register(SystemRegion("r", memory.name, 0, 64))
    access = access_to(regions)
    access.locate(Region("r", 64))
    regions.unregister("r")
    with shared_object(prefix, 8192, "other") as other:
        regions.register(SystemRegion("r", other.name, 0, 64))
        access.write(Region("r", 64), memoryview(b"here"))
        assert (bytes(memory.buf[:4]), bytes(other.buf[:4])) == (b"here", bytes(4))
        regions.unregister_all()
    del access
    gc.collect()
    assert descriptors() == before


class Engine:
    """Opens regions in the host's memory, as the engine's side does on a card."""

    def __init__(self) -> None:
        self.regions = CudaRegions(lambda handle, device, byte_size: torch.zeros(byte_size, dtype=torch.uint8))
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken = False

    async def open_region(self, region: DeviceRegion) -> None:
        await self.gate.wait()
        if self.broken:
            raise EngineError("the engine is gone.")
        self.regions.register(region.name, region.handle, region.device, region.byte_size)

    async def close_region(self, name: str) -> None:
        await self.gate.wait()
        self.regions.unregister(name)


def device_region(name: str, byte_size: int = 256) -> DeviceRegion:
    return DeviceRegion(name, bytes(64), 0, byte_size)


def test_device_regions_are_opened_by_the_engine():
    async def main():
        engine = Engine()
        regions = DeviceRegions(engine, max_regions=2)
        both = SharedRegions(SystemRegions(None), regions)
        assert both.extensions == ("cuda_shared_memory",)
        await both.register_device(device_region("a"))
        assert engine.regions.tensor("a", 0, torch.uint8, (256,)).shape == (256,)
        access = both.access(lambda nbytes: memoryview(b""))
        assert access.locate(Region("a", 128, 128)) == "device"
        with pytest.raises(ProtocolError, match="'a' has 256 bytes: 129 bytes at offset 128 are not within it"):
            access.locate(Region("a", 129, 128))
        engine.broken = True
        with pytest.raises(EngineError):
            await both.register_device(device_region("b"))
        engine.broken = False
        assert regions.status() == [device_region("a")] == regions.status("a")
        with pytest.raises(HttpError, match="unable to find cuda shared memory region 'b'"):
            regions.status("b")
        await both.register_device(device_region("b"))
        with pytest.raises(ProtocolError, match="2 regions of CUDA shared memory are registered"):
            await both.register_device(device_region("c"))
        await regions.unregister("a")
        await regions.unregister("never there")
        with pytest.raises(UsageError, match="it is not registered"):
            engine.regions.tensor("a", 0, torch.uint8, (1,))
        await regions.unregister_all()
        assert regions.status() == []
        with pytest.raises(ProtocolError, match="unable to find"):
            access.locate(Region("a", 1))

    asyncio.run(main())


def test_a_name_is_of_one_kind_only_also_while_the_engine_is_opening_it(prefix, memory):
    async def main():
        engine = Engine()
        both = SharedRegions(SystemRegions(prefix), DeviceRegions(engine))
        assert both.extensions == ("system_shared_memory", "cuda_shared_memory")
        engine.gate.clear()
        opening = asyncio.ensure_future(both.register_device(device_region("a")))
        await asyncio.sleep(0)
        for again in (both.register_device(device_region("a")), _soon(both, SystemRegion("a", memory.name, 0, 1))):
            with pytest.raises(ProtocolError, match="registered already"):
                await again
        engine.gate.set()
        await opening
        with pytest.raises(ProtocolError, match="registered already"):
            both.register_system(SystemRegion("a", memory.name, 0, 1))
        both.register_system(SystemRegion("s", memory.name, 0, 1))
        with pytest.raises(ProtocolError, match="registered already"):
            await both.register_device(device_region("s"))

    asyncio.run(main())


async def _soon(both: SharedRegions, region: SystemRegion) -> None:
    both.register_system(region)


def test_device_regions_are_off_by_default():
    async def main():
        with pytest.raises(ProtocolError, match=r"not enabled on this server. Start it with --cuda-shared-memory"):
            await OFF.register(device_region("a"))
        await OFF.unregister("a")
        await OFF.unregister_all()
        assert OFF.status() == []

    asyncio.run(main())
