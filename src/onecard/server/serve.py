"""A server's life: it listens at once, is ready when every model proved itself, and drains before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onecard.errors import MissingDependencyError, UsageError
from onecard.ipc.messages import ModelOptions
from onecard.server.access import Access
from onecard.server.app import App, access_logger, body_memory
from onecard.server.device_regions import DeviceRegions
from onecard.server.engine_client import ClientOptions, EngineClient
from onecard.server.engine_guard import EngineGuard, GuardOptions
from onecard.server.follow import follow, load_all
from onecard.server.grpc_limits import GrpcLimits, GrpcListen
from onecard.server.http_server import HttpServer, Listen, serve_http
from onecard.server.http_types import LOGGER, HttpLimits, HttpService
from onecard.server.logs import AccessLog
from onecard.server.repository import Repository, Source
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import SystemRegions
from onecard.server.watch import FolderWatch

if TYPE_CHECKING:
    from onecard.server.grpc_server import GrpcServer

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
        drain_s: how long requests that came in may take once the server was told to end.
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
    drain_s: float = 30.0


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
    main = _serve(options, announce)
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


async def _serve(options: ServeOptions, announce: Announce) -> None:
    loop = asyncio.get_running_loop()
    client = EngineClient(options.client)
    desired = {name: (source.path, source.options) for name, source in options.sources.items()}
    guard = EngineGuard(options.engine, client, desired, options.guard)
    device = DeviceRegions(client if options.cuda_shared_memory else None)
    regions = SharedRegions(SystemRegions(options.shared_memory), device)
    serving = Serving(client, Repository(options.sources, options.folder, options.model), regions)
    watch = FolderWatch(options.folder) if options.follow and options.folder is not None else None
    app = App(serving, options.access, regions)
    service = HttpService(app, body_memory(client), on_answer=access_logger(AccessLog(options.access_log)))
    server = await serve_http(service, options.listen, options.limits)
    try:
        rpcs = await _serve_grpc(options, serving, regions, announce)
    except BaseException:
        await server.close()
        raise
    told = asyncio.Event()
    announce.listening(server)
    with _signals(loop, told):
        opening = asyncio.ensure_future(_open(guard, serving, watch))
        ending = asyncio.ensure_future(told.wait())
        following: list[asyncio.Task[None]] = []
        try:
            either: list[asyncio.Future[Any]] = [opening, ending]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                if watch is not None:
                    following.append(asyncio.create_task(follow(watch, serving)))
                announce.ready(serving)
                await ending
                LOGGER.info("draining: %d connections", server.connections)
        finally:
            serving.draining = True
            for task in (ending, opening, *following):
                task.cancel()
            rpcs_closing = asyncio.ensure_future(rpcs.close(options.drain_s)) if rpcs is not None else None
            await server.close(options.drain_s)
            if rpcs_closing is not None:
                await rpcs_closing
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(opening, *following, return_exceptions=True)
            await guard.stop(_END_S)
            await client.close()
    logging.getLogger(__name__).debug("the server ended")


async def _open(guard: EngineGuard, serving: Serving, watch: FolderWatch | None) -> None:
    """Start the engine and open all models."""
    await guard.start()
    if watch is not None:
        await load_all(watch, serving)
    serving.started = True


async def _serve_grpc(
    options: ServeOptions, serving: Serving, regions: SharedRegions, announce: Announce
) -> GrpcServer | None:
    if options.grpc is None:
        return None
    from onecard.server.grpc_server import serve_grpc
    from onecard.server.grpc_serving import GrpcServing

    limits = GrpcLimits(max_message_bytes=options.limits.max_body_bytes, max_connections=options.limits.max_connections)
    try:
        rpcs = await serve_grpc(GrpcServing(serving, options.access, regions), options.grpc, limits)
    except MissingDependencyError as error:
        LOGGER.warning("there is no gRPC: %s", error)
        return None
    if rpcs.port is not None:
        announce.listening_grpc(rpcs.port)
    return rpcs


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
