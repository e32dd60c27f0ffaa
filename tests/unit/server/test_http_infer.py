"""Requests in shared memory: in words that were read before they mean what they meant, and are checked as ever."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from onecard.errors import OnecardError
from onecard.server.access import Access
from onecard.server.app import App
from onecard.server.device_regions import DeviceRegions
from onecard.server.http_response import response_of
from onecard.server.http_types import Head, Request
from onecard.server.oip_seen import SeenHead, SeenHeads
from onecard.server.repository import Repository
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import SystemRegion, SystemRegions
from tests.unit.server.shared_objects import needs_shared_memory, shared_object, unique_prefix
from tests.unit.server.test_engine_client import engines, run

pytestmark = [needs_shared_memory, pytest.mark.timeout(120)]
ROWS = 3
X_BYTES = 16 * ROWS


def place(region: str, nbytes: int, offset: int = 0) -> dict:
    parameters = {"shared_memory_region": region, "shared_memory_byte_size": nbytes}
    return {**parameters, "shared_memory_offset": offset} if offset else parameters


def in_region(**changes) -> dict:
    """A request whose input and output are in the region ``r``, at 64 and 1024."""
    given = {"name": "x", "datatype": "FP32", "shape": [ROWS, 4], "parameters": place("r", X_BYTES, 64)}
    return {"inputs": [given], "outputs": [{"name": "y", "parameters": place("r", X_BYTES, 1024)}], **changes}


class Asked:
    """An application over a scripted engine (it answers ``x * 3 + 7``) and two objects of a client."""

    def __init__(self, peer, prefix, objects) -> None:
        self.peer = peer
        self.objects = objects
        self.regions = SharedRegions(SystemRegions(prefix), DeviceRegions(None))
        self.app = App(Serving(peer.client, Repository({}), self.regions), Access(None, None), self.regions)
        self.register()

    def register(self, which: int = 0, offset: int = 0, byte_size: int = 2048) -> None:
        self.regions.unregister_system("r")
        self.regions.register_system(SystemRegion("r", self.objects[which].name, offset, byte_size))

    def set(self, value: float, which: int = 0, at: int = 64) -> None:
        self.objects[which].buf[at : at + X_BYTES] = np.full((ROWS, 4), value, "<f4").tobytes()

    def found(self, which: int = 0, at: int = 1024) -> float:
        found = np.frombuffer(bytes(self.objects[which].buf[at : at + X_BYTES]), "<f4")
        assert (found == found[0]).all()
        return float(found[0])

    async def send(self, request: dict, binary: bytes = b"", *, length: bool = False) -> tuple[int, bytes]:
        """Status and whole body of the answer; with the length of the JSON in the request's head if there is data."""
        text = json.dumps(request).encode()
        headers = {b"inference-header-content-length": b"%d" % len(text)} if binary or length else {}
        whole = text + binary
        head = Head("POST", "/v2/models/m/infer", "", 1, headers, len(whole), False, True, False, "")
        asked = Request(head, "answer", False)
        asked.body = self.peer.client.allocate(len(whole), -len(text) % 64)
        asked.body[:] = whole
        try:
            response = await self.app(asked)
        except OnecardError as error:
            response = response_of(error, asked)
        told = response.status, b"".join(bytes(part) for part in response.body)
        if response.on_sent is not None:
            response.on_sent()
        return told

    def known(self) -> list[SeenHead]:
        (seen,) = self.app.serving._seen.values()
        return [head for head in seen._heads.values() if head is not None]


@pytest.fixture
def on_app(tmp_path):
    """Runs an async function of :class:`Asked`."""
    prefix = unique_prefix()

    def runner(what) -> None:
        async def whole() -> None:
            async with engines(tmp_path) as peer:
                await peer.start()
                asked = Asked(peer, prefix, objects)
                await what(asked)
                await asyncio.sleep(0)
                assert peer.client.used_bytes == 0, "nothing of any request is held"

        with shared_object(prefix, 4096, "a") as a, shared_object(prefix, 4096, "b") as b:
            objects = (a, b)
            run("asyncio", whole)

    return runner


def test_the_same_words_are_answered_anew_each_time(on_app, monkeypatch):
    async def what(asked):
        answers = []
        for value in (1, 2, 3, 4):
            asked.set(value)
            answers.append(await asked.send(in_region()))
            assert asked.found() == value * 3 + 7
        assert len(asked.known()) == 1
        assert {status for status, _ in answers} == {200}
        assert len({body for _, body in answers}) == 1, "what was remembered is what was written at first"
        output = json.loads(answers[0][1])["outputs"][0]
        assert output == {
            "name": "y", "datatype": "FP32", "shape": [ROWS, 4], "parameters": place("r", X_BYTES, 1024)
        }  # fmt: skip
        monkeypatch.setattr("onecard.server.http_infer.parse_infer", None)  # nothing is read any more
        asked.set(5)
        assert (await asked.send(in_region()), asked.found()) == (answers[0], 22)
        assert await asked.send(in_region(), length=True) == answers[0]

    on_app(what)


