"""A worker's process with an engine that is scripted: what it does when it is told of engines, models and regions."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import EngineError, UsageError
from onecard.server.device_regions import DeviceRegion
from onecard.server.engine_child import EngineChild
from onecard.server.engine_client import ClientOptions
from onecard.server.http_types import HttpLimits
from onecard.server.worker_keeper import KeeperOptions, WorkerKeeper
from onecard.server.worker_messages import (
    AnyMessage,
    Begin,
    EngineDied,
    EngineListens,
    EngineLost,
    LoadModel,
    MayOpen,
    ModelsWanted,
    Opened,
    RegisterDevice,
    Unregister,
    WorkerSetup,
)
from onecard.server.workers import check_free
from tests.unit.server.scripted_engine import Journal

pytestmark = pytest.mark.timeout(180)
HANDLE = bytes(range(64))
QUICK = KeeperOptions(
    look_s=0.1, hang_s=60.0, hang_starting_s=60.0, first_backoff_s=0.1, most_backoff_s=0.2, end_s=10.0
)


def setup(port: int) -> WorkerSetup:
    return WorkerSetup(
        {}, None, "127.0.0.1", port, None, HttpLimits(), ClientOptions(1 << 20, 1 << 20), (None, None), 0.0,
        None, True, None, "", 5.0, None, "human", "info",
    )  # fmt: skip


class Main:
    """What the main process would be: it answers with nothing, and notes what it hears."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.journal = Journal(folder / "journal")
        self.heard: list[AnyMessage] = []
        self.first: list[Callable[[int], AnyMessage]] = []
        self.engine: EngineChild | None = None
        self.lives = 0
        self.keeper = WorkerKeeper(Begin(1, setup(port)), (), self._greet, self._hear, QUICK)

    def _greet(self, keeper: WorkerKeeper) -> None:
        assert keeper.link is not None
        for make in self.first:
            keeper.link.call(make)

    def _hear(self, keeper: WorkerKeeper, message: AnyMessage, descriptors: list[int]) -> None:
        assert keeper.link is not None and not descriptors
        self.heard.append(message)
        if isinstance(message, MayOpen):
            keeper.listed = True
            keeper.link.carry_out(message.call, nothing())
        elif isinstance(message, Opened):
            keeper.is_open = True
        elif isinstance(message, LoadModel):
            keeper.link.carry_out(message.call, nothing())

    async def call(self, make: Callable[[int], AnyMessage]) -> bytes:
        assert self.keeper.link is not None
        return await asyncio.wait_for(self.keeper.link.call(make), 60)

    async def start_engine(self) -> None:
        self.lives += 1
        path = self.folder / f"{self.lives}.sock"
        command = [sys.executable, "-m", "tests.unit.server.scripted_engine", "--socket", str(path)]
        self.engine = EngineChild([*command, "--journal", str(self.journal.path)])
        await until(path.exists)
        await until(lambda: self.keeper.link)
        self.tell(EngineListens(str(path)))

    async def kill_engine(self) -> None:
        assert self.engine is not None
        self.engine.kill("by the test")
        await self.engine.ended
        await until(lambda: self.keeper.link)
        self.tell(EngineDied())

    def tell(self, message: AnyMessage) -> None:
        assert self.keeper.link is not None
        self.keeper.link.send(message)

    def regions(self, event: str) -> list[tuple[int, str]]:
        return [(line["life"], line["name"]) for line in self.journal.read(event)]

    def ask(self, path: str, method: str = "GET") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, b"" if method == "POST" else None)
            return connection.getresponse().status


async def nothing() -> None:
    return None


async def until(condition: Callable[[], object], seconds: float = 40.0) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not come to be"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Main]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    main = Main(folder, port)
    try:
        yield main
    finally:
        await main.keeper.stop(0.0)
        if main.engine is not None:
            main.engine.kill("the test is over")
            await main.engine.ended


def run(folder: Path, what: Callable[[Main], Awaitable[Any]]) -> None:
    async def whole() -> None:
        async with started(folder) as main:
            await what(main)

    asyncio.run(whole())


def wanted(call: int) -> ModelsWanted:
    return ModelsWanted(call, True, (), ())


def test_regions_of_the_device_are_opened_at_once_and_again_by_the_next_engine(tmp_path):
    async def what(main: Main) -> None:
        main.first = [wanted, lambda call: RegisterDevice(call, DeviceRegion("before", HANDLE, 0, 8))]
        await until(lambda: main.keeper.link)
        await main.start_engine()
        await until(lambda: main.keeper.is_open)
        await until(lambda: main.regions("open") == [(1, "before")])
        await main.call(lambda call: RegisterDevice(call, DeviceRegion("later", HANDLE, 0, 8)))
        await main.call(lambda call: RegisterDevice(call, DeviceRegion("later", HANDLE, 0, 8)))  # told twice
        assert main.regions("open") == [(1, "before"), (1, "later")]
        with pytest.raises(UsageError, match="it opens nothing"):
            await main.call(lambda call: RegisterDevice(call, DeviceRegion("bad", bytes(64), 0, 8)))
        await main.kill_engine()
        await main.call(lambda call: RegisterDevice(call, DeviceRegion("between", HANDLE, 0, 8)))
        await main.start_engine()
        await until(lambda: len(main.regions("open")) >= 6)
        assert sorted(name for life, name in main.regions("open") if life == 2) == ["before", "between", "later"]
        await main.call(lambda call: Unregister(call, "device", "later"))
        assert main.regions("close") == [(2, "later")]

    run(tmp_path, what)


