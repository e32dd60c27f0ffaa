"""Triton's own client registers, asks and unregisters; what is not a request of these extensions is a 400."""

import asyncio
import base64
import inspect
import json
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.errors import OnecardError
from onecard.server.device_regions import DeviceRegion, DeviceRegions
from onecard.server.oip_shared_memory import (
    Place,
    find_place,
    parse_register_device,
    parse_register_system,
    shared_memory_routes,
)
from onecard.server.oip_types import ProtocolError
from onecard.server.shared_regions import SharedRegions
from onecard.server.system_regions import SystemRegion, SystemRegions
from tests.unit.server.shared_objects import needs_shared_memory, shared_object, unique_prefix

client = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
HANDLE = bytes(range(64))


class Engine:
    """Remembers what it was told to open."""

    def __init__(self) -> None:
        self.opened: dict[str, DeviceRegion] = {}

    async def open_region(self, region: DeviceRegion) -> None:
        self.opened[region.name] = region

    async def close_region(self, name: str) -> None:
        del self.opened[name]


class Client(client.InferenceServerClient):
    """The official client, whose requests go straight to the routes."""

    def __init__(self, regions: SharedRegions) -> None:
        super().__init__("nowhere:1")
        self._routes = shared_memory_routes(regions)

    def _get(self, request_uri, headers, query_params):
        return self._answer("GET", request_uri, b"")

    def _post(self, request_uri, request_body, headers, query_params):
        return self._answer("POST", request_uri, request_body.encode())

    def _answer(self, method: str, uri: str, body: bytes):
        version, *path = uri.split("/")
        assert version == "v2"
        place = find_place(path)
        assert place is not None
        status = 200
        try:
            answer = self._routes[method, place.route](place.name, body)
            answer = asyncio.run(_wait(answer)) if inspect.isawaitable(answer) else answer
        except OnecardError as error:
            status = getattr(error, "status", error.http_status)
            answer = json.dumps({"error": str(error)}).encode()
        return types.SimpleNamespace(status_code=status, read=lambda *_: answer)


async def _wait(answer):
    return await answer


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def prefix():
    return unique_prefix()


@pytest.fixture
def triton(engine, prefix):
    with Client(SharedRegions(SystemRegions(prefix), DeviceRegions(engine))) as made:
        yield made


@needs_shared_memory
def test_system_shared_memory_by_the_official_client(triton, prefix):
    assert triton.get_system_shared_memory_status() == []
    with shared_object(prefix, 4096) as memory:
        key = "/" + memory.name
        triton.register_system_shared_memory("input é 1", key, 1024, offset=64)
        triton.register_system_shared_memory("b", key, 4096)
        a = {"name": "input é 1", "key": key, "offset": 64, "byte_size": 1024}
        b = {"name": "b", "key": key, "offset": 0, "byte_size": 4096}
        assert triton.get_system_shared_memory_status() == [a, b]
        assert triton.get_system_shared_memory_status("input é 1") == [a]
        with pytest.raises(client.InferenceServerException, match="registered already"):
            triton.register_system_shared_memory("b", key, 4096)
        with pytest.raises(client.InferenceServerException, match="unable to find system shared memory region 'c'"):
            triton.get_system_shared_memory_status("c")
        triton.unregister_system_shared_memory("input é 1")
        assert triton.get_system_shared_memory_status() == [b]
        triton.unregister_system_shared_memory()
        assert triton.get_system_shared_memory_status() == []


def test_cuda_shared_memory_by_the_official_client(triton, engine):
    assert triton.get_cuda_shared_memory_status() == []
    handle = base64.b64encode(HANDLE).decode()
    triton.register_cuda_shared_memory("a", handle, 1, 256)
    triton.register_cuda_shared_memory("b", handle, 0, 128)
    assert engine.opened["a"] == DeviceRegion("a", HANDLE, 1, 256)
    a, b = ({"name": "a", "device_id": 1, "byte_size": 256}, {"name": "b", "device_id": 0, "byte_size": 128})
    assert triton.get_cuda_shared_memory_status() == [a, b]
    assert triton.get_cuda_shared_memory_status("b") == [b]
    with pytest.raises(client.InferenceServerException, match="registered already"):
        triton.register_cuda_shared_memory("a", handle, 1, 256)
    triton.unregister_cuda_shared_memory("a")
    assert triton.get_cuda_shared_memory_status() == [b]
    triton.unregister_cuda_shared_memory()
    assert triton.get_cuda_shared_memory_status() == []
    assert not engine.opened


