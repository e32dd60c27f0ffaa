"""KServe's Python clients, unchanged, against a real ``onecard serve``: protocol v2 over HTTP and over gRPC."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.services.running_server import GOLDEN, serving

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(importlib.util.find_spec("kserve") is None, reason="kserve is not installed"),
]
ROWS = 2
TENSORS = {
    "name": "m",
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 16, 16]}],
    "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 10]}],
}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def seen(golden) -> dict[str, Any]:
    """What the clients saw."""
    with serving(f"m={GOLDEN}") as (port, server):
        grpc = re.search(r"gRPC on port (\d+)", server.output)
        assert grpc is not None, server.output
        asked = {
            "http": f"http://127.0.0.1:{port}",
            "grpc": f"127.0.0.1:{grpc[1]}",
            "rows": golden["in.image"][:ROWS].tolist(),
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.services.kserve_calls"],
            input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=120,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_clients_see_a_server_that_lives_and_is_ready(seen, way):
    found = seen[way]
    asked = [found[what] for what in ("server live", "server ready", "model ready", "other model ready")]
    assert asked == [True, True, True, False]


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_clients_read_the_metadata(seen, way):
    assert seen[way]["metadata"].items() >= TENSORS.items()
    if way == "grpc":
        assert seen[way]["metadata"]["server"] == "onecard"


@pytest.mark.parametrize(
    ("way", "how"),
    [
        *(("http", f"infer {sent} {back}") for sent in ("json", "binary") for back in ("json", "binary")),
        *(("grpc", f"infer {sent}") for sent in ("raw", "typed")),
    ],
)
def test_the_clients_get_the_originals_answers(seen, golden, way, how):
    found = seen[way][how]
    version = "1" if way == "grpc" else None  # the client does not read it from JSON
    assert (found["id"], found["model"], found["version"]) == ("mine", "m", version)
    assert (found["name"], found["datatype"]) == ("output", "FP32")
    np.testing.assert_allclose(found["values"], golden["out.output"][:ROWS], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("way", "what", "words"),
    [
        ("http", "no such model", ("HTTPStatusError", "'404 Not Found'", "no model 'none'")),
        ("http", "wrong shape", ("HTTPStatusError", "'400 Bad Request'", "dimension 2")),
        ("grpc", "no such model", ("NOT_FOUND", "no model 'none'")),
        ("grpc", "wrong shape", ("INVALID_ARGUMENT", "dimension 2")),
        ("grpc", "too late", ("DEADLINE_EXCEEDED",)),
    ],
)
def test_the_clients_show_the_servers_errors(seen, way, what, words):
    for word in words:
        assert word in seen[way][what]
