"""What the server adds to protocol and front: what a path means, where a body lies, and what is counted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from onecard.errors import OnecardError
from onecard.runtime.stats import BatchStats
from onecard.server import app as app_module
from onecard.server.access import Access
from onecard.server.app import App, body_memory
from onecard.server.counters import Counters
from onecard.server.device_regions import DeviceRegions
from onecard.server.engine_memory import RequestMemory
from onecard.server.http_response import response_of
from onecard.server.http_types import Head, HttpError, Request
from onecard.server.repository import Repository
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import SystemRegions
from tests.unit.server.test_engine_client import engines, run

TOKEN = b"a token of the test"
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).encode()


@pytest.fixture
def memory():
    made = RequestMemory(1 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("json_length", [0, 1, 63, 64, 197])
@pytest.mark.parametrize("length", [0, 1, 4096])
def test_the_first_binary_tensor_of_a_body_is_aligned(memory, json_length, length):
    headers = {b"inference-header-content-length": str(json_length).encode()}
    body = body_memory(memory)(SimpleNamespace(headers=headers), length)
    assert (len(body), body.readonly, body.format) == (length, False, "B")
    if length:
        assert (np.frombuffer(body, np.uint8).ctypes.data + json_length) % 64 == 0


@pytest.mark.parametrize(("length", "used"), [(1, 0), (4096, 0), (4097, 8192)])
def test_a_small_body_without_binary_data_takes_none_of_the_engines_memory(memory, length, used):
    body = body_memory(memory)(SimpleNamespace(headers={}), length)
    assert (len(body), body.readonly, body.format) == (length, False, "B")
    assert memory.used_bytes == used


@pytest.mark.parametrize("value", [b"-1", b"x", b"9" * 30, b""])
def test_a_length_that_is_none_is_left_to_the_parser(memory, value):
    headers = {b"inference-header-content-length": value}
    assert len(body_memory(memory)(SimpleNamespace(headers=headers), 10)) == 10


def test_counters_count_requests_and_batches_apart():
    counters = Counters()
    counters.came()
    counters.ended(0.5, ok=True)
    counters.ended(0.25, ok=False)
    batch = BatchStats("v", {"B": 4}, 2, 3, 0.25, (0.125, 0.25), 0.5, 0.5, 2.0, 0.25, 3.0, 0, 1)
    counters.ran(batch)
    counters.ran(batch._replace(error="out of memory"))
    found = counters.read("m", "1")
    assert (found.inference_count, found.execution_count) == (3, 1)
    stats = found.inference_stats
    assert (stats.success.count, stats.success.ns, stats.fail.ns) == (1, 500_000_000, 250_000_000)
    assert (stats.queue.count, stats.queue.ns) == (2, 375_000_000)
    assert (stats.compute_infer.count, stats.compute_infer.ns) == (2, 4_000_000_000)
    assert [(b.batch_size, b.compute_input.ns, b.compute_infer.count) for b in found.batch_stats] == [
        (3, 1_000_000_000, 1)
    ]
    assert found.last_inference_ms > 0


class Asked:
    """An application over a scripted engine; sends it requests for inference."""

    def __init__(self, peer) -> None:
        regions = SharedRegions(SystemRegions(None), DeviceRegions(None))
        self.peer = peer
        self.app = App(Serving(peer.client, Repository({}), regions), Access(TOKEN, None), regions)

    async def infer(self, path: str = "/v2/models/m/infer", body: bytes = BODY, token: bytes = TOKEN) -> int:
        """The status of the answer."""
        head = Head("POST", path, "", 1, {b"authorization": b"Bearer " + token}, len(body), False, True, False, "")
        request = Request(head, "answer", False)  # the client's name is what the scripted engine does
        request.body = memoryview(body)
        try:
            return (await self.app(request)).status
        except OnecardError as error:
            return response_of(error, request).status

    @property
    def known(self) -> dict[str, tuple[str, str]]:
        return self.app._infer_paths


@pytest.fixture
def on_app(tmp_path):
    """Runs an async function of :class:`Asked`."""

    def runner(what) -> None:
        async def whole() -> None:
            async with engines(tmp_path) as peer:
                await peer.start()
                await what(Asked(peer))

        run("asyncio", whole)

    return runner


def test_a_known_path_is_checked_as_a_new_one_is(on_app):
    async def what(asked):
        paths = ["/v2/models/m/infer", "/v2/models/m/versions/1/infer", "//v2/models/%6D/infer/"]
        for path in paths * 2:
            assert await asked.infer(path) == 200
        assert asked.known == dict(zip(paths, [("m", ""), ("m", "1"), ("m", "")], strict=True))
        for path in paths:
            assert await asked.infer(path, token=b"another") == 401
            assert await asked.infer(path, body=b"{") == 400
        await asked.peer.load()
        assert [await asked.infer(path) for path in paths] == [200, 404, 200], "version 2 serves now"
        await asked.peer.client.unload("m")
        fresh = await asked.infer("///v2/models/m/infer")
        assert fresh == 503, "not ready"
        assert [await asked.infer(path) for path in paths] == [fresh] * 3
        await asked.peer.load()
        assert await asked.infer() == 200

    on_app(what)


def test_a_path_is_not_known_by_another_method(on_app):
    async def what(asked):
        assert await asked.infer() == 200
        head = Head("GET", "/v2/models/m/infer", "", 1, {}, 0, False, True, False, "")
        with pytest.raises(HttpError) as refused:
            asked.app(Request(head, "127.0.0.1", False))
        assert refused.value.status == 405

    on_app(what)


def test_only_paths_that_were_good_are_remembered_and_not_without_end(on_app, monkeypatch):
    monkeypatch.setattr(app_module, "_MOST_PATHS", 4)

    async def what(asked):
        for path in ("/v2/models/none/infer", "/v2/models/m/versions/9/infer", "/v2/models/m/nothing"):
            assert await asked.infer(path) == 404
        assert await asked.infer(body=b"{") == 400
        assert await asked.infer(token=b"another") == 401
        assert await asked.infer("/" * 300 + "v2/models/m/infer") == 200
        assert asked.known == {}
        for slashes in range(1, 10):
            assert await asked.infer("/" * slashes + "v2/models/m/infer") == 200
            assert 0 < len(asked.known) <= 4

    on_app(what)
