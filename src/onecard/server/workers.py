"""The further front processes as the main one has them: told what they must know, asked what they count."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from onecard.errors import OnecardError, UsageError
from onecard.server.http_types import LOGGER
from onecard.server.serving import Serving
from onecard.server.worker_keeper import KeeperOptions, WorkerKeeper
from onecard.server.worker_messages import (
    AnyMessage,
    AskState,
    Begin,
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
    TlsFiles,
    UnloadModel,
    Unregister,
    WorkerSetup,
    failure_of,
)
from onecard.server.worker_regions import RegionsOfAll
from onecard.telemetry.snapshot import Snapshot, encode

MOST_FRONTS = 64
"""Processes with sockets."""

_FIGURES_S = 1.0  # a worker that does not tell what it counts by then is left with what it told last
_SETTLE_S = 5.0  # for all workers to hear of a load
_OPENING_S = 60.0  # for all workers to open their doors


@dataclass(frozen=True)
class WorkersOptions:
    """How many processes have sockets, and what they must know that is said nowhere else.

    Args:
        fronts: processes with sockets; the main one is the first.
        tls: the files of the listening context.
        log_form: ``human`` or ``json``.
        log_level: the least severe that is logged.
        keeper: see :class:`onecard.server.worker_keeper.KeeperOptions`.
    """

    fronts: int = 1
    tls: TlsFiles | None = None
    log_form: Literal["human", "json"] = "human"
    log_level: str = "info"
    keeper: KeeperOptions = field(default_factory=KeeperOptions)


class Workers:
    """All further fronts; none at all, if the main one is to be alone.

    Args:
        serving: the main front's models.
        suspect: called with an engine's socket and the reason, when a worker lost its connection to that engine.
    """

    def __init__(self, serving: Serving, suspect: Callable[[Path, str], None]) -> None:
        self._serving = serving
        self._keepers: list[WorkerKeeper] = []
        self._socket: Path | None = None  # of the engine that lives
        self._read_state: Callable[[], Awaitable[Snapshot]] | None = None
        self._regions = RegionsOfAll(serving.regions, self._keepers)
        self._heard: dict[type, Callable[[WorkerKeeper, Any], None]] = {
            MayOpen: self._list,
            Opened: self._opened,
            EngineLost: lambda _, lost: suspect(Path(lost.socket), f"another front: {lost.reason}"),
        }
        self._calls: dict[type, Callable[[Any], Coroutine[Any, Any, bytes | None]]] = {
            LoadModel: lambda asked: self._load(asked.name),
            UnloadModel: lambda asked: self._unload(asked.name, asked.drain_s),
            AskState: lambda _: self._state(),
            RegisterSystem: lambda asked: self._regions.register(asked.region),
            RegisterDevice: lambda asked: self._regions.register(asked.region),
            Unregister: lambda asked: self._regions.unregister(asked.kind, asked.name),
        }

    @property
    def fronts(self) -> int:
        """Processes that take connections."""
        return 1 + sum(keeper.is_open for keeper in self._keepers)

    @property
    def restarts(self) -> int:
        """How many workers were started after one that had ended."""
        return sum(keeper.restarts for keeper in self._keepers)

    def start(
        self,
        options: WorkersOptions,
        setup: WorkerSetup,
        listening: int | None,
        read_state: Callable[[], Awaitable[Snapshot]],
    ) -> None:
        """Start the further fronts.

        Args:
            options: how many.
            setup: what they must know.
            listening: descriptor of the Unix-domain socket that the main front listens on, if it does.
            read_state: the whole server's figures.
        """
        if options.fronts == 1:
            return
        self._read_state = read_state
        self._serving.on_changed = self.settle
        self._serving.regions.sharing = self._regions
        descriptors = () if listening is None else (listening,)
        for number in range(1, options.fronts):
            begin = Begin(number, setup)
            self._keepers.append(WorkerKeeper(begin, descriptors, self._greet, self._hear, options.keeper))

    async def open(self) -> None:
        """All models are open: the workers may take connections. Returns when they do."""
        await self.settle()
        end = asyncio.get_running_loop().time() + _OPENING_S
        while not all(keeper.is_open for keeper in self._keepers):
            if asyncio.get_running_loop().time() > end:
                LOGGER.warning("%d of %d front processes take connections", self.fronts, 1 + len(self._keepers))
                return
            await asyncio.sleep(0.02)

    async def settle(self) -> None:
        """Tell of the models; returns when all open workers have heard of what the engine had told of them."""
        calls = self._tell_wanted()
        if calls:
            await asyncio.wait(calls, timeout=_SETTLE_S)

    async def parts(self) -> list[Snapshot]:
        """What the workers count, and those had counted that ended."""
        asked = [asyncio.ensure_future(keeper.ask()) for keeper in self._keepers if keeper.is_open]
        for task in asked:
            task.add_done_callback(_forget)
        if asked:
            _, late = await asyncio.wait(asked, timeout=_FIGURES_S)
            for task in late:
                task.cancel()
        known = {(model.name, model.version) for model in self._serving.client.models.values()}
        return [_only(part, known) for keeper in self._keepers for part in keeper.figures]

    async def stop(self, drain_s: float) -> None:
        """End all workers.

        Args:
            drain_s: how long they may take to answer what came in.
        """
        await asyncio.gather(*(keeper.stop(drain_s) for keeper in self._keepers))

    # What the engine's guard tells

    @property
    def answered(self) -> int:
        """Requests that engines have answered to workers, as of the last second."""
        return sum(keeper.answered for keeper in self._keepers)

    def engine_listens(self, socket: Path) -> None:
        """There is an engine."""
        self._socket = socket
        self._tell(EngineListens(str(socket)))

    def engine_died(self) -> None:
        """It is dead, surely."""
        self._socket = None
        self._tell(EngineDied())
        self._tell_wanted()

    def engine_recovered(self, seconds: float) -> None:
        """So long after that the first model serves again."""
        self._tell(EngineRecovered(seconds))

    def gave_up(self, name: str, error: OnecardError) -> None:
        """A model that served cannot be opened again."""
        self._tell(GivenUp(name, failure_of(error)))
        self._tell_wanted()

    # What a worker says

    def _hear(self, keeper: WorkerKeeper, message: AnyMessage, descriptors: list[int]) -> None:
        call = self._calls.get(type(message))
        if call is not None and keeper.link is not None:
            keeper.link.carry_out(message.call, call(message))  # type: ignore[union-attr]  # all of them have one
        else:
            self._heard[type(message)](keeper, message)

    def _greet(self, keeper: WorkerKeeper) -> None:
        """Tell a new worker what came before it."""
        if keeper.link is None:
            return
        self._regions.tell_all(keeper.link)
        keeper.link.call(self._wanted).add_done_callback(_forget)
        if self._socket is not None:
            keeper.link.send(EngineListens(str(self._socket)))

    def _list(self, keeper: WorkerKeeper, asked: MayOpen) -> None:
        keeper.listed = True  # what was sent before is read by it before the answer
        if keeper.link is not None:
            keeper.link.carry_out(asked.call, _nothing())

    def _opened(self, keeper: WorkerKeeper, _: Opened) -> None:
        keeper.is_open = True
        LOGGER.info("front process %d (%s) takes connections", keeper.number, keeper.pid)

    async def _load(self, name: str) -> None:
        await self._serving.load(name)

    async def _unload(self, name: str, drain_s: float) -> None:
        await self._serving.unload(name, drain_s)

    async def _state(self) -> bytes:
        assert self._read_state is not None
        return encode(await self._read_state())

    def _tell(self, message: AnyMessage) -> None:
        for keeper in self._keepers:
            if keeper.link is not None:
                keeper.link.send(message)

    def _tell_wanted(self) -> list[asyncio.Future[bytes]]:
        """Tell of the models; the answers to be of those workers that a change waits for."""
        waited = []
        for keeper in self._keepers:
            if keeper.link is not None:
                call = keeper.link.call(self._wanted)
                call.add_done_callback(_forget)
                if keeper.listed:
                    waited.append(call)
        return waited

    def _wanted(self, call: int) -> ModelsWanted:
        client = self._serving.client
        models = [client.models.get(name) for name in client.wanted]
        served = tuple(model.name for model in models if model is not None and model.contract is not None)
        return ModelsWanted(call, self._serving.started, tuple(client.wanted), served)


def _only(part: Snapshot, known: set[tuple[str, str]]) -> Snapshot:
    """Less the models that are not served any more, unless requests of them are open."""
    models = tuple(model for model in part.models if (model.name, model.version) in known or model.in_flight)
    return msgspec.structs.replace(part, models=models)


async def _nothing() -> None:
    return None


def _forget(done: asyncio.Future[Any]) -> None:
    """Nobody asks how it ended."""
    if not done.cancelled():
        done.exception()


def check_free(host: str, port: int) -> None:
    """See that nobody listens there: a socket that shares its port would not be told.

    Raises:
        UsageError: somebody does, or the address is not this machine's.
    """
    if not port:
        return
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: connections may linger
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise UsageError(f"Listening on {host}:{port} is not possible: {error}.", "Choose another address.") from error
