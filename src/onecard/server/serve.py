"""A server's life: it listens at once, is ready when every model proved itself, and drains before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from onecard.errors import OnecardError, UsageError
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.lane import OnBatch
from onecard.server.app import App, BodyMemory
from onecard.server.hosting import Hosting
from onecard.server.http_server import HttpServer, Listen, serve_http
from onecard.server.http_types import LOGGER, HttpLimits, HttpService


class Announce(Protocol):
    """Told how far the server is."""

    def listening(self, server: HttpServer) -> None:
        """It listens; models are still being opened."""
        ...

    def ready(self, hosting: Hosting) -> None:
        """Every model proved itself and is warm."""
        ...


@dataclass(frozen=True)
class ServeOptions:
    """What a server is told.

    Args:
        bundles: folder by model name.
        listen: where.
        limits: what connections may ask.
        max_bodies_bytes: of all bodies that are held at once; those in chunks or compressed count when they are whole.
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        engine: gives an engine's options for a bundle's folder.
        drain_s: how long requests that came in may take once the server was told to end.
    """

    bundles: dict[str, Path]
    listen: Listen = field(default_factory=Listen)
    limits: HttpLimits = field(default_factory=HttpLimits)
    max_bodies_bytes: int = 4 << 30
    device: str = "auto"
    engine: Callable[[Path], EngineOptions | None] = lambda folder: None
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
    if not options.bundles:
        raise UsageError("there is nothing to serve.", "Name at least one bundle.")
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
    hosting = Hosting(options.bundles, lambda folder, on_batch: _open(options, folder, on_batch))
    app = App(hosting)
    server = await serve_http(HttpService(app, BodyMemory(options.max_bodies_bytes)), options.listen, options.limits)
    told = asyncio.Event()
    announce.listening(server)
    with _signals(loop, told):
        opening = loop.run_in_executor(None, hosting.open_all)
        ending = asyncio.ensure_future(told.wait())
        try:
            either: list[asyncio.Future[Any]] = [opening, ending]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                announce.ready(hosting)
                await ending
                LOGGER.info("draining: %d connections", server.connections)
        finally:
            app.draining = True
            ending.cancel()
            await server.close(options.drain_s)
            with contextlib.suppress(OnecardError):
                await opening  # an engine that is still being opened cannot be left half made
            await loop.run_in_executor(None, hosting.close_all, 0.0)
    logging.getLogger(__name__).debug("the server ended")


def _open(options: ServeOptions, folder: Path, on_batch: OnBatch) -> Engine:
    return Engine.open(folder, options.device, options.engine(folder), on_batch)


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
