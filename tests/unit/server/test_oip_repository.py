"""The repository's requests are read, its index is written, and nothing sent with a request becomes a file."""

import json

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


@pytest.mark.parametrize("body", [b"", b"{}", b'{"parameters":{}}', b'{"parameters":{"unload_dependents":false}}'])
def test_load_and_unload(body):
    check_change(body)


@pytest.mark.parametrize("body", [b"x", b"[]", b'{"ready":1}', b'{"parameters":3}', b"\xff", b'{"a":' + b"[" * 100_000])
def test_what_cannot_be_read(body):
    with pytest.raises(ProtocolError):
        check_change(body) if b"parameters" in body else parse_index(body)


@pytest.mark.parametrize("name", ["config", "file:1/model.onnx"])
def test_files_and_configurations_are_refused(name):
    with pytest.raises(ProtocolError, match=f"the parameter '{name}' of the model repository is not supported"):
        check_change(json.dumps({"parameters": {name: "x"}}).encode())