def test_where_the_region_is_now_counts_not_where_it_was(on_app):
    async def what(asked):
        asked.set(1), asked.set(2, 1), asked.set(3, 0, 64 + 256)
        for _ in range(2):
            assert (await asked.send(in_region()))[0] == 200
        asked.register(1)
        assert ((await asked.send(in_region()))[0], asked.found(1)) == (200, 13)
        asked.register(0, 256)
        assert ((await asked.send(in_region()))[0], asked.found(at=256 + 1024)) == (200, 16)

    on_app(what)


@pytest.mark.parametrize("harm", ["forgotten", "smaller", "cut off"])
def test_what_would_be_refused_at_first_is_refused_later(on_app, harm):
    async def what(asked):
        for _ in range(2):
            assert (await asked.send(in_region()))[0] == 200
        if harm == "forgotten":
            asked.regions.unregister_system("r")
        elif harm == "smaller":
            asked.register(byte_size=1024 + X_BYTES - 1)
        else:
            asked.objects[0].buf.release()
            with open(f"/dev/shm/{asked.objects[0].name}", "r+b") as stream:
                stream.truncate(64 + X_BYTES - 1)
        before = asked.peer.client.answered
        status, body = await asked.send(in_region())
        assert status == 400, body
        assert b"shared memory" in body
        assert asked.peer.client.answered == before, "the model was not asked"
        assert asked.peer.client.figures("m").failures["bad_input"] == 1

    on_app(what)


def test_an_answer_stays_where_the_request_found_its_region(on_app):
    async def what(asked):
        asked.set(1)
        for _ in range(2):
            assert (await asked.send(in_region()))[0] == 200
        asked.set(2)
        sending = asyncio.ensure_future(asked.send(in_region()))
        await asyncio.sleep(0)  # it is on its way
        assert not sending.done()
        asked.register(1)
        assert (await sending)[0] == 200
        assert asked.found() == 13
        assert asked.found(1) == 0

    on_app(what)


def test_data_in_the_body_and_the_answer_in_a_region(on_app):
    async def what(asked):
        data = np.full((ROWS, 4), 2, "<f4").tobytes()
        given = {"name": "x", "datatype": "FP32", "shape": [ROWS, 4], "parameters": {"binary_data_size": X_BYTES}}
        answers = [await asked.send(in_region(inputs=[given]), data) for _ in range(3)]
        assert (answers, asked.found()) == ([answers[0]] * 3, 13)
        assert answers[0][0] == 200
        assert len(asked.known()) == 1

    on_app(what)


def test_data_in_a_region_and_the_answer_in_the_body(on_app):
    async def what(asked):
        for value in (1, 2, 3):
            asked.set(value)
            status, body = await asked.send(in_region(outputs=[{"name": "y", "parameters": {"binary_data": True}}]))
            assert status == 200
            assert (np.frombuffer(body[-X_BYTES:], "<f4") == value * 3 + 7).all()
            assert json.loads(body[:-X_BYTES])["outputs"][0]["parameters"] == {"binary_data_size": X_BYTES}
        assert len(asked.known()) == 1

    on_app(what)


@pytest.mark.parametrize(
    "request_",
    [
        in_region(id="7"),
        in_region(outputs=[{"name": "y", "parameters": {**place("r", X_BYTES, 1024), "classification": 1}}]),
        in_region(outputs=[{"name": "y"}]),
    ],
)
def test_what_is_not_plain_is_read_each_time(on_app, request_):
    async def what(asked):
        found = [await asked.send(request_) for _ in range(2)]
        assert found[0] == found[1]
        assert asked.known() == []

    on_app(what)


def test_an_answer_that_is_too_large_for_its_place_is_an_error_each_time(on_app):
    async def what(asked):
        small = in_region(outputs=[{"name": "y", "parameters": place("r", X_BYTES - 4, 1024)}])
        for _ in range(3):
            status, body = await asked.send(small)
            assert status == 400
            assert b"'shared_memory_byte_size' is 44" in body

    on_app(what)


def test_bytes_behind_such_a_request_are_refused(on_app):
    async def what(asked):
        for _ in range(2):
            assert (await asked.send(in_region()))[0] == 200
        status, body = await asked.send(in_region(), b"more")
        assert status == 400
        assert b"4 bytes behind" in body

    on_app(what)


def test_requests_with_their_data_in_the_json_take_no_place_of_others(on_app):
    async def what(asked):
        for n in range(300):
            item = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [n, 0, 0, 0]}
            assert (await asked.send({"inputs": [item]}))[0] == 200
        (seen,) = asked.app.serving._seen.values()
        assert isinstance(seen, SeenHeads)
        assert seen._heads == {}

    on_app(what)
