"""The shared-memory extensions: their requests read, their status written, and the table of their routes.

Source: Triton's "Shared-Memory Extension".
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote

import msgspec
from msgspec import Meta

from onecard.server.device_regions import DeviceRegion
from onecard.server.oip_types import Buffer, ProtocolError
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import SystemRegion

HANDLE_BYTES = 64
"""Of a ``cudaIpcMemHandle_t``: CUDA Runtime API, ``CUDA_IPC_HANDLE_SIZE``."""
Answer = bytes | Awaitable[bytes]
Route = Callable[[str, Buffer], Answer]
"""Answers a request: from the region's name, empty for all, and the body, to the body of the answer."""

_Bytes = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
_MOST_BODY_BYTES = 16 << 10
_MOST_KEY_CHARS = 256
_KINDS = ("systemsharedmemory", "cudasharedmemory")
_ENCODER = msgspec.json.Encoder()


class _RegisterSystem(msgspec.Struct):
    key: Annotated[str, Meta(max_length=_MOST_KEY_CHARS)]
    byte_size: _Bytes
    offset: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0


class _Handle(msgspec.Struct):
    b64: Annotated[str, Meta(max_length=2 * HANDLE_BYTES)]


class _RegisterDevice(msgspec.Struct):
    raw_handle: _Handle
    device_id: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    byte_size: _Bytes


_REGISTER_SYSTEM = msgspec.json.Decoder(_RegisterSystem)
_REGISTER_DEVICE = msgspec.json.Decoder(_RegisterDevice)


def parse_register_system(name: str, body: Buffer) -> SystemRegion:
    """Read ``POST /v2/systemsharedmemory/region/{name}/register``.

    Args:
        name: of the region.
        body: of the request.

    Raises:
        ProtocolError: a body that is not such a request.
    """
    found = _read(body, _REGISTER_SYSTEM)
    return SystemRegion(name, found.key, found.offset, found.byte_size)


def parse_register_device(name: str, body: Buffer) -> DeviceRegion:
    """Read ``POST /v2/cudasharedmemory/region/{name}/register``.

    Args:
        name: of the region.
        body: of the request.

    Raises:
        ProtocolError: a body that is not such a request, or a handle that is not 64 bytes in base64.
    """
    found = _read(body, _REGISTER_DEVICE)
    try:
        handle = base64.b64decode(found.raw_handle.b64, validate=True)
    except (binascii.Error, ValueError):
        raise ProtocolError("the 'raw_handle' is not base64.") from None
    if len(handle) != HANDLE_BYTES:
        raise ProtocolError(f"the 'raw_handle' has {len(handle)} bytes, expected {HANDLE_BYTES}.")
    return DeviceRegion(name, handle, found.device_id, found.byte_size)


def system_status(regions: Sequence[SystemRegion]) -> bytes:
    """The body of the answer to ``GET /v2/systemsharedmemory[/region/{name}]/status``."""
    return _ENCODER.encode(regions)


def device_status(regions: Sequence[DeviceRegion]) -> bytes:
    """The body of the answer to ``GET /v2/cudasharedmemory[/region/{name}]/status``; handles are not shown."""
    return _ENCODER.encode([{"name": r.name, "device_id": r.device, "byte_size": r.byte_size} for r in regions])


class Place(NamedTuple):
    """What a path of these extensions means.

    Args:
        route: kind and action, a key of the table: ``systemsharedmemory/status``.
        name: of the region; empty for all.
    """

    route: str
    name: str


def find_place(path: Sequence[str]) -> Place | None:
    """Read a path behind ``/v2``, split at its slashes and still percent-encoded; None if it is none of these."""
    if not path or path[0] not in _KINDS:
        return None
    match path:
        case [kind, action]:
            return Place(f"{kind}/{action}", "")
        case [kind, "region", name, action] if name:
            return Place(f"{kind}/{action}", unquote(name))
        case _:
            return None


def shared_memory_routes(regions: SharedRegions) -> dict[tuple[str, str], Route]:
    """The routes by method and :attr:`Place.route`. An answer without a body is empty, as Triton's."""

    def register_system(name: str, body: Buffer) -> Answer:
        region = parse_register_system(name, body)
        if regions.sharing is not None:
            return _empty(regions.register(region))
        regions.register_system(region)
        return b""

    async def register_device(name: str, body: Buffer) -> bytes:
        return await _empty(regions.register(parse_register_device(name, body)))

    def unregister_system(name: str, body: Buffer) -> Answer:
        if regions.sharing is not None:
            return _empty(regions.unregister("system", name))
        regions.unregister_system(name)
        return b""

    async def unregister_device(name: str, body: Buffer) -> bytes:
        return await _empty(regions.unregister("device", name))

    return {
        ("GET", "systemsharedmemory/status"): lambda name, _: system_status(regions.system.status(name)),
        ("POST", "systemsharedmemory/register"): register_system,
        ("POST", "systemsharedmemory/unregister"): unregister_system,
        ("GET", "cudasharedmemory/status"): lambda name, _: device_status(regions.device.status(name)),
        ("POST", "cudasharedmemory/register"): register_device,
        ("POST", "cudasharedmemory/unregister"): unregister_device,
    }


async def _empty(change: Awaitable[None]) -> bytes:
    """The body of the answer once a change is made."""
    await change
    return b""


def _read(body: Buffer, decoder: msgspec.json.Decoder[Any]) -> Any:
    if len(body) > _MOST_BODY_BYTES:
        raise ProtocolError(f"the request has {len(body)} bytes, at most {_MOST_BODY_BYTES} are taken.")
    try:
        return decoder.decode(body)
    except RecursionError:
        raise ProtocolError("the JSON is nested too deep.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the request cannot be read: {error}.") from None
