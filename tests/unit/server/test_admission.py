"""Who gets memory for a body: nobody without the right to what is asked, and little for what is no inference."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from onecard.server import http_protocol
from onecard.server.access import Access
from onecard.server.device_regions import DeviceRegions
from onecard.server.http_server import Listen
from onecard.server.repository import Repository
from onecard.server.serve import Doors, ServeOptions
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import SystemRegions
from onecard.server.watching import WatchingPages
from onecard.server.worker import _Silent
from tests.unit.server.test_engine_client import SMALL, engines, run

pytestmark = pytest.mark.timeout(180)
TOKEN = b"a token of the test"
RIGHT = b"Authorization: Bearer " + TOKEN
MOST = SMALL.request_bytes
INFER, LOAD = "/v2/models/m/infer", "/v2/repository/models/m/load"
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).encode()


class Front:
    """A front as a server has it, over a scripted engine that has the model m."""

    def __init__(self, peer, options: ServeOptions, doors: Doors) -> None:
        self.peer = peer
        self.options = options
        self.doors = doors
        self.writers: list[asyncio.StreamWriter] = []

    @property
    def used_bytes(self) -> int:
        return self.peer.client.used_bytes

    async def open(self, method: str, path: str, length: int | None, *fields: bytes) -> asyncio.StreamReader:
        """A connection on which a head was sent, of a body of this length or, without one, in chunks."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.doors.port)
        size = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
        writer.write(b"\r\n".join((f"{method} {path} HTTP/1.1".encode(), b"Host: test", size, *fields, b"", b"")))
        self.writers.append(writer)
        return reader

    async def close(self) -> None:
        await self.doors.close(0.0)
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def ask(self, method: str, path: str, body: bytes, *fields: bytes) -> tuple[int, dict[str, str], bytes]:
        """What is answered to a whole request."""
        reader = await self.open(method, path, len(body), *fields)
        self.writers[-1].write(body)
        return await answer(reader)


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode().split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await asyncio.wait_for(reader.readexactly(int(fields["content-length"])), 30)
    del fields["date"]
    return int(head[0].split()[1]), fields, body


@pytest.fixture(params=[True, False], ids=["a token", "no token"])
def token(request):
    return request.param


@pytest.fixture
def on_front(tmp_path, monkeypatch):
    """Runs an async function of :class:`Front`."""
    monkeypatch.setattr(http_protocol, "_peer", lambda _: "answer")  # a client's name is what the scripted engine does

    def runner(what: Callable[[Front], Awaitable[None]], *, guarded: bool = True) -> None:
        async def whole() -> None:
            async with engines(tmp_path) as peer:
                await peer.start()
                regions = SharedRegions(SystemRegions(None), DeviceRegions(None))
                access = Access(TOKEN if guarded else None, None)
                options = ServeOptions({}, Listen(port=0), client=SMALL, access=access)
                serving = Serving(peer.client, Repository({}), regions)
                serving.started = True
                doors = Doors(None)
                await doors.open(options, serving, WatchingPages(None), _Silent())
                front = Front(peer, options, doors)
                try:
                    await what(front)
                finally:
                    await front.close()

        run("asyncio", whole)

    return runner


REFUSED = [
    *(("POST", "/nothing", 404), ("POST", "/v2/nothing", 404), ("POST", "/v2/models/m/nothing", 404)),
    *(("PUT", INFER, 405), ("GET", INFER, 405), ("POST", "/v2", 405), ("POST", "/metrics", 405)),
    *(("POST", INFER, 401), ("POST", "/v2/models/none/infer", 401), ("GET", "/v2/models/m", 401)),
    *(("POST", "/v2/repository/index", 401), ("POST", LOAD, 403), ("GET", "/metrics", 401)),
    ("POST", "/v2/systemsharedmemory/region/r/register", 403),
]


