"""What the server's main process and a further front process, a worker, say to each other.

The main process keeps the engine alive, decides which models there are, and has all shared memory that clients
registered. A worker has its own sockets, its own connection to the engine, and its own requests. What is asked of a
worker and is not its to decide, it asks the main process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from onecard import errors
from onecard.errors import EngineError, OnecardError, QueueFullError
from onecard.server.device_regions import DeviceRegion
from onecard.server.engine_client import ClientOptions
from onecard.server.grpc_limits import GrpcListen
from onecard.server.http_types import HttpError, HttpLimits
from onecard.server.repository import Source
from onecard.server.shared_regions import Kind
from onecard.server.system_regions import SystemRegion
from onecard.server.traces import TraceOptions
from onecard.telemetry.exposition import Compatibility


@dataclass(frozen=True)
class TlsFiles:
    """The files of TLS, as :func:`onecard.server.http_tls.tls_context` takes them."""

    certificate: Path
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker must know to be a front like the main one.

    Args:
        sources: of models, for the repository's index.
        folder: likewise.
        host: to listen on; None for no TCP.
        port: the main front's.
        tls: for TCP.
        limits: what connections may ask.
        client: memory for requests and answers.
        tokens: digests of the tokens for inference and for control.
        access_log: part of the requests that is logged.
        shared_memory: prefix of the system's shared memory that clients may name.
        cuda_shared_memory: whether clients may register memory of the device.
        grpc: where to listen for gRPC, with the main front's port.
        metrics_names: see :class:`onecard.server.serve.ServeOptions`.
        drain_s: for open requests, if the worker alone is told to end.
        trace: which requests are traced.
        log_form: ``human`` or ``json``.
        log_level: the least severe that is logged.
    """

    sources: dict[str, Source]
    folder: Path | None
    host: str | None
    port: int
    tls: TlsFiles | None
    limits: HttpLimits
    client: ClientOptions
    tokens: tuple[bytes | None, bytes | None]
    access_log: float
    shared_memory: str | None
    cuda_shared_memory: bool
    grpc: GrpcListen | None
    metrics_names: Compatibility
    drain_s: float
    trace: TraceOptions | None
    log_form: Literal["human", "json"]
    log_level: str


class WorkerMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages. One with a ``call`` is answered by an :class:`Ended`."""


class Failure(msgspec.Struct, frozen=True):
    """An error on its way to another process.

    Args:
        kind: name of its class in :mod:`onecard.errors`; ``HttpError`` for any that has a status of its own.
        message: of the error.
        cure: likewise.
        status: of an HttpError.
        headers: likewise.
    """

    kind: str
    message: str
    cure: str = ""
    status: int = 500
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Ended(WorkerMessage, frozen=True):
    """A call is over.

    Args:
        call: which.
        body: of its answer.
        failure: why there is none.
    """

    call: int
    body: bytes = b""
    failure: Failure | None = None


# From the main process to a worker


class Begin(WorkerMessage, frozen=True):
    """The first message. With it comes the descriptor of the listening Unix-domain socket, if there is one.

    Args:
        number: of the worker, from 1 on.
        setup: see :class:`WorkerSetup`.
    """

    number: int
    setup: WorkerSetup


class ModelsWanted(WorkerMessage, frozen=True):
    """Which models there are to be. The call is over when the worker has heard what the engine had told by then.

    Args:
        call: to find the answer by.
        started: whether all models that the server begins with were opened.
        wanted: names of those that must answer for the server to be ready.
        served: names of those of them that take requests, as far as the main front knows.
    """

    call: int
    started: bool
    wanted: tuple[str, ...]
    served: tuple[str, ...]


class EngineListens(WorkerMessage, frozen=True):
    """There is an engine: connect to it."""

    socket: str


class EngineDied(WorkerMessage, frozen=True):
    """The last engine is surely dead."""


class EngineRecovered(WorkerMessage, frozen=True):
    """So long it took until the next engine served."""

    seconds: float


class GivenUp(WorkerMessage, frozen=True):
    """A model that served before cannot be opened any more: what waits for it gets the error."""

    name: str
    failure: Failure


class AskFigures(WorkerMessage, frozen=True):
    """What this front counts: answered with an encoded :class:`onecard.telemetry.snapshot.Snapshot`."""

    call: int


class Drain(WorkerMessage, frozen=True):
    """Answer what came in, and end."""

    drain_s: float


# From a worker to the main process


class MayOpen(WorkerMessage, frozen=True):
    """A worker knows all models and wants to open its doors: from the answer on, changes wait for it."""

    call: int


class Opened(WorkerMessage, frozen=True):
    """It takes connections."""


class EngineLost(WorkerMessage, frozen=True):
    """The connection to an engine ended by itself.

    Args:
        socket: of that engine.
        reason: for the log.
    """

    socket: str
    reason: str


class LoadModel(WorkerMessage, frozen=True):
    """A client asked for it."""

    call: int
    name: str


class UnloadModel(WorkerMessage, frozen=True):
    """A client asked for it."""

    call: int
    name: str
    drain_s: float


class AskState(WorkerMessage, frozen=True):
    """What the whole server tells of itself: answered with an encoded snapshot."""

    call: int


# Both ways: a worker asks for it, and the main process has it done in all


class RegisterSystem(WorkerMessage, frozen=True):
    """Make a region known; to a worker the descriptor of its object comes with it."""

    call: int
    region: SystemRegion


class RegisterDevice(WorkerMessage, frozen=True):
    """Make a region known, and have the engine open it for the worker."""

    call: int
    region: DeviceRegion


class Unregister(WorkerMessage, frozen=True):
    """Forget a region, or with an empty name all of the kind."""

    call: int
    kind: Kind
    name: str


AnyMessage: TypeAlias = (
    Ended
    | Begin
    | ModelsWanted
    | EngineListens
    | EngineDied
    | EngineRecovered
    | GivenUp
    | AskFigures
    | Drain
    | MayOpen
    | Opened
    | EngineLost
    | LoadModel
    | UnloadModel
    | AskState
    | RegisterSystem
    | RegisterDevice
    | Unregister
)

_ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, OnecardError)
}


def failure_of(error: OnecardError) -> Failure:
    """An error as it travels."""
    if isinstance(error, HttpError):
        headers = tuple((bytes(name), bytes(value)) for name, value in error.headers)
        return Failure("HttpError", error.message, status=error.status, headers=headers)
    for kind in type(error).__mro__:  # a class that is not of the tree, for the nearest one that is
        if _ERRORS.get(kind.__name__) is kind:
            return Failure(kind.__name__, error.message, error.cure)
    return Failure("EngineError", error.message, error.cure)


def error_of(failure: Failure) -> OnecardError:
    """The error that travelled."""
    if failure.kind == "HttpError":
        return HttpError(failure.status, failure.message, failure.headers)
    kind = _ERRORS.get(failure.kind, EngineError)
    if kind is QueueFullError:
        return QueueFullError(failure.message, failure.cure)
    return kind(failure.message, failure.cure)


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} is no part of a message")


def _path(kind: type[Any], value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} is no part of a message")


encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
decode = msgspec.msgpack.Decoder(AnyMessage, dec_hook=_path).decode
