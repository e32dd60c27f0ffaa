"""Many clients at once, some of which leave: nobody gets another's answer, and every slot comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading

import pytest

from onecard.server.http_server import Listen, serve_http
from onecard.server.http_types import HttpService, Response
from tests.unit.server.http_peers import LOOPS, PATIENCE_S, Reader, get, patient, post, running, until

SLOTS, SLOT_BYTES = 400, 70_000


class Slots:
    """Memory for bodies; a slot that is given back is overwritten, so that its use after that is seen."""

    def __init__(self) -> None:
        self.free = [memoryview(bytearray(SLOT_BYTES)) for _ in range(SLOTS)]
        self.used: dict[int, memoryview] = {}
        self.faults: list[str] = []

    def allocate(self, request, length):
        slot = self.free.pop()
        self.used[id(request)] = slot
        # A handler that runs has the slot until it is done: only a body that never became whole is given back here.
        request.on_gone(lambda: None if request.task else self.give_back(id(request)))
        return slot[:length]

    def give_back(self, key):
        slot = self.used.pop(key, None)
        if slot is not None:
            slot[:] = b"!" * SLOT_BYTES
            self.free.append(slot)

    def handle(self, request):
        key = id(request)
        task = asyncio.ensure_future(self.answer(request))
        # A task that is cancelled before its first step runs none of its code, but its callbacks.
        task.add_done_callback(lambda done: self.give_back(key) if done.cancelled() else None)
        return task

    async def answer(self, request):
        key, seen = id(request), bytes(request.body)
        if request.path == "/later":
            await asyncio.sleep(random.random() / 300)
        if request.body != seen:
            self.faults.append("a body changed while it was in use")
        return Response(200, (), [b"answer to ", request.body], on_sent=lambda: self.give_back(key))


def client(server, hasty_port, number, faults):
    chance = random.Random(number)
    for turn in range(40):
        leaves = chance.random() < 0.4
        # Who stays must not be timed out on a busy machine; who leaves shall be, soon.
        with socket.create_connection(("127.0.0.1", hasty_port if leaves else server.server.port), PATIENCE_S) as peer:
            bodies = [
                b"%d/%d/%d " % (number, turn, place) * chance.choice([1, 100, 5000])
                for place in range(chance.randint(1, 5))
            ]
            wire = b"".join(post(body, chance.choice(["/now", "/later"])) for body in bodies)
            sender = threading.Thread(target=send, args=(peer, wire[: chance.randrange(len(wire))] if leaves else wire))
            sender.start()
            reader = Reader(peer)
            for body in bodies[:1] if leaves else bodies:
                try:
                    answer = reader.answer()
                except AssertionError:
                    if not leaves:
                        faults.append(f"client {number} got no answer")
                    break
                if answer.body != b"answer to " + body and not (leaves and answer.status == 408):
                    faults.append(f"client {number} got {answer.body[:50]!r} for {body[:50]!r}")
            if leaves and chance.random() < 0.5:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sender.join()


def send(peer, wire):
    with contextlib.suppress(OSError):
        peer.sendall(wire)


@pytest.mark.parametrize("loop", LOOPS)
def test_nobody_gets_anothers_answer_and_every_slot_comes_back(loop):
    slots = Slots()
    service, hasty = (
        HttpService(slots.handle, slots.allocate),
        patient(head_timeout_s=0.5, body_timeout_s=0.5, idle_timeout_s=0.5),
    )
    with running(service, patient(), loop=loop) as server:
        serving = asyncio.run_coroutine_threadsafe(serve_http(service, Listen(port=0), hasty), server.loop)
        second = serving.result(PATIENCE_S)
        arguments = [(server, second.port, number, slots.faults) for number in range(16)]
        threads = [threading.Thread(target=client, args=each) for each in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert until(lambda: server.server.connections == second.connections == 0)
        assert until(lambda: len(slots.free) == SLOTS)
        assert not slots.used
        assert not slots.faults
        with server.connect() as peer:
            peer.sendall(get("/now"))
            assert Reader(peer).answer().body == b"answer to "
        asyncio.run_coroutine_threadsafe(second.close(), server.loop).result(PATIENCE_S)
