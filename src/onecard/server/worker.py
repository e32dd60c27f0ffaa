"""A further front process: sockets, requests and a connection to the engine of its own, models as the main one says.

It is started by the server's main process: ``python -m onecard.server.worker --descriptor N``, with a socket to that
under that number. It ends with it, whatever ends that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from onecard.errors import EngineError, OnecardError
from onecard.server.access import Access
from onecard.server.device_regions import DeviceRegion, DeviceRegions
from onecard.server.engine_child import die_with_parent
from onecard.server.engine_client import EngineClient
from onecard.server.http_server import HttpServer, Listen
from onecard.server.http_tls import tls_context
from onecard.server.http_types import LOGGER, HttpError
from onecard.server.logs import setup_logs
from onecard.server.repository import Repository
from onecard.server.serve import Doors, ServeOptions, run_on_loop
from onecard.server.serving import Serving
from onecard.server.shared_regions import Kind, SharedRegions
from onecard.server.state import Life, Watched
from onecard.server.system_regions import SystemRegion, SystemRegions
from onecard.server.traces_export import TraceExport
from onecard.server.watching import WatchingPages
from onecard.server.worker_link import WorkerLink
from onecard.server.worker_messages import (
    AnyMessage,
    AskFigures,
    AskState,
    Begin,
    Drain,
    EngineDied,
    EngineListens,
    EngineLost,
    EngineRecovered,
    GivenUp,
    LoadModel,
    MayOpen,
    ModelsWanted,
    Opened,
    RegisterDevice,
    RegisterSystem,
    UnloadModel,
    Unregister,
    WorkerSetup,
    error_of,
)
from onecard.telemetry.snapshot import Snapshot, decode, encode

_ORPHANED = 71  # exit status of one whose main process is gone
_HEARING_S = 2.0  # for the engine to say what it had told of its models
_STATE_S = 5.0  # for the main process to read the whole server's state
_AGAIN_S = 0.1  # between two attempts to connect to an engine
_TRACES_S = 3.0  # for the last traces


class MainFront:
    """What the main process decides and knows (:class:`Control`, :class:`Sharing`, :class:`ServerState`).

    Args:
        link: to it.

    Attributes:
        wanted: names of the models that must answer for the server to be ready.
        serving: set once it is made: this process' models.
    """

    serving: Serving

    def __init__(self, link: WorkerLink) -> None:
        self._link = link
        self.wanted: Collection[str] = ()

    async def load(self, name: str) -> None:
        await self._link.call(lambda call: LoadModel(call, name))

    async def unload(self, name: str, drain_s: float) -> None:
        await self._link.call(lambda call: UnloadModel(call, name, drain_s))

    async def register(self, region: SystemRegion | DeviceRegion) -> None:
        def make(call: int) -> AnyMessage:
            return RegisterSystem(call, region) if isinstance(region, SystemRegion) else RegisterDevice(call, region)

        await self._link.call(make)

    async def unregister(self, kind: Kind, name: str) -> None:
        await self._link.call(lambda call: Unregister(call, kind, name))

    async def read(self) -> Snapshot:
        try:
            return decode(await asyncio.wait_for(self._link.call(AskState), _STATE_S))
        except asyncio.TimeoutError:
            raise HttpError(503, "the server's main process does not answer; come back later.") from None

    def bundle_of(self, name: str) -> Path:
        model, _ = self.serving.find(name)
        return Path(model.path)


class Worker:
    """One further front. Made in a running event loop, and for it alone.

    Args:
        sock: to the main process.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.ended = asyncio.Event()
        self.drain_s = 0.0
        self._link = WorkerLink(sock, self._hear, _orphaned)
        self._main = MainFront(self._link)
        self._opening: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._socket = ""  # of the engine that is there, as the main process said last
        self._expected: Collection[str] | None = None  # models that are to serve before the doors open
        self._begun = False
        self._failed: OnecardError | None = None
        self._traces: TraceExport | None = None
        self._carried: dict[type, Callable[[Any, list[int]], Any]] = {
            ModelsWanted: lambda asked, _: self._want(asked),
            AskFigures: lambda asked, _: self._figures(),
            RegisterSystem: self._register_system,
            RegisterDevice: lambda asked, _: self._register_device(asked.region),
            Unregister: lambda asked, _: self._unregister(asked),
        }
        self._told: dict[type, Callable[[Any], None]] = {
            EngineListens: self._on_engine,
            EngineDied: self._on_death,
            EngineRecovered: lambda told: setattr(self._client, "restart_s", told.seconds),
            GivenUp: lambda told: self._client.give_up(told.name, error_of(told.failure)),
            Drain: lambda told: self.end(told.drain_s),
        }

    async def live(self) -> None:
        """Serve until told to end.

        Raises:
            OnecardError: an address cannot be had, or there is no memory.
        """
        await self.ended.wait()
        if self._begun:
            await self._drain()
        self._link.close()
        if self._failed is not None:
            raise self._failed

    async def _drain(self) -> None:
        LOGGER.debug("front process %d is draining: %d connections", os.getpid(), self._doors.connections)
        self._serving.draining = True
        await _cancel(self._opening)
        await self._doors.close(self.drain_s)
        await _cancel(self._connecting)
        await self._client.close()
        if self._traces is not None:
            await self._traces.close(_TRACES_S)

    def end(self, drain_s: float | None = None) -> None:
        """Be told to end; the seconds for what came in are the setup's, if they are not given."""
        if drain_s is not None:
            self.drain_s = drain_s
        self.ended.set()

    # What the main process says

    def _hear(self, message: AnyMessage, descriptors: list[int]) -> None:
        if isinstance(message, Begin):
            try:
                self._begin(message, descriptors)
            except OnecardError as error:
                self._failed = error
                self.ended.set()
        elif self._failed is not None:
            return
        elif type(message) in self._told:
            self._told[type(message)](message)
        else:
            work = self._carried[type(message)](message, descriptors)
            self._link.carry_out(message.call, work)  # type: ignore[union-attr]  # all of them have one

    def _begin(self, told: Begin, descriptors: list[int]) -> None:
        setup = told.setup
        setup_logs(setup.log_form, setup.log_level)
        self.drain_s = setup.drain_s
        shared = socket.socket(fileno=descriptors[0]) if descriptors else None
        self._options = _options(setup, shared)
        self._client = EngineClient(setup.client, self._look)
        self._client.on_lost = self._on_lost
        self._regions = SharedRegions(
            SystemRegions(setup.shared_memory), DeviceRegions(self._client if setup.cuda_shared_memory else None)
        )
        self._regions.sharing = self._main
        self._serving = self._main.serving = Serving(
            self._client, Repository(setup.sources, setup.folder), self._regions, self._main
        )
        if setup.trace is not None:
            self._traces = TraceExport(setup.trace)
        self._doors = Doors(None if self._traces is None else self._traces.tracing)
        life = Life(lambda: 0, lambda: None, lambda: self._doors.connections)
        self._watched = Watched(self._serving, life, f"front-{told.number}")
        self._begun = True

    async def _want(self, told: ModelsWanted) -> None:
        self._serving.started = told.started
        self._main.wanted = told.wanted
        self._expected = told.served
        if self._client.connected:
            with contextlib.suppress(OnecardError, asyncio.TimeoutError):
                await asyncio.wait_for(self._client.ask(), _HEARING_S)  # behind what it had told before
        self._look()

    async def _figures(self) -> bytes:
        return encode(self._watched.part())

    async def _register_system(self, told: RegisterSystem, descriptors: list[int]) -> None:
        self._regions.system.adopt(told.region, descriptors[0])

    async def _register_device(self, region: DeviceRegion) -> None:
        if self._regions.device.is_taken(region.name):
            return  # it was told twice, as somebody who is new may be
        if self._client.connected:
            try:
                await self._regions.register_device(region)
                return
            except OnecardError:
                if self._client.connected:
                    raise
        self._regions.device.adopt(region)

    async def _unregister(self, told: Unregister) -> None:
        if told.kind == "system":
            self._regions.unregister_system(told.name)
        else:
            with contextlib.suppress(EngineError):  # there is none, and the next one will not know it
                await self._regions.unregister_device(told.name)

    # The engine

    def _on_engine(self, told: EngineListens) -> None:
        self._socket = told.socket
        self._connecting = asyncio.ensure_future(self._connect(Path(told.socket)))

    async def _connect(self, path: Path) -> None:
        while True:
            try:
                await self._client.connect(path)
                self._look()
                return
            except (OSError, OnecardError) as error:  # it died, which will be told; or it has no time for us
                LOGGER.debug("no connection to the engine at %s: %s", path, error)
            await asyncio.sleep(_AGAIN_S)

    def _on_death(self, _: EngineDied) -> None:
        self._socket = ""
        if self._connecting is not None:
            self._connecting.cancel()
        self._client.disconnect()

    def _on_lost(self, reason: str) -> None:
        """The connection ended by itself: the engine ends too, and then the main process says so."""
        if self._socket:
            self._link.send(EngineLost(self._socket, reason))

    # The doors

    def _look(self) -> None:
        """Open the doors once every model that serves elsewhere serves here too."""
        if self._opening is not None or self._expected is None or self.ended.is_set():
            return
        models = self._client.models
        known = all(name in models and models[name].contract is not None for name in self._expected)
        if known and self._serving.started and self._client.connected:
            self._opening = asyncio.ensure_future(self._open())

    async def _open(self) -> None:
        try:
            await self._link.call(MayOpen)
            pages = WatchingPages(self._main, self._options.metrics_names)
            await self._doors.open(self._options, self._serving, pages, _Silent())
        except OnecardError as error:
            self._failed = error
            self.ended.set()
        else:
            self._link.send(Opened())


