"""The methods of the inference service beside inference: health, metadata, the repository, shared memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from onecard.server.grpc_calls import Answer, Calls, Handler
from onecard.server.grpc_face import Caller, RegionEntry, Regions, Right
from onecard.server.grpc_messages import inference_messages
from onecard.server.grpc_wire import read_message
from onecard.server.http_types import HttpError
from onecard.server.oip_types import ProtocolError, quote

if TYPE_CHECKING:
    from onecard.server.grpc_core import Rpc

_NOT_FOUND = 404
_ABSENT = {
    "TraceSetting": "which requests are traced cannot be changed while the server runs: it is an option of its start.",
    "LogSettings": "the log's settings cannot be changed while the server runs: they are options of its start.",
}


class ServiceMethods:
    """Answers what is not inference.

    Args:
        calls: what all RPCs share.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._face = calls.face
        self._messages = inference_messages()

    def handlers(self) -> dict[str, Handler]:
        """By method, each of one request and one answer."""
        table: dict[str, tuple[Right, Callable[[Any], Awaitable[Any]]]] = {
            "ServerLive": ("health", self._live),
            "ServerReady": ("health", self._ready),
            "ModelReady": ("health", self._model_ready),
            "ServerMetadata": ("infer", self._server_metadata),
            "ModelMetadata": ("infer", self._metadata),
            "ModelConfig": ("infer", self._config),
            "ModelStatistics": ("infer", self._statistics),
            "RepositoryIndex": ("infer", self._index),
            "RepositoryModelLoad": ("control", self._load),
            "RepositoryModelUnload": ("control", self._unload),
            "SystemSharedMemoryStatus": ("control", self._system_status),
            "SystemSharedMemoryRegister": ("control", self._system_register),
            "SystemSharedMemoryUnregister": ("control", self._system_unregister),
            "CudaSharedMemoryStatus": ("control", self._cuda_status),
            "CudaSharedMemoryRegister": ("control", self._cuda_register),
            "CudaSharedMemoryUnregister": ("control", self._cuda_unregister),
        }
        handlers = {name: self._calls.unary(right, self._read(name, do)) for name, (right, do) in table.items()}
        for name, why in _ABSENT.items():
            handlers[name] = self._calls.unary("control", _refusal(why))
        return handlers

    def _read(self, method: str, answer: Callable[[Any], Awaitable[Any]]) -> Answer:
        request_class = self._messages[f"{method}Request"]

        async def from_bytes(data: bytes, rpc: Rpc, _: Caller) -> bytes:
            request = read_message(request_class, data)
            rpc.model = _model_of(method, request)
            response = await answer(request)
            return response.SerializeToString()  # type: ignore[no-any-return]

        return from_bytes

    def _from_body(self, name: str, body: bytes) -> Any:
        """A message from the REST face's body, whose fields have the same names."""
        from google.protobuf import json_format

        return json_format.Parse(body, self._messages[name](), ignore_unknown_fields=True)

    async def _live(self, _: Any) -> Any:
        return self._messages["ServerLiveResponse"](live=self._face.live())

    async def _ready(self, _: Any) -> Any:
        ready = self._face.ready() and not self._calls.draining.is_set()
        return self._messages["ServerReadyResponse"](ready=ready)

    async def _model_ready(self, request: Any) -> Any:
        try:
            ready = self._face.model_ready(request.name, request.version) and not self._calls.draining.is_set()
        except HttpError as error:
            if error.status != _NOT_FOUND:
                raise
            ready = False
        return self._messages["ModelReadyResponse"](ready=ready)

    async def _server_metadata(self, _: Any) -> Any:
        return self._from_body("ServerMetadataResponse", self._face.server_metadata())

    async def _metadata(self, request: Any) -> Any:
        return self._from_body("ModelMetadataResponse", self._face.metadata(request.name, request.version))

    async def _config(self, request: Any) -> Any:
        config = self._from_body("ModelConfig", self._face.config(request.name, request.version))
        return self._messages["ModelConfigResponse"](config=config)

    async def _statistics(self, request: Any) -> Any:
        return self._from_body("ModelStatisticsResponse", await self._face.statistics(request.name, request.version))

    async def _index(self, request: Any) -> Any:
        return self._from_body("RepositoryIndexResponse", b'{"models":%b}' % self._face.index(request.ready))

    async def _load(self, request: Any) -> Any:
        _check_change(request)
        await self._face.load(request.model_name)
        return self._messages["RepositoryModelLoadResponse"]()

    async def _unload(self, request: Any) -> Any:
        _check_change(request)
        await self._face.unload(request.model_name)
        return self._messages["RepositoryModelUnloadResponse"]()

    def _system(self) -> Regions:
        return _enabled(self._face.system_regions, "system")

    def _cuda(self) -> Regions:
        return _enabled(self._face.cuda_regions, "CUDA")

    async def _system_status(self, request: Any) -> Any:
        response = self._messages["SystemSharedMemoryStatusResponse"]()
        for entry in await self._system().status(request.name):
            told = response.regions[entry.name]
            told.name, told.key, told.offset, told.byte_size = entry.name, entry.key, entry.offset, entry.byte_size
        return response

    async def _system_register(self, request: Any) -> Any:
        entry = RegionEntry(request.name, request.byte_size, key=request.key, offset=request.offset)
        await self._system().register(entry, b"")
        return self._messages["SystemSharedMemoryRegisterResponse"]()

    async def _system_unregister(self, request: Any) -> Any:
        await self._system().unregister(request.name)
        return self._messages["SystemSharedMemoryUnregisterResponse"]()

    async def _cuda_status(self, request: Any) -> Any:
        response = self._messages["CudaSharedMemoryStatusResponse"]()
        for entry in await self._cuda().status(request.name):
            told = response.regions[entry.name]
            told.name, told.device_id, told.byte_size = entry.name, entry.device_id, entry.byte_size
        return response

    async def _cuda_register(self, request: Any) -> Any:
        entry = RegionEntry(request.name, request.byte_size, device_id=request.device_id)
        await self._cuda().register(entry, request.raw_handle)
        return self._messages["CudaSharedMemoryRegisterResponse"]()

    async def _cuda_unregister(self, request: Any) -> Any:
        await self._cuda().unregister(request.name)
        return self._messages["CudaSharedMemoryUnregisterResponse"]()


def _model_of(method: str, request: Any) -> str:
    """The model that a request is about, for the access log; empty if it is about none."""
    if method.startswith("RepositoryModel"):
        return request.model_name  # type: ignore[no-any-return]
    return request.name if method.startswith("Model") else ""


def _refusal(why: str) -> Answer:
    async def refuse(_: bytes, __: Any, ___: Caller) -> bytes:
        raise HttpError(501, why)  # a new one: an error that is raised again and again keeps the frames of each time

    return refuse


def _enabled(regions: Regions | None, kind: str) -> Regions:
    if regions is None:
        raise HttpError(501, f"{kind} shared memory is not enabled on this server.")
    return regions


def _check_change(request: Any) -> None:
    """Refuse parameters that would change what is loaded: a bundle is what it is."""
    for name in request.parameters:
        if name != "unload_dependents":  # no model depends on another here
            raise ProtocolError(f"the parameter {quote(name)} of the model repository is not supported.")
