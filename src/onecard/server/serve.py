"""A server's life: it listens at once, is ready when every model proved itself, and drains before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onecard.errors import MissingDependencyError, UsageError
from onecard.ipc.models import ModelOptions
from onecard.server.access import Access
from onecard.server.app import App, access_logger, body_memory
from onecard.server.device_regions import DeviceRegions
from onecard.server.engine_client import ClientOptions, EngineClient
from onecard.server.engine_guard import EngineGuard, GuardOptions
from onecard.server.follow import follow, load_all
from onecard.server.grpc_limits import GrpcLimits, GrpcListen
from onecard.server.http_protocol import SPARE_CONNECTIONS
from onecard.server.http_server import HttpServer, Listen, serve_http
from onecard.server.http_types import LOGGER, HttpLimits, HttpService
from onecard.server.logs import AccessLog
from onecard.server.open_files import allow_open_files
from onecard.server.repository import Repository, Source
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions
from onecard.server.state import Life, Watched
from onecard.server.system_regions import SystemRegions
from onecard.server.traces import TraceOptions, Tracing
from onecard.server.traces_export import TraceExport
from onecard.server.traces_http import traced_service
from onecard.server.watch import FolderWatch
from onecard.server.watching import MetricsPort, WatchingPages
from onecard.server.worker_messages import WorkerSetup
from onecard.server.workers import MOST_FRONTS, Workers, WorkersOptions, check_free
from onecard.telemetry.exposition import Compatibility

if TYPE_CHECKING:
    from onecard.server.grpc_server import GrpcServer

_METRICS_DRAIN_S = 1.0
_METRICS_LIMITS = HttpLimits(max_body_bytes=1, max_connections=64)
_TRACES_S = 3.0  # for the last traces
_SPARE_FILES = 512  # beside connections: shared memory that clients register, models, sockets of our own
_END_S = 5.0  # for an engine that has nothing to do any more
ENGINE_COMMAND = (sys.executable, "-m", "onecard.server.engine_process")


class Announce(Protocol):
    """Told how far the server is."""

    def listening(self, server: HttpServer) -> None:
        """It listens; models are still being opened."""
        ...

    def listening_grpc(self, port: int) -> None:
        """It listens for gRPC too."""
        ...

    def listening_metrics(self, port: int) -> None:
        """Metrics are to be had on a port of their own."""
        ...

    def ready(self, serving: Serving) -> None:
        """Every model proved itself and is warm."""
        ...


@dataclass(frozen=True)
class ServeOptions:
    """What a server is told.

    Args:
        sources: the models that it begins with.
        listen: where.
        limits: what connections may ask.
        client: memory for requests and answers.
        guard: when the engine counts as dead.
        access: who may do what.
        cuda_shared_memory: whether clients may register memory of the device.
        access_log: which part of all requests is logged, from 0 to 1; those that failed here always are.
        shared_memory: what the system's shared-memory objects that clients may name begin with; None for none.
        folder: of further bundles that may be loaded while it runs.
        follow: whether the models are to follow what is in the folder.
        model: how bundles of the folder are opened.
        engine: the command that starts an engine process.
        grpc: where to listen for gRPC; None for nowhere.
        metrics: where metrics are to be had alone, without tokens; None for nowhere but with all the rest.
        metrics_names: ``triton`` for its names of metrics beside onecard's.
        drain_s: how long requests that came in may take once the server was told to end.
        trace: which requests are traced, and who is told; None for none.
        workers: how many processes have sockets.
    """

    sources: dict[str, Source]
    listen: Listen = field(default_factory=Listen)
    limits: HttpLimits = field(default_factory=HttpLimits)
    client: ClientOptions = field(default_factory=ClientOptions)
    guard: GuardOptions = field(default_factory=GuardOptions)
    access: Access = field(default_factory=lambda: Access(None, None))
    access_log: float = 0.0
    shared_memory: str | None = None
    cuda_shared_memory: bool = False
    folder: Path | None = None
    follow: bool = False
    model: ModelOptions = field(default_factory=ModelOptions)
    engine: Sequence[str] = ENGINE_COMMAND
    grpc: GrpcListen | None = None
    metrics: Listen | None = None
    metrics_names: Compatibility = ""
    drain_s: float = 30.0
    trace: TraceOptions | None = None
    workers: WorkersOptions = field(default_factory=WorkersOptions)


def run_server(options: ServeOptions, announce: Announce) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends at once.

    Args:
        options: what to serve and where.
        announce: told of it.

    Raises:
        OnecardError: a model cannot be opened, or an address cannot be had.
        KeyboardInterrupt: told to end a second time.
    """
    if not options.sources and options.folder is None:
        raise UsageError("there is nothing to serve.", "Name at least one bundle, or a --model-repository.")
    if options.follow and options.folder is None:
        raise UsageError("there is no folder to follow.", "Name one: --model-repository FOLDER.")
    if not 1 <= options.workers.fronts <= MOST_FRONTS:
        raise UsageError(f"{options.workers.fronts} processes cannot have sockets, expected 1 to {MOST_FRONTS}.")
    allow_open_files(_open_files(options))
    run_on_loop(_trace_and_serve(options, announce))


