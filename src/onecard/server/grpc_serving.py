"""What the gRPC front asks of the server, answered from the same models, rights and shared memory as HTTP's."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from onecard import __version__
from onecard.server.access import Access
from onecard.server.app import EXTENSIONS
from onecard.server.device_regions import DeviceRegion
from onecard.server.grpc_face import Answers, Caller, RegionEntry, Right
from onecard.server.oip_contract import InferContract
from onecard.server.oip_metadata import model_config, model_metadata, server_metadata
from onecard.server.oip_repository import repository_index
from onecard.server.oip_seen import DEFAULT_PRIORITY
from onecard.server.oip_types import InferRequest, RegionAccess
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import SystemRegion


class GrpcServing:
    """The server as the gRPC front sees it (:class:`onecard.server.grpc_face.Inference`).

    Args:
        serving: the models.
        access: who may do what.
        regions: shared memory that clients may register.
    """

    def __init__(self, serving: Serving, access: Access, regions: SharedRegions) -> None:
        self._serving = serving
        self._access = access
        self._regions = regions
        self.system_regions = _SystemEntries(regions) if regions.system.enabled else None
        self.cuda_regions = _DeviceEntries(regions) if regions.device.enabled else None

    def admit(self, right: Right, caller: Caller) -> None:
        if right != "health":
            self._access.check(right, caller.headers, caller.address, caller.address == "unix")

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self._serving.is_ready

    def model_ready(self, model: str, version: str) -> bool:
        self._serving.find(model, version)
        return self._serving.is_model_ready(model)

    def server_metadata(self) -> bytes:
        return server_metadata(__version__, (*EXTENSIONS, *self._regions.extensions))

    def metadata(self, model: str, version: str) -> bytes:
        served, contract = self._serving.find(model, version)
        return model_metadata(model, [served.version], contract.spec, contract.also)

    def config(self, model: str, version: str) -> bytes:
        _, contract = self._serving.find(model, version)
        return model_config(model, contract.spec, DEFAULT_PRIORITY + 1, contract.also)

    async def statistics(self, model: str, version: str) -> bytes:
        if model:
            self._serving.find(model, version)
        return await self._serving.statistics(model)

    def index(self, only_ready: bool) -> bytes:
        return repository_index(self._serving.index(), only_ready)

    async def load(self, model: str) -> None:
        await self._serving.load(model)

    async def unload(self, model: str) -> None:
        await self._serving.unload(model)

    def contract(self, model: str, version: str) -> tuple[InferContract, str]:
        served, contract = self._serving.find(model, version)
        return contract, served.version

    def region_access(self) -> RegionAccess | None:
        return self._regions.access(self._serving.client.allocate)

    def infer(self, model: str, request: InferRequest, *, client: str) -> Awaitable[Answers]:
        return self._serving.infer(model, request, client)

    def refused(self, model: str, error: Exception) -> None:
        self._serving.refuse(model, error)


class _SystemEntries:
    """The system's shared memory, in the front's words."""

    def __init__(self, regions: SharedRegions) -> None:
        self._regions = regions

    async def status(self, name: str) -> Sequence[RegionEntry]:
        return [RegionEntry(r.name, r.byte_size, r.key, r.offset) for r in self._regions.system.status(name)]

    async def register(self, entry: RegionEntry, raw_handle: bytes) -> None:
        await self._regions.register(SystemRegion(entry.name, entry.key, entry.offset, entry.byte_size))

    async def unregister(self, name: str) -> None:
        await self._regions.unregister("system", name)


class _DeviceEntries:
    """CUDA's shared memory, in the front's words."""

    def __init__(self, regions: SharedRegions) -> None:
        self._regions = regions

    async def status(self, name: str) -> Sequence[RegionEntry]:
        found = self._regions.device.status(name)
        return [RegionEntry(r.name, r.byte_size, device_id=r.device) for r in found]

    async def register(self, entry: RegionEntry, raw_handle: bytes) -> None:
        await self._regions.register(DeviceRegion(entry.name, raw_handle, entry.device_id, entry.byte_size))

    async def unregister(self, name: str) -> None:
        await self._regions.unregister("device", name)
