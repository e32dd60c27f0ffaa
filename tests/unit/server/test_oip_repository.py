"""The repository's requests are read, its index is written, and nothing sent with a request becomes a file."""

import json
import types

import pytest

from onecard.server.oip_repository import IndexEntry, check_change, parse_index, repository_index
from onecard.server.oip_types import ProtocolError

ENTRIES = [IndexEntry("a", "1", "READY"), IndexEntry("b", "2", "UNAVAILABLE", "out of memory")]


def test_index():
    assert json.loads(repository_index(ENTRIES)) == [
        {"name": "a", "version": "1", "state": "READY", "reason": ""},
        {"name": "b", "version": "2", "state": "UNAVAILABLE", "reason": "out of memory"},
    ]
    assert [entry["name"] for entry in json.loads(repository_index(ENTRIES, only_ready=True))] == ["a"]


@pytest.mark.parametrize(
    ("body", "only_ready"), [(b"", False), (b"{}", False), (b'{"ready":true}', True), (memoryview(b"{}"), False)]
)
def test_index_requests(body, only_ready):
    assert parse_index(body) is only_ready


@pytest.mark.parametrize(
    "parameters", ["null", "{}", '{ "unload_dependents" :  true }', '{"unload_dependents":false}', '{"config":null}']
)
def test_load_and_unload(parameters):
    check_change(f'{{"parameters": {parameters} }}'.encode())


@pytest.mark.parametrize("body", [b"", b"{}", memoryview(b'{"id":"ignored"}')])
def test_load_and_unload_without_parameters(body):
    check_change(body)


@pytest.mark.parametrize("body", [b"x", b"[]", b'{"ready":1}', b'{"parameters":3}', b"\xff", b'{"a":' + b"[" * 100_000])
def test_what_cannot_be_read(body):
    with pytest.raises(ProtocolError):
        check_change(body) if b"parameters" in body else parse_index(body)


@pytest.mark.parametrize("name", ["config", "file:1/model.onnx", "file:../../etc/passwd", "file:"])
@pytest.mark.parametrize("value", ["x", "", {"a": 1}, 1, "n" * 100_000])
def test_files_and_configurations_are_refused(name, value):
    with pytest.raises(ProtocolError, match=f"'{name}' is not taken: .* no request may send a configuration or a file"):
        check_change(json.dumps({"parameters": {"unload_dependents": True, name: value}}).encode())


def test_other_parameters_are_refused():
    with pytest.raises(ProtocolError, match="'version' of the model repository is not known, expected 'unload_dep"):
        check_change(b'{"parameters":{"version":"2"}}')
    for value in (b"1", b'"true"', b"{}"):
        with pytest.raises(ProtocolError, match="'unload_dependents' is neither true nor false"):
            check_change(b'{"parameters":{"unload_dependents":' + value + b"}}")


def test_the_official_client_loads_and_unloads():
    client = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    bodies: list[bytes] = []

    class Client(client.InferenceServerClient):
        def _post(self, request_uri, request_body, headers, query_params):
            bodies.append(request_body.encode())
            return types.SimpleNamespace(status_code=200, read=lambda *_: b"")

    with Client("nowhere:1") as triton:
        triton.load_model("m")
        triton.unload_model("m", unload_dependents=True)
        triton.load_model("m", config="{}")
    check_change(bodies[0])
    check_change(bodies[1])
    with pytest.raises(ProtocolError, match="'config' is not taken"):
        check_change(bodies[2])
