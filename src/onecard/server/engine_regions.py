"""Memory of the device that other processes share: every engine is told of it before any request that speaks of it."""

from __future__ import annotations

import asyncio

from onecard.ipc.messages import CloseRegion, OpenRegion, Told
from onecard.server.device_regions import DeviceRegion
from onecard.server.engine_connection import EngineConnection
from onecard.server.http_types import LOGGER


class EngineRegions:
    """The regions that each engine is to have open.

    Args:
        connection: to one engine after the other.
    """

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection
        self._regions: dict[str, DeviceRegion] = {}

    async def open(self, region: DeviceRegion) -> None:
        """Have the engine, and all that come after it, open a region.

        Raises:
            OnecardError: it cannot be opened, or there is no engine.
        """
        await self._connection.call(
            lambda call: _opening(call, region),
            lambda ok: self._regions.update({region.name: region}) if ok else None,
        )

    def expect(self, region: DeviceRegion) -> None:
        """Have the next engine, and all that come after it, open a region."""
        self._regions[region.name] = region

    async def close(self, name: str) -> None:
        """Have the engine forget a region.

        Raises:
            OnecardError: there is no engine; the next one will not know it.
        """
        self._regions.pop(name, None)
        await self._connection.call(lambda call: CloseRegion(call, name))

    def open_again(self) -> None:
        """Have a new engine open all of them; one that it cannot open is logged, and requests that name it fail."""
        for region in self._regions.values():
            self._open_again(region)

    def _open_again(self, region: DeviceRegion) -> None:
        self._connection.call(lambda call: _opening(call, region)).add_done_callback(_log_failure)


def _opening(call: int, region: DeviceRegion) -> OpenRegion:
    return OpenRegion(call, region.name, region.handle, region.device, region.byte_size)


def _log_failure(opened: asyncio.Future[Told | None]) -> None:
    if not opened.cancelled() and (error := opened.exception()) is not None:
        LOGGER.error("shared memory is not known to the new engine: %s", error)