class _Silent:
    """Told how far the server is; the main process says it."""

    def listening(self, server: HttpServer) -> None: ...

    def listening_grpc(self, port: int) -> None: ...

    def listening_metrics(self, port: int) -> None: ...

    def ready(self, serving: Serving) -> None: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the process by its command line; does not return."""
    parser = argparse.ArgumentParser(prog="onecard.server.worker", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--descriptor", type=int, required=True, help="of the socket to the main process")
    given = parser.parse_args(arguments)
    status = 0
    try:
        die_with_parent()
        run_on_loop(_live(socket.socket(fileno=given.descriptor)))
    except OnecardError as error:
        LOGGER.critical("a front process cannot go on: %s", error)
        status = error.exit_code
    raise SystemExit(status)


async def _live(sock: socket.socket) -> None:
    worker = Worker(sock)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, worker.end)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # a terminal sends it to all: the main process decides
    await worker.live()


def _options(setup: WorkerSetup, shared: socket.socket | None) -> ServeOptions:
    tls = setup.tls
    context = None if tls is None else tls_context(tls.certificate, tls.key, tls.client_ca)
    return ServeOptions(
        setup.sources,
        Listen(setup.host, setup.port, tls=context, reuse_port=True, shared=shared),
        setup.limits,
        setup.client,
        access=Access.of_digests(setup.tokens),
        access_log=setup.access_log,
        folder=setup.folder,
        grpc=setup.grpc,
        metrics_names=setup.metrics_names,
    )


def _orphaned(reason: str) -> None:
    """The main process is gone, and with it the engine: there is nobody to answer for."""
    LOGGER.error("the server's main process is gone: %s", reason)
    os._exit(_ORPHANED)


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


if __name__ == "__main__":
    main()
