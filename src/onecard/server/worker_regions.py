"""Shared memory that clients registered, known alike in all front processes before a client has its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from onecard.errors import OnecardError
from onecard.server.device_regions import DeviceRegion
from onecard.server.shared_regions import Kind, SharedRegions
from onecard.server.system_regions import SystemRegion
from onecard.server.worker_keeper import WorkerKeeper
from onecard.server.worker_link import WorkerLink
from onecard.server.worker_messages import AnyMessage, RegisterDevice, RegisterSystem, Unregister

_TAKEN_S = 10.0
"""A worker that has not taken a change over by then is killed: it would answer otherwise than the rest."""


class RegionsOfAll:
    """Makes changes in the main process first, then in all workers (:class:`onecard.server.shared_regions.Sharing`).

    Args:
        regions: the main process'.
        keepers: of the workers.
    """

    def __init__(self, regions: SharedRegions, keepers: Sequence[WorkerKeeper]) -> None:
        self._regions = regions
        self._keepers = keepers
        self._turn = asyncio.Lock()  # changes are made in one order everywhere

    async def register(self, region: SystemRegion | DeviceRegion) -> None:
        """As :meth:`SharedRegions.register`."""
        async with self._turn:
            if isinstance(region, SystemRegion):
                self._regions.register_system(region)
            else:
                await self._regions.register_device(region)
            try:
                await self._have_done(*self._told(region))
            except OnecardError:
                await self._unregister("device" if isinstance(region, DeviceRegion) else "system", region.name)
                raise

    async def unregister(self, kind: Kind, name: str) -> None:
        """As :meth:`SharedRegions.unregister`."""
        async with self._turn:
            await self._unregister(kind, name)

    def tell_all(self, link: WorkerLink) -> None:
        """Tell a new worker of all regions."""
        known: list[SystemRegion | DeviceRegion] = [*self._regions.system.status(), *self._regions.device.status()]
        for region in known:
            make, descriptors = self._told(region)
            link.call(make, descriptors).add_done_callback(_forget)

    async def _unregister(self, kind: Kind, name: str) -> None:
        try:
            if kind == "system":
                self._regions.unregister_system(name)
            else:
                await self._regions.unregister_device(name)
        finally:
            await self._have_done(lambda call: Unregister(call, kind, name))

    def _told(self, region: SystemRegion | DeviceRegion) -> tuple[Callable[[int], AnyMessage], Sequence[int]]:
        if isinstance(region, DeviceRegion):
            return lambda call: RegisterDevice(call, region), ()
        opened = self._regions.system.find(region.name)
        assert opened is not None  # it was registered a moment ago, in this turn
        return lambda call: RegisterSystem(call, region), (opened.descriptor,)

    async def _have_done(self, make: Callable[[int], AnyMessage], descriptors: Sequence[int] = ()) -> None:
        """Have a change made in all workers; those whose doors are not open yet need not be waited for.

        Raises:
            OnecardError: of the first worker that could not do it.
        """
        calls: dict[asyncio.Future[bytes], tuple[WorkerKeeper, WorkerLink]] = {}
        for keeper in self._keepers:
            if keeper.link is not None:
                call = keeper.link.call(make, descriptors)
                call.add_done_callback(_forget)
                if keeper.listed:
                    calls[call] = keeper, keeper.link
        if not calls:
            return
        done, late = await asyncio.wait(calls, timeout=_TAKEN_S)
        for call in late:
            calls[call][0].kill("it did not take over what a client registered")
        for call in done:
            error = call.exception()
            if error is not None and not calls[call][1].closed:  # one that is gone will be told when it is back
                raise error


def _forget(done: asyncio.Future[bytes]) -> None:
    """Nobody may ask how it ended."""
    if not done.cancelled():
        done.exception()
