"""What the front knows of the models: which there are, whom a request goes to, and what of it changes.

Every way in (HTTP, gRPC) asks here, so that all of them see the same models and refuse alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

import msgspec

from onecard.ipc.tensors import Target, Tensor
from onecard.server.engine_client import EngineClient
from onecard.server.engine_memory import OnDevice
from onecard.server.engine_request import EngineRequest
from onecard.server.engine_served import ServedModel
from onecard.server.http_types import HttpError
from onecard.server.oip_contract import InferContract
from onecard.server.oip_repository import IndexEntry
from onecard.server.oip_seen import DEFAULT_PRIORITY, SeenHeads
from onecard.server.oip_types import InferRequest, Region
from onecard.server.repository import Repository
from onecard.server.request_figures import reason_of
from onecard.server.shared_regions import SharedRegions

SOON = ((b"Retry-After", b"1"),)


class Control(Protocol):
    """The process that decides over the models, where that is another one."""

    @property
    def wanted(self) -> Collection[str]:
        """Names of the models that must answer for the server to be ready."""
        ...

    async def load(self, name: str) -> None:
        """As :meth:`Serving.load`."""
        ...

    async def unload(self, name: str, drain_s: float) -> None:
        """As :meth:`Serving.unload`."""
        ...


class Serving:
    """The models of a server.

    Args:
        client: the way to the engine.
        repository: what may be loaded.
        regions: shared memory that clients may register.
        control: who loads and unloads; None for this process.

    Attributes:
        started: all models that the server begins with were opened.
        draining: the server is going down: not ready any more.
        on_changed: awaited when a load or an unload is over, before whoever asked for it is answered.
    """

    def __init__(
        self, client: EngineClient, repository: Repository, regions: SharedRegions, control: Control | None = None
    ) -> None:
        self.client = client
        self.regions = regions
        self.repository = repository
        self.started = False
        self.draining = False
        self.on_changed: Callable[[], Awaitable[None]] | None = None
        self._control = control
        self._seen: dict[str, SeenHeads] = {}
        self._changing: dict[str, asyncio.Lock] = {}

    @property
    def is_ready(self) -> bool:
        """Whether every model that is wanted answers."""
        wanted = self.client.wanted if self._control is None else self._control.wanted
        return self.started and not self.draining and all(map(self.is_model_ready, wanted))

    def is_model_ready(self, name: str) -> bool:
        """Whether a model answers now."""
        model = self.client.models.get(name)
        return not self.draining and self.client.connected and model is not None and model.state == "READY"

    def find(self, name: str, version: str = "") -> tuple[ServedModel, InferContract]:
        """A model that takes requests; an empty version is the one there is.

        Raises:
            HttpError: 404, there is none; 503, it does not serve now.
        """
        model = self.client.models.get(name)
        if model is None:
            if not self.started and name in self.repository.sources:
                raise HttpError(503, f"model '{name}' is not ready: it is being loaded.", SOON)
            known = ", ".join(self.client.models)
            raise HttpError(404, f"there is no model '{name[:128]}': this server has {known}.")
        if model.contract is None:
            why = f" ({model.reason})" if model.reason else ""
            raise HttpError(503, f"model '{name}' is not ready: {model.state.lower()}{why}.", SOON)
        if version not in ("", model.version):
            raise HttpError(404, f"model '{name}' has no version '{version[:32]}': it has {model.version}.")
        return model, model.contract

    def seen(self, name: str, contract: InferContract) -> SeenHeads:
        """The heads of requests that a model's clients sent before."""
        found = self._seen.get(name)
        if found is None or found.contract is not contract:
            found = self._seen[name] = SeenHeads(contract)
        return found

    def infer(self, name: str, asked: InferRequest, client: str) -> EngineRequest:
        """Send a request to the engine; cancelling the future takes it back.

        Args:
            name: of the model.
            asked: its inputs, deadline and priority.
            client: whose it is.

        Raises:
            OnecardError: it cannot be taken on.
        """
        return self.client.infer(
            name,
            asked.inputs,
            asked.dtypes,
            timeout_s=asked.timeout_us / 1e6 if asked.timeout_us else None,
            priority=asked.priority or DEFAULT_PRIORITY,
            client=client,
            device=self._on_device(asked),
        )

    def refuse(self, name: str, error: Exception) -> None:
        """Count a request that was not handed on; one for a model that is not there is counted nowhere."""
        if name in self.client.models:
            self.client.figures(name).failures[reason_of(error)] += 1

    def _on_device(self, asked: InferRequest) -> OnDevice:
        """What of a request lies in CUDA shared memory."""
        find = self.regions.device.find
        places = [(wanted.name, wanted.region) for wanted in asked.outputs if wanted.region is not None]
        return OnDevice(
            tuple(Tensor(d.name, d.dtype, d.shape, d.region.offset, b"", d.region.name) for d in asked.on_device),
            tuple(Target(name, *_place(region)) for name, region in places if find(region.name) is not None),
        )

    def index(self) -> list[IndexEntry]:
        """All models, those included that could be loaded."""
        found = [IndexEntry(m.name, m.version, m.state, m.reason) for m in self.client.models.values()]
        known = {entry.name for entry in found}
        return found + [
            IndexEntry(name, "", "UNAVAILABLE" if self.started or name not in self.repository.sources else "LOADING")
            for name in self.repository.names()
            if name not in known
        ]

    async def statistics(self, name: str = "") -> bytes:
        """The body of the statistics extension, of one model or of all.

        Raises:
            OnecardError: the engine is not there to be asked.
        """
        told = (await self.client.ask()).statistics
        if not name:
            return told
        stats = [each for each in msgspec.json.decode(told)["model_stats"] if each["name"] == name]
        return msgspec.json.encode({"model_stats": stats})

    async def load(self, name: str) -> None:
        """Load a model, or load it again: the new one is proved and warm before the old one goes.

        Raises:
            HttpError: 404, there is no such bundle.
            OnecardError: it cannot be opened; what served goes on.
        """
        if self._control is not None:
            return await self._control.load(name)
        source = self.repository.find(name)
        try:
            async with self._changing.setdefault(name, asyncio.Lock()):
                await self.client.load(name, source.path, source.options)
        finally:
            await self._changed()

    async def unload(self, name: str, drain_s: float = 30.0) -> None:
        """Take no more requests for a model, answer those that wait, and release it.

        Raises:
            HttpError: 404, there is no such model.
        """
        if self._control is not None:
            return await self._control.unload(name, drain_s)
        if name not in self.client.models:
            raise HttpError(404, f"there is no model '{name[:128]}'.")
        try:
            async with self._changing.setdefault(name, asyncio.Lock()):
                await self.client.unload(name, drain_s)
        finally:
            await self._changed()

    async def _changed(self) -> None:
        if self.on_changed is not None:
            await self.on_changed()


def _place(region: Region) -> tuple[str, int, int]:
    return region.name, region.offset, region.byte_size
