"""A front's connection to an engine: which messages go together."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import numpy as np
import pytest

from onecard.ipc import packets
from onecard.ipc.messages import Answered, Infer, Ping, decode_to_engine, encode, packet
from onecard.server.engine_link import EngineLink
from onecard.server.engine_memory import RequestMemory
from onecard.server.engine_request import EngineRequest


class Engine:
    """The other side, which answers when the test says so."""

    def __init__(self, path: Path) -> None:
        self._listener = packets.listen(path)

    def accept(self) -> None:
        self.socket = packets.accept(self._listener)
        packets.receive(self.socket, 2)  # the Hello
        self.socket.settimeout(10)

    async def packet(self) -> list[object]:
        """The messages of the next packet."""
        data, _ = await asyncio.get_running_loop().run_in_executor(None, packets.receive, self.socket)
        return decode_to_engine(data)

    def is_quiet(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(10)
        return False

    def answer(self, id: int, total_s: float) -> None:
        self.socket.send(packet([encode(Answered(id, (), 0.0, total_s, 1, "1"))]))

    def close(self) -> None:
        self.socket.close()
        self._listener.close()


@pytest.fixture
def run(tmp_path):
    """Runs a test's coroutine with an engine, a link and a maker of requests."""

    def go(test) -> None:
        async def main() -> None:
            engine, memory, heard = Engine(tmp_path / "socket"), RequestMemory(1 << 20), []
            link = EngineLink(tmp_path / "socket", memory.segment, 1 << 20, heard.append, lambda reason: None)
            engine.accept()

            def request(id: int) -> EngineRequest:
                placed = memory.place({"x": np.zeros((1, 4), np.float32)}, {})
                made = EngineRequest(asyncio.get_running_loop(), placed, lambda request: None)
                made.id, made.model, made.priority, made.client, made.deadline, made.began = id, "m", 0, "", None, 0.0
                return made

            async def heard_of(count: int) -> None:
                while len(heard) < count:
                    await asyncio.sleep(0.001)

            try:
                await test(engine, link, request, heard_of)
            finally:
                link.close()
                engine.close()
                memory.close()

        asyncio.run(asyncio.wait_for(main(), 30))

    return go


def ids(messages: list[object]) -> list[int]:
    return [message.id for message in messages if isinstance(message, Infer)]


def test_all_of_one_round_goes_in_one_packet_in_order(run):
    async def test(engine, link, request, heard_of):
        for id in (1, 2, 3):
            link.send(request(id))
        link.send(Ping(9))
        messages = await engine.packet()
        assert ids(messages) == [1, 2, 3]
        assert messages[3] == Ping(9)

    run(test)


def test_a_slow_engine_is_sent_each_request_at_once(run):
    async def test(engine, link, request, heard_of):
        for id in range(1, 30):
            link.send(request(id))
            assert ids(await engine.packet()) == [id]
            if id < 20:
                engine.answer(id, 0.05)
                await heard_of(id)

    run(test)


def test_beside_a_quick_engine_what_comes_meanwhile_goes_after_its_next_answer(run):
    async def test(engine, link, request, heard_of):
        for id in range(1, 40):  # until it is known to be quick
            link.send(request(id))
            assert ids(await engine.packet()) == [id], "nothing is unanswered: it goes at once"
            engine.answer(id, 0.0001)
            await heard_of(id)
        link.send(request(40))
        assert ids(await engine.packet()) == [40]
        for id in (41, 42):
            link.send(request(id))
            for _ in range(3):
                await asyncio.sleep(0)
        assert engine.is_quiet()
        engine.answer(40, 0.0001)
        assert ids(await engine.packet()) == [41, 42]
        link.send(request(43))
        assert ids(await engine.packet()) == [43], "without an answer it goes a moment later"

    run(test)


def test_what_was_given_up_before_it_was_sent_is_waited_for_by_nobody(run):
    async def test(engine, link, request, heard_of):
        for id in range(1, 40):
            link.send(request(id))
            await engine.packet()
            engine.answer(id, 0.0001)
            await heard_of(id)
        given_up = request(40)
        link.send(given_up)
        given_up.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        link.send(request(41))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not engine.is_quiet(), "it went at once"
        assert ids(await engine.packet()) == [41]

    run(test)
