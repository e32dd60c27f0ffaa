"""What the gRPC front asks of the server behind it: models, answers, and who may call what."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import unquote

from onecard.server.oip_contract import InferContract
from onecard.server.oip_types import InferRequest, RegionAccess

if TYPE_CHECKING:
    from onecard.server.grpc_core import Rpc

Right = Literal["infer", "control", "health"]
"""What a call wants: inference and metadata; loading, unloading and shared memory; whether the server lives."""


class Caller:
    """Who calls. Read when it is asked for, since most servers ask for little.

    Args:
        rpc: the call.
    """

    __slots__ = ("_rpc",)

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    @property
    def address(self) -> str:
        """The peer's IP address, or ``unix`` for one on a Unix-domain socket."""
        return _address(self._rpc.peer().rpartition(":")[0])

    @property
    def headers(self) -> dict[bytes, bytes]:
        """The RPC's metadata, names in lower case; values of a repeated name are joined by commas, as HTTP has it."""
        found: dict[bytes, bytes] = {}
        for name, value in self._rpc.metadata():
            key, data = name.encode(), value if isinstance(value, bytes) else value.encode("utf-8", "replace")
            found[key] = found[key] + b", " + data if key in found else data
        return found


class Answers(Protocol):
    """What the model gave to one request.

    Attributes:
        outputs: arrays by name; bfloat16 is carried by int16. A :class:`onecard.server.oip_types.Written` for one that
            is at its place in a device's shared memory already.
        version: of the model that answered.
    """

    @property
    def outputs(self) -> Mapping[str, Any]: ...

    @property
    def version(self) -> str: ...

    def release(self) -> None:
        """Nobody reads the arrays any more."""
        ...


class RegionEntry(NamedTuple):
    """A registered shared-memory region.

    Args:
        name: of the region.
        byte_size: of the region.
        key: of the system's shared-memory object; empty for CUDA.
        offset: in that object, in bytes.
        device_id: of a CUDA region.
    """

    name: str
    byte_size: int
    key: str = ""
    offset: int = 0
    device_id: int = 0


class Regions(Protocol):
    """The registry of one kind of shared memory. Every method raises a ProtocolError, or another OnecardError."""

    async def status(self, name: str) -> Sequence[RegionEntry]:
        """One region; all of them for an empty name."""
        ...

    async def register(self, entry: RegionEntry, raw_handle: bytes) -> None:
        """Register a region; the handle is CUDA's, and empty for system memory."""
        ...

    async def unregister(self, name: str) -> None:
        """Forget one region; all of them for an empty name."""
        ...


class Inference(Protocol):
    """The server behind the front. Bodies are those of the protocol's REST face, whose fields have the same names.

    A version may be empty: the one that serves. Every method that takes a model raises an ``HttpError`` 404 for one
    that is not there, 503 for one that is not ready, or another ``OnecardError``.

    Attributes:
        system_regions: registry of the system's shared memory; None where it is not enabled.
        cuda_regions: likewise of CUDA's.
    """

    @property
    def system_regions(self) -> Regions | None: ...

    @property
    def cuda_regions(self) -> Regions | None: ...

    def admit(self, right: Right, caller: Caller) -> None:
        """Let a call pass.

        Raises:
            HttpError: 401 or 403.
        """
        ...

    def live(self) -> bool: ...

    def ready(self) -> bool: ...

    def model_ready(self, model: str, version: str) -> bool: ...

    def server_metadata(self) -> bytes: ...

    def metadata(self, model: str, version: str) -> bytes: ...

    def config(self, model: str, version: str) -> bytes: ...

    async def statistics(self, model: str, version: str) -> bytes:
        """The body of ``/stats``, of all models if ``model`` is empty."""
        ...

    def index(self, only_ready: bool) -> bytes:
        """The body of ``/v2/repository/index``, a list."""
        ...

    async def load(self, model: str) -> None: ...

    async def unload(self, model: str) -> None: ...

    def contract(self, model: str, version: str) -> tuple[InferContract, str]:
        """What requests must satisfy, and the version that serves."""
        ...

    def region_access(self) -> RegionAccess | None:
        """Registered shared memory for one request; None where none is enabled."""
        ...

    def infer(self, model: str, request: InferRequest, *, client: str) -> Awaitable[Answers]:
        """Run the model. Cancelling what is returned cancels the request.

        Args:
            model: its name.
            request: its timeout is never longer than what is left of the RPC's deadline.
            client: whose it is, for fairness.
        """
        ...

    def refused(self, model: str, error: Exception) -> None:
        """A request for a model was not handed on, or :meth:`infer` raised; for the figures."""
        ...


@functools.lru_cache(maxsize=4096)
def _address(peer: str) -> str:
    """From what stands before the port in ``ipv4:127.0.0.1:80``, ``ipv6:%5B::1%5D:80`` or ``unix:PATH``."""
    kind, _, address = peer.partition(":")
    return unquote(address).strip("[]") if kind in ("ipv4", "ipv6") else "unix"