def test_doors_open_when_there_is_an_engine_and_all_models_started(tmp_path):
    async def what(main: Main) -> None:
        main.first = [lambda call: ModelsWanted(call, False, (), ())]
        await until(lambda: main.keeper.link)
        await main.start_engine()
        await main.call(lambda call: ModelsWanted(call, False, (), ()))
        with pytest.raises(ConnectionError):
            main.ask("/v2/health/live")
        await main.call(lambda call: ModelsWanted(call, True, ("gone",), ()))
        await until(lambda: main.keeper.is_open)
        asked = asyncio.get_running_loop().run_in_executor
        assert await asked(None, main.ask, "/v2/health/live") == 200
        assert await asked(None, main.ask, "/v2/health/ready") == 503  # a model that is wanted is not there
        await main.call(wanted)
        assert await asked(None, main.ask, "/v2/health/ready") == 200
        assert await asked(None, main.ask, "/v2/repository/models/x/load", "POST") == 200
        assert [message.name for message in main.heard if isinstance(message, LoadModel)] == ["x"]

    run(tmp_path, what)


def test_a_connection_that_an_engine_breaks_is_told_with_whose_it_was(tmp_path):
    async def what(main: Main) -> None:
        main.first = [wanted]
        await until(lambda: main.keeper.link)
        await main.start_engine()
        await until(lambda: main.keeper.is_open)
        assert main.engine is not None
        main.engine.kill("by the test")
        await until(lambda: any(isinstance(message, EngineLost) for message in main.heard))
        (lost,) = [message for message in main.heard if isinstance(message, EngineLost)]
        assert lost.socket == str(main.folder / "1.sock")

    run(tmp_path, what)


def test_one_that_cannot_listen_ends_and_is_started_again_and_again(tmp_path, capfd):
    async def what(main: Main) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", main.port))
            taken.listen()
            main.first = [wanted]
            await until(lambda: main.keeper.link)
            await main.start_engine()
            await until(lambda: main.keeper.restarts >= 1)
        assert f"Listening on 127.0.0.1:{main.port} is not possible" in capfd.readouterr().err
        await until(lambda: main.keeper.link)
        await main.kill_engine()
        await main.start_engine()
        await until(lambda: main.keeper.is_open)

    run(tmp_path, what)


def test_one_that_stops_is_killed_and_one_that_is_told_to_end_is_not_started_again(tmp_path):
    async def what(main: Main) -> None:
        main.keeper._options = of_the_first = dataclasses.replace(QUICK)
        main.first = [wanted]
        await until(lambda: main.keeper.link)
        await main.start_engine()
        await until(lambda: main.keeper.is_open)
        first = main.keeper.pid
        assert first is not None
        object.__setattr__(of_the_first, "hang_s", 1.0)
        main.keeper._options = QUICK  # the next one may be as slow as the machine
        for _ in range(2):  # what is asked next has the new limit
            last = main.keeper._last
            await until(lambda last=last: main.keeper._last is not last)
        os.kill(first, signal.SIGSTOP)
        await until(lambda: main.keeper.restarts == 1)
        assert not Path(f"/proc/{first}").exists()
        await until(lambda: main.keeper.pid not in (None, first))
        last = main.keeper.pid
        await main.keeper.stop(0.0)
        assert main.keeper.restarts == 1 and not Path(f"/proc/{last}").exists() and main.keeper.link is None

    run(tmp_path, what)


def test_a_program_that_is_not_there_is_tried_again_and_leaves_no_descriptor(tmp_path):
    async def what() -> None:
        before = set(os.listdir("/proc/self/fd"))
        keeper = WorkerKeeper(Begin(1, setup(1)), (), lambda _: None, lambda *_: None, QUICK, [str(tmp_path / "none")])
        await until(lambda: keeper._fruitless >= 2)
        await keeper.stop(0.0)
        assert set(os.listdir("/proc/self/fd")) == before

    asyncio.run(what())


def test_a_port_that_somebody_listens_on_is_not_free():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another server with several fronts does
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"Listening on 127.0.0.1:{port} is not possible"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)
    check_free("127.0.0.1", 0)
    with pytest.raises(UsageError, match="is not possible"):
        check_free("192.0.2.1", 1)


def test_an_exit_of_no_use_is_an_engine_error_in_its_words(tmp_path):
    async def what() -> None:
        with pytest.raises(EngineError, match="a front process cannot be started"):
            EngineChild([str(tmp_path / "none")], "a front process")

    asyncio.run(what())
