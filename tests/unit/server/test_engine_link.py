"""A front's connection to an engine: which messages go together."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import numpy as np
import pytest

from onecard.ipc import packets
from onecard.ipc.messages import MOST_IN_PACKET, Answered, Infer, Ping, decode_to_engine, encode, packet
from onecard.ipc.tensors import Tensor
from onecard.server import engine_link
from onecard.server.engine_link import EngineLink
from onecard.server.engine_memory import RequestMemory
from onecard.server.engine_request import EngineRequest
from tests.unit.server.http_peers import LOOPS, new_loop


class Engine:
    """The other side, which answers when the test says so."""

    def __init__(self, path: Path) -> None:
        self._listener = packets.listen(path)

    def accept(self) -> None:
        self.socket = packets.accept(self._listener)
        packets.receive(self.socket, 2)  # the Hello
        self.socket.settimeout(30)

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
            self.socket.settimeout(30)
        return False

    def answer(self, id: int, total_s: float) -> None:
        self.say(Answered(id, (), 0.0, total_s, 1, "1"))

    def say(self, *messages: Answered) -> None:
        """All in one packet."""
        self.socket.send(packet([encode(message) for message in messages]))

    def close(self) -> None:
        self.socket.close()
        self._listener.close()


@pytest.fixture(params=LOOPS)
def run(request, tmp_path):
    """Runs a test's coroutine with an engine, a link, a maker of requests, and what waits for so much to be heard."""
    kind = request.param

    def go(test) -> None:
        async def main() -> None:
            engine, memory, heard = Engine(tmp_path / "socket"), RequestMemory(1 << 20), []
            link = EngineLink(tmp_path / "socket", memory.segment, 1 << 20, {Answered: heard.append}, heard.append)
            engine.accept()

            def request(id: int) -> EngineRequest:
                placed = memory.place({"x": np.zeros((1, 4), np.float32)}, {})
                made = EngineRequest(asyncio.get_running_loop(), placed, lambda request: None)
                made.id, made.model, made.priority, made.client, made.deadline, made.began = id, "m", 0, "", None, 0.0
                return made

            async def heard_of(count: int) -> list[object]:
                while len(heard) < count:
                    await asyncio.sleep(0.001)
                return heard

            try:
                await test(engine, link, request, heard_of)
            finally:
                link.close()
                engine.close()
                memory.close()

        loop = new_loop(kind)
        try:
            loop.run_until_complete(asyncio.wait_for(main(), 60))
        finally:
            loop.close()

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


def test_beside_a_quick_engine_what_comes_meanwhile_goes_after_its_next_answer(run, monkeypatch):
    monkeypatch.setattr(engine_link, "_GATHER_S", 60.0)  # a busy machine takes its time over six rounds of the loop

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
        monkeypatch.setattr(engine_link, "_GATHER_S", 0.1)
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


@pytest.mark.parametrize("size", [1, 3, MOST_IN_PACKET])
def test_packets_that_come_together_are_all_heard_in_order_and_then_the_end(run, size):
    async def test(engine, link, request, heard_of):
        sent = [Answered(id, (), 0.0, 1.0, 1) for id in range(150 * size)]
        for at in range(0, len(sent), size):
            engine.say(*sent[at : at + size])
        engine.close()
        assert await heard_of(len(sent) + 1) == [*sent, "it closed the connection"]

    run(test)


@pytest.mark.parametrize("size", [1, MOST_IN_PACKET])
def test_an_engine_that_dies_with_a_request_unread_is_heard_to_its_end(run, size):
    """The kernel makes an error of that end, and uvloop then calls a reader once and never again."""

    async def test(engine, link, request, heard_of):
        sent = [Answered(id, (), 0.0, 1.0, 1) for id in range(150 * size)]
        link.send(request(1))
        while engine.is_quiet():
            await asyncio.sleep(0.001)
        for at in range(0, len(sent), size):
            engine.say(*sent[at : at + size])
        engine.close()
        assert await heard_of(len(sent) + 1) == [*sent, "it closed the connection"]

    run(test)


def test_an_answer_stays_as_it_is_when_the_next_one_comes(run):
    async def test(engine, link, request, heard_of):
        answers = [Answered(id, (Tensor("y", "uint8", (900,), -1, bytes([id]) * 900),), 0.0, 1.0, 1) for id in range(9)]
        for answer in answers:
            engine.say(answer)
        assert await heard_of(9) == answers

    run(test)