def test_who_has_no_right_gets_no_memory(on_front):
    async def what(front):
        status, *_ = await front.ask("POST", INFER, BODY, RIGHT)
        assert status == 200
        waiting = []
        for method, path, _ in [*REFUSED, ("POST", INFER, 401)]:  # its path is remembered now
            for length in (MOST // 2, 4000, None):
                waiting.append(await front.open(method, path, length))
        for reader, (_, path, status) in zip(waiting[::3], REFUSED, strict=False):
            assert (await answer(reader))[0] == status, path
        for reader in waiting[1::3] + waiting[2::3]:
            assert (await answer(reader))[0] in (401, 403, 404, 405)
        assert front.used_bytes == 0
        body = np.zeros((MOST // 2,), np.uint8).tobytes()
        assert (await front.ask("POST", INFER, body, RIGHT))[0] == 400, "there was room for it"

    on_front(what)


def test_the_answers_are_those_to_requests_without_a_body(on_front):
    async def what(front):
        for method, path, status in REFUSED:
            without = await front.ask(method, path, b"")
            assert without == await front.ask(method, path, b"a body"), path
            assert without[0] == status
            assert without[2].startswith(b'{"error":')

    on_front(what)


def test_what_is_no_inference_may_have_a_small_body_alone(on_front):
    async def what(front):
        index = "/v2/repository/index"
        assert (await front.ask("POST", index, b'{"ready":true}' + b" " * 1000, RIGHT))[0] == 200
        big = b" " * ((1 << 20) + 1)
        gzipped = b"Content-Encoding: gzip"
        for fields in ([], [gzipped]):
            status, _, body = await answer(await front.open("POST", index, len(big), RIGHT, *fields))
            assert (status, json.loads(body)) == (413, {"error": "The body is larger than 1048576 bytes."})
        assert (await front.ask("POST", index, gzip.compress(big), RIGHT, gzipped))[0] == 413
        reader = await front.open("POST", index, None, RIGHT)
        front.writers[-1].write(b"%x\r\n" % len(big))
        assert (await answer(reader))[0] == 413
        for path in ("/v2/health/live", "/v2/models/m/ready", "/"):
            assert (await front.ask("GET", path, b"x" * 4096))[0] == 200
            assert (await answer(await front.open("GET", path, 4097)))[0] == 413
        assert front.used_bytes == 0

    on_front(what)


def test_a_right_is_checked_once(on_front, monkeypatch):
    checked = []
    check = Access.check

    def noted(self, kind, *rest):
        checked.append(kind)
        check(self, kind, *rest)

    monkeypatch.setattr(Access, "check", noted)

    async def what(front):
        for _ in range(3):
            assert (await front.ask("POST", INFER, BODY, RIGHT))[0] == 200
        assert checked == ["infer"] * 3
        assert (await front.ask("GET", "/v2", b"", RIGHT))[0] == 200
        assert (await front.ask("POST", INFER, b"", RIGHT))[0] == 400, "without a body it is not admitted, but checked"
        assert (await front.ask("POST", INFER, b""))[0] == 401
        assert checked == ["infer"] * 6

    on_front(what)


def test_whether_a_model_is_ready_does_not_name_the_others(on_front, token):
    async def what(front):
        fields = (RIGHT,) if token else ()
        told = {}
        for path in ("zzz", "m/versions/7"):
            status, _, body = await front.ask("GET", f"/v2/models/{path}/ready", b"", *fields)
            assert status == 404
            told[path] = json.loads(body)["error"]
        bare = "there is no such model."
        assert told == (
            {
                "zzz": "there is no model 'zzz': this server has m.",
                "m/versions/7": "model 'm' has no version '7': it has 1.",
            }
            if token
            else {"zzz": bare, "m/versions/7": bare}
        )
        await front.peer.client.unload("m")
        status, headers, body = await front.ask("GET", "/v2/models/m/ready", b"", *fields)
        assert status == 503
        assert token or json.loads(body) == {"error": "the model is not ready."}
        assert headers["retry-after"] == "1"

    on_front(what)


def test_without_tokens_all_may_know_the_models(on_front):
    async def what(front):
        _, _, body = await front.ask("GET", "/v2/models/zzz/ready", b"")
        assert json.loads(body) == {"error": "there is no model 'zzz': this server has m."}

    on_front(what, guarded=False)