def run_on_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a process on the fastest event loop there is."""
    try:
        import uvloop
    except ImportError:
        LOGGER.warning("uvloop is not installed: the server is slower without it (pip install 'onecard[serve]').")
        asyncio.run(main)
        return
    if sys.version_info >= (3, 11):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)
    else:
        uvloop.install()
        asyncio.run(main)


def _open_files(options: ServeOptions) -> int:
    """How many files a process with sockets may have to have open at once."""
    connections = options.limits.max_connections * (1 if options.grpc is None else 2) + SPARE_CONNECTIONS
    if options.metrics is not None:
        connections += _METRICS_LIMITS.max_connections + SPARE_CONNECTIONS
    return connections + _SPARE_FILES


async def _trace_and_serve(options: ServeOptions, announce: Announce) -> None:
    if options.trace is None:
        await _serve(options, announce, None)
        return
    traces = TraceExport(options.trace)
    try:
        await _serve(options, announce, traces.tracing)
    finally:
        await traces.close(_TRACES_S)


async def _serve(options: ServeOptions, announce: Announce, tracing: Tracing | None) -> None:
    loop = asyncio.get_running_loop()
    options = _on_shared_ports(options)
    client = EngineClient(options.client)
    desired = {name: (source.path, source.options) for name, source in options.sources.items()}
    guard = EngineGuard(options.engine, client, desired, options.guard)
    device = DeviceRegions(client if options.cuda_shared_memory else None)
    regions = SharedRegions(SystemRegions(options.shared_memory), device)
    serving = Serving(client, Repository(options.sources, options.folder, options.model), regions)
    guard.others = workers = Workers(serving, guard.suspect)
    doors = Doors(tracing)
    life = Life(lambda: guard.restarts, lambda: guard.pid, lambda: doors.connections, lambda: workers.fronts)
    watched = Watched(serving, life, "front" if options.workers.fronts == 1 else "front-0", workers.parts)
    await doors.open(options, serving, WatchingPages(watched, options.metrics_names), announce)
    told = asyncio.Event()
    with _signals(loop, told):
        workers.start(options.workers, _worker_setup(options, doors), doors.unix_socket, watched.read)
        opening = asyncio.ensure_future(_open(options, guard, workers, serving, watched, announce))
        ending = asyncio.ensure_future(told.wait())
        try:
            either: list[asyncio.Future[Any]] = [opening, ending]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                opening.result()  # it follows the folder for ever, or failed
                await ending
            LOGGER.info("draining: %d connections", doors.connections)
        finally:
            serving.draining = True
            for task in (ending, opening):
                task.cancel()
            await asyncio.gather(doors.close(options.drain_s), workers.stop(options.drain_s))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(opening, return_exceptions=True)
            watched.close()
            await guard.stop(_END_S)
            await client.close()
    logging.getLogger(__name__).debug("the server ended")


class Doors:
    """All ways in: HTTP, metrics on a port of their own, gRPC.

    Args:
        tracing: begins traces of inference; None for none.
    """

    def __init__(self, tracing: Tracing | None) -> None:
        self._tracing = tracing
        self._http: list[HttpServer] = []
        self._grpc: GrpcServer | None = None

    @property
    def connections(self) -> int:
        """Open ones of HTTP."""
        return sum(server.connections for server in self._http)

    @property
    def port(self) -> int:
        """Of HTTP; 0 without TCP."""
        return (self._http[0].port or 0) if self._http else 0

    @property
    def grpc_port(self) -> int:
        """Likewise of gRPC."""
        return 0 if self._grpc is None else self._grpc.port or 0

    @property
    def unix_socket(self) -> int | None:
        """The descriptor of the Unix-domain socket that HTTP listens on, if there is one."""
        sockets = self._http[0].sockets if self._http else ()
        return next((each.fileno() for each in sockets if each.family == socket.AF_UNIX), None)

    async def open(self, options: ServeOptions, serving: Serving, pages: WatchingPages, announce: Announce) -> None:
        """Listen everywhere.

        Raises:
            UsageError: an address that cannot be had; then nothing is open.
        """
        app = App(serving, options.access, serving.regions, pages)
        logger = access_logger(AccessLog(options.access_log))
        service = HttpService(app, body_memory(serving.client), app.admit, logger)
        limits = replace(options.limits, max_held_bytes=options.client.request_bytes)
        if self._tracing is not None:
            service = traced_service(service, self._tracing)
        try:
            self._http.append(await serve_http(service, options.listen, limits))
            if options.metrics is not None:
                metrics = HttpService(MetricsPort(pages))
                self._http.append(await serve_http(metrics, options.metrics, _METRICS_LIMITS))
            self._grpc = await _serve_grpc(options, serving, self._tracing)
        except BaseException:
            await self.close(0.0)
            raise
        announce.listening(self._http[0])
        for server in self._http[1:]:
            if server.port is not None:
                announce.listening_metrics(server.port)
        if self._grpc is not None and self._grpc.port is not None:
            announce.listening_grpc(self._grpc.port)

    async def close(self, drain_s: float) -> None:
        """Stop listening and let what came in be answered; metrics go last, so that the end can be watched too."""
        grpc = asyncio.ensure_future(self._grpc.close(drain_s)) if self._grpc is not None else None
        for server in self._http[:1]:
            await server.close(drain_s)
        if grpc is not None:
            await grpc
        for server in self._http[1:]:
            await server.close(min(drain_s, _METRICS_DRAIN_S))


async def _open(
    options: ServeOptions,
    guard: EngineGuard,
    workers: Workers,
    serving: Serving,
    watched: Watched,
    announce: Announce,
) -> None:
    """Start the engine and open all models; then follow the folder, if that is asked."""
    watch = FolderWatch(options.folder) if options.follow and options.folder is not None else None
    await guard.start()
    if watch is not None:
        await load_all(watch, serving)
    serving.started = True
    await workers.open()
    announce.ready(serving)
    await watched.read()  # the first reading of the sensors may take a second
    if watch is not None:
        await follow(watch, serving)


def _on_shared_ports(options: ServeOptions) -> ServeOptions:
    """With several processes, ports that all of them may listen on.

    Raises:
        UsageError: another server has one of them.
    """
    if options.workers.fronts == 1:
        return options
    for place in (options.listen, options.grpc):
        if place is not None and place.host is not None:
            check_free(place.host, place.port)
    grpc = None if options.grpc is None else replace(options.grpc, reuse_port=True)
    return replace(options, listen=replace(options.listen, reuse_port=True), grpc=grpc)


def _worker_setup(options: ServeOptions, doors: Doors) -> WorkerSetup:
    """What a further front is told: to be like this one."""
    grpc = options.grpc if doors.grpc_port else None
    workers = options.workers
    return WorkerSetup(
        sources=options.sources,
        folder=options.folder,
        host=options.listen.host,
        port=doors.port,
        tls=workers.tls,
        limits=options.limits,
        client=options.client,
        tokens=options.access.digests,
        access_log=options.access_log,
        shared_memory=options.shared_memory,
        cuda_shared_memory=options.cuda_shared_memory,
        grpc=None if grpc is None else replace(grpc, port=doors.grpc_port, uds=None),
        metrics_names=options.metrics_names,
        drain_s=options.drain_s,
        trace=options.trace,
        log_form=workers.log_form,
        log_level=workers.log_level,
    )


async def _serve_grpc(options: ServeOptions, serving: Serving, tracing: Tracing | None) -> GrpcServer | None:
    if options.grpc is None:
        return None
    from onecard.server.grpc_server import serve_grpc
    from onecard.server.grpc_serving import GrpcServing

    limits = GrpcLimits(max_message_bytes=options.limits.max_body_bytes, max_connections=options.limits.max_connections)
    try:
        face = GrpcServing(serving, options.access, serving.regions)
        return await serve_grpc(face, options.grpc, limits, tracing, AccessLog(options.access_log))
    except MissingDependencyError as error:
        LOGGER.warning("there is no gRPC: %s", error)
        return None


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, told: asyncio.Event) -> Iterator[None]:
    """The event is set by the first SIGTERM or Ctrl-C; the second ends the process as if nobody listened."""

    def tell(number: int) -> None:
        told.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