def test_clients_that_clean_up_first_meet_no_error_where_it_is_off():
    with Client(SharedRegions(SystemRegions(None), DeviceRegions(None))) as triton:
        triton.unregister_system_shared_memory()
        triton.unregister_cuda_shared_memory()
        triton.unregister_cuda_shared_memory("a")
        assert triton.get_system_shared_memory_status() == triton.get_cuda_shared_memory_status() == []
        with pytest.raises(client.InferenceServerException, match="not enabled on this server"):
            triton.register_system_shared_memory("a", "/x", 1)
        with pytest.raises(client.InferenceServerException, match="not enabled on this server"):
            triton.register_cuda_shared_memory("a", base64.b64encode(HANDLE).decode(), 0, 1)


def test_registering_all_regions_is_no_request():
    routes = shared_memory_routes(SharedRegions(SystemRegions("p"), DeviceRegions(Engine())))
    with pytest.raises(ProtocolError, match="name has 0 characters"):
        routes["POST", "systemsharedmemory/register"]("", b'{"key": "/p", "byte_size": 1}')
    body = json.dumps({"raw_handle": {"b64": base64.b64encode(HANDLE).decode()}, "device_id": 0, "byte_size": 1})
    with pytest.raises(ProtocolError, match="name has 0 characters"):
        asyncio.run(_wait(routes["POST", "cudasharedmemory/register"]("", body.encode())))


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("systemsharedmemory/status", Place("systemsharedmemory/status", "")),
        ("cudasharedmemory/region/a%20b%2Fc/register", Place("cudasharedmemory/register", "a b/c")),
        ("systemsharedmemory/region/region/unregister", Place("systemsharedmemory/unregister", "region")),
        ("cudasharedmemory/region//status", None),
        ("systemsharedmemory", None),
        ("systemsharedmemory/regions/a/status", None),
        ("systemsharedmemory/region/a/b/status", None),
        ("sharedmemory/status", None),
        ("", None),
    ],
)
def test_paths(path, place):
    assert find_place(path.split("/")) == place


def test_registrations_are_read():
    body = memoryview(b'{"key":"/k","offset":3,"byte_size":9007199254740993,"more":1}')
    assert parse_register_system("n", body) == SystemRegion("n", "/k", 3, (1 << 53) + 1)
    assert parse_register_system("n", b'{"key":"/k","byte_size":1}').offset == 0


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[]", b"\xff", b"{", b'{"key":"/k"}', b'{"key":"/k","byte_size":0}', b'{"key":1,"byte_size":1}'),
        *(b'{"key":"/k","byte_size":-1}', b'{"key":"/k","byte_size":1.5}', b'{"key":"/k","byte_size":"1"}'),
        *(b'{"key":"/k","byte_size":1,"offset":-1}', b'{"key":"/k","byte_size":9223372036854775808}'),
        *(b'{"key":"/k","byte_size":1,"offset":null}', b'{"a":' + b"[" * 10_000, b" " * 20_000),
        b'{"key":"' + b"k" * 257 + b'","byte_size":1}',
    ],
)
def test_system_registrations_that_cannot_be_read(body):
    with pytest.raises(ProtocolError, match=r"cannot be read|nested too deep|at most 16384 are taken"):
        parse_register_system("n", body)


def device_body(handle: object, **changes: object) -> bytes:
    return json.dumps({"raw_handle": {"b64": handle}, "device_id": 0, "byte_size": 1, **changes}).encode()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (device_body(base64.b64encode(HANDLE[1:]).decode()), "has 63 bytes, expected 64"),
        (device_body(base64.b64encode(HANDLE + b"x").decode()), "has 65 bytes, expected 64"),
        (device_body(""), "has 0 bytes, expected 64"),
        (device_body("*" * 88), "not base64"),
        (device_body("é" * 88), "not base64"),
        (device_body("A" * 129), "cannot be read"),
        (device_body(3), "cannot be read"),
        (device_body("A" * 88, device_id=-1), "cannot be read"),
        (device_body("A" * 88, device_id=1 << 31), "cannot be read"),
        (device_body("A" * 88, byte_size=0), "cannot be read"),
        (device_body("A" * 88, raw_handle="A" * 88), "cannot be read"),
    ],
)
def test_device_registrations_that_cannot_be_read(body, match):
    with pytest.raises(ProtocolError, match=match):
        parse_register_device("n", body)


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_nothing_but_a_protocol_error_comes_of_any_bytes(body):
    for parse in (parse_register_system, parse_register_device):
        with pytest.raises(ProtocolError):
            parse("n", body)
