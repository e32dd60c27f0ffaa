"""All registered shared memory of a front: one set of names for both kinds, and what a request may do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

from onecard.server.device_regions import DeviceRegion, DeviceRegions
from onecard.server.oip_types import HeldRegions, ProtocolError, Region, Where, quote
from onecard.server.system_regions import OpenRegion, SystemRegion, SystemRegions, already_registered, check_bounds

Allocate = Callable[[int], memoryview]
"""Gives writable memory of so many bytes."""

Kind: TypeAlias = Literal["system", "device"]
"""Of regions."""


class Sharing(Protocol):
    """Has changes made in all processes with sockets; they are made when it returns."""

    async def register(self, region: SystemRegion | DeviceRegion) -> None:
        """As :meth:`SharedRegions.register`."""
        ...

    async def unregister(self, kind: Kind, name: str) -> None:
        """As :meth:`SharedRegions.unregister`."""
        ...


class SharedRegions:
    """Both kinds of regions.

    Args:
        system: in the host's memory.
        device: in a device's memory.

    Attributes:
        sharing: makes changes, where there are several processes with sockets; None where this is the only one.
    """

    def __init__(self, system: SystemRegions, device: DeviceRegions) -> None:
        self.system = system
        self.device = device
        self.sharing: Sharing | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        """The protocol's names of what is enabled, for the server's metadata."""
        system = ("system_shared_memory",) if self.system.enabled else ()
        return (*system, "cuda_shared_memory") if self.device.enabled else system

    async def register(self, region: SystemRegion | DeviceRegion) -> None:
        """Give memory a name, in every process with sockets.

        Raises:
            OnecardError: it cannot be done; then it is done nowhere.
        """
        if self.sharing is not None:
            await self.sharing.register(region)
        elif isinstance(region, SystemRegion):
            self.register_system(region)
        else:
            await self.register_device(region)

    async def unregister(self, kind: Kind, name: str) -> None:
        """Forget a region, or with an empty name all of the kind, in every process with sockets.

        Raises:
            OnecardError: there is no engine; the next one will not know it.
        """
        if self.sharing is not None:
            await self.sharing.unregister(kind, name)
        elif kind == "system":
            self.unregister_system(name)
        else:
            await self.unregister_device(name)

    def unregister_system(self, name: str) -> None:
        """Forget a region of the system's memory here, or with an empty name all of them."""
        self.system.unregister(name) if name else self.system.unregister_all()

    async def unregister_device(self, name: str) -> None:
        """Forget a region of a device's memory here, or with an empty name all of them."""
        await (self.device.unregister(name) if name else self.device.unregister_all())

    def register_system(self, region: SystemRegion) -> None:
        """As :meth:`SystemRegions.register`; the name must not be of the other kind either."""
        if self.device.is_taken(region.name):
            raise already_registered(region.name)
        self.system.register(region)

    async def register_device(self, region: DeviceRegion) -> None:
        """As :meth:`DeviceRegions.register`; the name must not be of the other kind either."""
        if self.system.find(region.name) is not None:
            raise already_registered(region.name)
        await self.device.register(region)

    def access(self, allocate: Allocate) -> HeldRegions | None:
        """The regions for one request.

        Args:
            allocate: gives the memory that its inputs are copied to.

        Returns:
            None where neither kind is enabled.
        """
        return _RequestRegions(self, allocate) if self.system.enabled or self.device.enabled else None


class _RequestRegions:
    """Regions as one request found them: it keeps those that it was checked against, also when they are unregistered.

    Args:
        regions: all of them.
        allocate: gives the memory that is read into.
    """

    __slots__ = ("_allocate", "_found", "_regions")

    def __init__(self, regions: SharedRegions, allocate: Allocate) -> None:
        self._regions = regions
        self._allocate = allocate
        self._found: dict[str, OpenRegion] = {}

    def hold(self, places: Sequence[Region]) -> bool:
        for place in places:
            opened = self._regions.system.find(place.name)
            if opened is None or place.offset + place.byte_size > opened.region.byte_size:
                return False
            self._found[place.name] = opened
        return True

    def read_into(self, region: Region, out: memoryview) -> None:
        self._found[region.name].read_into(region, out)

    def locate(self, region: Region) -> Where:
        on_device = self._regions.device.find(region.name)
        if on_device is not None:
            check_bounds(region, on_device.byte_size)
            return "device"
        self._system(region)
        return "host"

    def read(self, region: Region) -> memoryview:
        opened = self._system(region)
        if not region.byte_size:
            return memoryview(b"")
        memory = self._allocate(region.byte_size)
        opened.read_into(region, memory)
        return memory

    def write(self, region: Region, data: memoryview) -> None:
        self._system(region).write(region, data)

    def _system(self, region: Region) -> OpenRegion:
        opened = self._found.get(region.name) or self._regions.system.find(region.name)
        if opened is None:
            raise ProtocolError(f"unable to find shared memory region {quote(region.name)}: it is not registered.")
        opened.check(region)
        self._found[region.name] = opened
        return opened
