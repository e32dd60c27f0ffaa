"""The connection between the main process and a worker: any message, in order, with its descriptors and its answer."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from onecard.errors import BundleError, EngineClosedError, EngineError, OnecardError, UsageError
from onecard.ipc.models import ModelOptions
from onecard.server.device_regions import DeviceRegion
from onecard.server.engine_client import ClientOptions
from onecard.server.grpc_limits import GrpcListen
from onecard.server.http_types import HttpError, HttpLimits
from onecard.server.oip_types import ProtocolError
from onecard.server.repository import Source
from onecard.server.system_regions import SystemRegion
from onecard.server.traces import TraceOptions
from onecard.server.worker_link import PIECE_BYTES, WorkerLink, pair
from onecard.server.worker_messages import (
    AnyMessage,
    AskFigures,
    AskState,
    Begin,
    EngineLost,
    LoadModel,
    RegisterDevice,
    RegisterSystem,
    TlsFiles,
    Unregister,
    WorkerSetup,
    decode,
    encode,
    error_of,
    failure_of,
)
from tests.unit.server.http_peers import LOOPS, new_loop

pytestmark = pytest.mark.timeout(180)
SETUP = WorkerSetup(
    {"m": Source(Path("/bundle"), ModelOptions(policy={"max_rows": 3}))}, Path("/folder"), "127.0.0.1", 1,
    TlsFiles(Path("/certificate"), None, Path("/ca")), HttpLimits(), ClientOptions(), (None, bytes(range(32))), 0.5,
    "prefix", True, GrpcListen(uds=Path("/s")), "triton", 30.0, TraceOptions("http://there", 0.1), "json", "debug",
)  # fmt: skip


class Side:
    """One end, and what it heard."""

    def __init__(self, sock: socket.socket) -> None:
        self.heard: list[AnyMessage] = []
        self.descriptors: list[int] = []
        self.lost: list[str] = []
        self.answer: Callable[[AnyMessage], Awaitable[bytes | None]] | None = None
        self.link = WorkerLink(sock, self._hear, self.lost.append)

    def _hear(self, message: AnyMessage, descriptors: list[int]) -> None:
        self.heard.append(message)
        self.descriptors += descriptors
        if self.answer is not None:
            self.link.carry_out(message.call, self.answer(message))  # type: ignore[union-attr]


@pytest.fixture(params=LOOPS)
def between(request):
    """Runs a coroutine with the two ends of a connection."""

    def runner(what: Callable[[Side, Side], Awaitable[None]]) -> None:
        async def whole() -> None:
            ours, theirs = map(Side, pair())
            try:
                await what(ours, theirs)
            finally:
                ours.link.close()
                theirs.link.close()

        loop = new_loop(request.param)
        try:
            loop.run_until_complete(whole())
        finally:
            loop.close()

    return runner


async def until(condition: Callable[[], object]) -> None:
    for _ in range(6000):  # half a minute
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to be")


@pytest.mark.parametrize(
    "message",
    [
        Begin(3, SETUP),
        RegisterDevice(1, DeviceRegion("d", bytes(range(64)), 1, 5)),
        RegisterSystem(2, SystemRegion("s", "/key", 1, 2)),
        Unregister(3, "system", ""),
    ],
)
def test_messages_are_what_they_were(message):
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "error",
    [
        HttpError(404, "none", ((b"Retry-After", b"1"),)),
        BundleError("broken", "Mend it."),
        EngineClosedError("closed"),
        ProtocolError("no", "Do."),
    ],
)
def test_errors_keep_their_words_and_status(error):
    there = error_of(failure_of(error))
    assert str(there) == str(error)
    assert there.http_status == error.http_status
    assert getattr(there, "status", 0) == getattr(error, "status", 0)
    assert getattr(there, "headers", ()) == getattr(error, "headers", ())
    assert isinstance(there, UsageError if isinstance(error, ProtocolError) else type(error))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_side_that_dies_with_messages_unread_is_heard_to_its_end(loop):
    """The kernel makes an error of that end, and uvloop then calls a reader once and never again."""

    async def what() -> None:
        mine, its = pair()
        its.setblocking(False)
        ours = Side(mine)
        ours.link.send(AskState(1))
        reasons = [str(number) for number in range(200)]
        for reason in reasons:
            its.send(b"." + encode(EngineLost("/s", reason)))
        its.close()
        await until(lambda: ours.lost)
        assert [message.reason for message in ours.heard] == reasons
        assert ours.lost == ["it closed the connection"]

    running = new_loop(loop)
    try:
        running.run_until_complete(what())
    finally:
        running.close()


def test_a_message_may_be_longer_than_a_packet_and_the_order_stays(between):
    reasons = [str(size) + "x" * size for size in (0, PIECE_BYTES - 30, PIECE_BYTES, 3 << 20, 5, 5 * PIECE_BYTES, 1)]

    async def what(ours: Side, theirs: Side) -> None:
        for reason in reasons:
            ours.link.send(EngineLost("/s", reason))
        await until(lambda: len(theirs.heard) == len(reasons))
        assert [message.reason for message in theirs.heard] == reasons

    between(what)


def test_calls_both_ways_are_answered_each_with_its_own(between):
    async def double(asked: AnyMessage) -> bytes:
        assert isinstance(asked, LoadModel)
        await asyncio.sleep(0.02 if asked.name == "slow" else 0.0)
        if asked.name == "none":
            raise HttpError(404, "there is none")
        if asked.name == "fault":
            raise ValueError("of its own")
        return 2 * asked.name.encode()

    async def what(ours: Side, theirs: Side) -> None:
        theirs.answer = ours.answer = double
        names = ("slow", "a", "none", "fault", "b" * PIECE_BYTES)
        for side in (ours, theirs):
            calls = [side.link.call(lambda call, name=name: LoadModel(call, name)) for name in names]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [found[0], found[1], found[4]] == [b"slowslow", b"aa", b"bb" * PIECE_BYTES]
            assert isinstance(found[2], HttpError) and found[2].status == 404
            assert isinstance(found[3], HttpError) and found[3].status == 500 and "of its own" not in str(found[3])

    between(what)


def test_descriptors_go_with_their_message_and_none_is_left(between):
    async def what(ours: Side, theirs: Side) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(b"there")
            file.flush()
            ours.link.send(AskState(1))
            ours.link.send(AskFigures(2), (file.fileno(),))
            ours.link.send(AskState(3))
        await until(lambda: len(theirs.heard) == 3)
        (descriptor,) = theirs.descriptors
        assert os.pread(descriptor, 10, 0) == b"there"
        os.close(descriptor)

    before = set(os.listdir("/proc/self/fd"))
    between(what)
    assert set(os.listdir("/proc/self/fd")) == before


def test_who_reads_nothing_holds_up_nobody_and_gets_all_of_it_later(between):
    async def what(ours: Side, theirs: Side) -> None:
        with tempfile.TemporaryFile() as file:
            for number in range(2000):  # before the loop runs once
                ours.link.send(EngineLost(str(number), "x" * 1000), (file.fileno(),) if number == 1999 else ())
        await until(lambda: len(theirs.heard) == 2000)
        assert [int(message.socket) for message in theirs.heard] == list(range(2000))
        os.close(theirs.descriptors[0])

    between(what)


def test_calls_fail_when_the_other_side_goes(between):
    async def what(ours: Side, theirs: Side) -> None:
        call = ours.link.call(AskState)
        theirs.link.close()
        with pytest.raises(EngineClosedError):
            await call
        await until(lambda: ours.lost)
        assert ours.lost == ["it closed the connection"]
        ours.link.send(AskState(1))
        with pytest.raises(OnecardError):
            await ours.link.call(AskState)

    between(what)


def test_what_cannot_be_understood_ends_the_connection(between):
    async def what(ours: Side, theirs: Side) -> None:
        theirs.link._sock.send(b".nonsense")
        await until(lambda: ours.lost)
        assert "cannot be understood" in ours.lost[0] and ours.link.closed

    between(what)


def test_an_error_of_no_known_class_is_the_engines():
    class Strange(OnecardError):
        pass

    assert type(error_of(failure_of(Strange("x")))) in (OnecardError, EngineError)
