"""A server behind the gRPC front that computes with NumPy in place of an engine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onecard.server.grpc_face import Caller, RegionEntry, Right
from onecard.server.grpc_limits import GrpcLimits, GrpcListen
from onecard.server.grpc_server import GrpcServer, serve_grpc
from onecard.server.http_types import HttpError
from onecard.server.oip_contract import InferContract
from onecard.server.oip_metadata import (
    Duration,
    InferCounts,
    ModelCounts,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from onecard.server.oip_repository import IndexEntry, repository_index
from onecard.server.oip_types import InferRequest, ProtocolError, Region
from onecard.spec import Range, Spec, TensorSpec

Compute = Callable[[Mapping[str, Any]], dict[str, Any]]
ECHO = Spec((TensorSpec("x", "float32", ("B", 3)),), (TensorSpec("y", "float32", ("B", 3)),), {"B": Range(1, 8)})


@dataclass
class Given:
    outputs: Mapping[str, Any]
    version: str
    face: NumpyFace

    def release(self) -> None:
        self.face.unreleased -= 1


@dataclass
class Memory:
    """Shared memory that is a dictionary of byte arrays: registry and access."""

    areas: dict[str, bytearray] = field(default_factory=dict)
    entries: dict[str, RegionEntry] = field(default_factory=dict)
    handles: list[bytes] = field(default_factory=list)

    async def status(self, name: str) -> Sequence[RegionEntry]:
        if name and name not in self.entries:
            raise ProtocolError(f"there is no region '{name}'.")
        return [entry for entry in self.entries.values() if name in ("", entry.name)]

    async def register(self, entry: RegionEntry, raw_handle: bytes) -> None:
        if entry.name in self.entries:
            raise ProtocolError(f"region '{entry.name}' is there already.")
        self.entries[entry.name] = entry
        self.areas[entry.name] = bytearray(entry.byte_size)
        self.handles.append(raw_handle)

    async def unregister(self, name: str) -> None:
        for each in [name] if name else list(self.entries):
            self.entries.pop(each, None)

    def _place(self, region: Region) -> memoryview:
        if region.name not in self.entries or region.offset + region.byte_size > len(self.areas[region.name]):
            raise ProtocolError(f"there is no such place in region '{region.name}'.")
        return memoryview(self.areas[region.name])[region.offset : region.offset + region.byte_size]

    def locate(self, region: Region) -> str:
        self._place(region)
        return "host"

    def read(self, region: Region) -> memoryview:
        return memoryview(bytes(self._place(region)))

    def write(self, region: Region, data: memoryview) -> None:
        self._place(region)[: len(data)] = data


class NumpyFace:
    """Implements ``Inference``.

    Args:
        specs: of the models.
        compute: gives the outputs of a request's inputs.

    Attributes:
        asked: every request, with its client.
        hold: while it is there and not set, none is answered.
        delay_s: how long each takes; a request whose first value is -1 takes an hour.
        refusal: raised in place of an answer.
        guard: what ``admit`` does.
        unreleased: answers that were not released.
        cancelled: requests that were cancelled.
    """

    def __init__(self, specs: dict[str, Spec], compute: Compute, labels: Mapping[str, Sequence[str]] | None = None):
        self.contracts = {name: InferContract(spec, labels=labels) for name, spec in specs.items()}
        self.compute = compute
        self.asked: list[tuple[InferRequest, str]] = []
        self.hold: threading.Event | None = None
        self.delay_s = 0.0
        self.refusal: Exception | None = None
        self.guard: Callable[[Right, Caller], None] = lambda right, caller: None
        self.unreleased = self.cancelled = 0
        self.is_ready = True
        self.refusals: list[tuple[str, Exception]] = []
        self.changes: list[tuple[str, str]] = []
        self.system_regions: Memory | None = None
        self.cuda_regions: Memory | None = None

    def admit(self, right: Right, caller: Caller) -> None:
        self.guard(right, caller)

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    def model_ready(self, model: str, version: str) -> bool:
        self.contract(model, version)
        return self.is_ready

    def server_metadata(self) -> bytes:
        return server_metadata("0.1", ["binary_tensor_data", "statistics"])

    def metadata(self, model: str, version: str) -> bytes:
        return model_metadata(model, ["1"], self.contract(model, version)[0].spec)

    def config(self, model: str, version: str) -> bytes:
        return model_config(model, self.contract(model, version)[0].spec, priorities=3)

    async def statistics(self, model: str, version: str) -> bytes:
        counts = InferCounts(success=Duration(len(self.asked), 7))
        names = [model] if model else list(self.contracts)
        return model_statistics([ModelCounts(name, "1", 5, inference_stats=counts) for name in names])

    def index(self, only_ready: bool) -> bytes:
        entries = [IndexEntry(name, "1", "READY") for name in self.contracts]
        return repository_index([*entries, IndexEntry("broken", "1", "UNAVAILABLE", "why")], only_ready)

    async def load(self, model: str) -> None:
        if model not in self.contracts:
            raise HttpError(404, f"there is no model '{model}'.")
        self.changes.append(("load", model))

    async def unload(self, model: str) -> None:
        self.changes.append(("unload", model))

    def contract(self, model: str, version: str) -> tuple[InferContract, str]:
        if model not in self.contracts or version not in ("", "1"):
            raise HttpError(404, f"there is no model '{model}' of version '{version}'.")
        return self.contracts[model], "1"

    def refused(self, model: str, error: Exception) -> None:
        self.refusals.append((model, error))

    def region_access(self) -> Memory | None:
        return self.system_regions

    async def infer(self, model: str, request: InferRequest, *, client: str) -> Given:
        self.asked.append((request, client))
        try:
            first = next(iter(request.inputs.values()), np.zeros(1)).reshape(-1)[:1]
            if self.delay_s or (first.size and first[0] == -1):
                await asyncio.sleep(3600 if first.size and first[0] == -1 else self.delay_s)
            while self.hold is not None and not self.hold.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.refusal is not None:
            raise self.refusal
        self.unreleased += 1
        return Given(self.compute(request.inputs), "1", self)


def echo_face() -> NumpyFace:
    """A model ``echo`` whose ``y`` is twice its ``x``."""

    def double(inputs: Mapping[str, Any]) -> dict[str, Any]:
        with np.errstate(all="ignore"):
            return {"y": inputs["x"] * 2}

    return NumpyFace({"echo": ECHO}, double)


@contextlib.contextmanager
def serving(face: NumpyFace, listen: GrpcListen | None = None, **limits: Any) -> Iterator[Running]:
    """A server on a free port, on a loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        made = serve_grpc(face, listen or GrpcListen(port=0), GrpcLimits(**limits))
        running = Running(asyncio.run_coroutine_threadsafe(made, loop).result(60), loop)
        try:
            yield running
        finally:
            running.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@dataclass
class Running:
    server: GrpcServer
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def close(self, drain_s: float = 0.0) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(drain_s), self.loop).result(60)

    def is_idle(self) -> bool:
        """Whether no RPC is open any more, as soon as a busy machine gets there."""
        end = time.monotonic() + 30
        while self.server.open_rpcs and time.monotonic() < end:
            time.sleep(0.005)
        return not self.server.open_rpcs
