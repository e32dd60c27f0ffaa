"""Registered CUDA shared memory as a front knows it: names, bounds and handles. The engine alone opens the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from onecard.server.oip_types import ProtocolError
from onecard.server.system_regions import already_registered, check_name, not_registered


@dataclass(frozen=True)
class DeviceRegion:
    """Memory of a device that another process shares.

    Args:
        name: of the region.
        handle: 64 bytes, a ``cudaIpcMemHandle_t``.
        device: the card's number.
        byte_size: of the region.
    """

    name: str
    handle: bytes
    device: int
    byte_size: int


class DeviceEngine(Protocol):
    """Who opens the memory, at once or when there is an engine. Its coroutines raise an OnecardError if that fails."""

    async def open_region(self, region: DeviceRegion) -> None: ...

    def expect_region(self, region: DeviceRegion) -> None: ...

    async def close_region(self, name: str) -> None: ...


class DeviceRegions:
    """The regions that clients registered.

    Args:
        engine: opens them; None registers none.
        max_regions: at once.
    """

    def __init__(self, engine: DeviceEngine | None, max_regions: int = 64) -> None:
        self._engine = engine
        self._max_regions = max_regions
        self._regions: dict[str, DeviceRegion] = {}
        self._changing: set[str] = set()

    @property
    def enabled(self) -> bool:
        return self._engine is not None

    async def register(self, region: DeviceRegion) -> None:
        """Have the engine open memory, and give it a name.

        Raises:
            ProtocolError: not enabled, a name that is taken, or too many regions.
            OnecardError: the engine cannot open it.
        """
        if self._engine is None:
            raise ProtocolError(
                "CUDA shared memory is not enabled on this server.", "Start it with --cuda-shared-memory."
            )
        check_name(region.name)
        if self.is_taken(region.name):
            raise already_registered(region.name)
        if len(self._regions) + len(self._changing) >= self._max_regions:
            raise ProtocolError(f"{self._max_regions} regions of CUDA shared memory are registered, no more can be.")
        self._changing.add(region.name)
        try:
            await self._engine.open_region(region)
        finally:
            self._changing.discard(region.name)
        self._regions[region.name] = region

    def adopt(self, region: DeviceRegion) -> None:
        """Take over a region that is registered in another process of the server: the next engine is to open it."""
        if self._engine is not None:
            self._engine.expect_region(region)
            self._regions[region.name] = region

    async def unregister(self, name: str) -> None:
        """Forget a region; one that is not registered is none to forget. Requests under way may still use it."""
        if self._engine is None or self._regions.pop(name, None) is None:
            return
        self._changing.add(name)  # until the engine has forgotten it too
        try:
            await self._engine.close_region(name)
        finally:
            self._changing.discard(name)

    async def unregister_all(self) -> None:
        """Forget every region."""
        for name in list(self._regions):
            await self.unregister(name)

    def status(self, name: str = "") -> list[DeviceRegion]:
        """One region, or with an empty name all of them.

        Raises:
            HttpError: 404, there is no such region.
        """
        if not name:
            return list(self._regions.values())
        if name not in self._regions:
            raise not_registered("cuda", name)
        return [self._regions[name]]

    def find(self, name: str) -> DeviceRegion | None:
        """A region by its name."""
        return self._regions.get(name)

    def is_taken(self, name: str) -> bool:
        """Whether a region has this name, or is about to get or lose it."""
        return name in self._regions or name in self._changing
