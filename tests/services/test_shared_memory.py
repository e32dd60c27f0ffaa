"""System shared memory through the official client's own utilities and a real server."""

from __future__ import annotations

import base64
import contextlib
import os

import numpy as np
import pytest
import safetensors.numpy
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from tests.services.running_server import GOLDEN, serving

pytestmark = pytest.mark.timeout(180)
PREFIX = f"onecard-test-{os.getpid()}"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def client():
    with serving(f"m={GOLDEN}", "--shared-memory-prefix", PREFIX) as (port, _):
        yield triton.InferenceServerClient(f"127.0.0.1:{port}")


@contextlib.contextmanager
def region(name: str, nbytes: int):
    handle = shm.create_shared_memory_region(name, f"/{PREFIX}-{name}", nbytes)
    try:
        yield handle
    finally:
        shm.destroy_shared_memory_region(handle)


def test_tensors_in_shared_memory_both_ways(client, golden):
    given = np.ascontiguousarray(golden["in.image"][:2])
    expected = golden["out.output"][:2]
    with region("in", given.nbytes) as inputs, region("out", expected.nbytes) as outputs:
        client.register_system_shared_memory("in", f"/{PREFIX}-in", given.nbytes)
        client.register_system_shared_memory("out", f"/{PREFIX}-out", expected.nbytes)
        assert {entry["name"] for entry in client.get_system_shared_memory_status()} == {"in", "out"}
        image = triton.InferInput("image", list(given.shape), "FP32")
        image.set_shared_memory("in", given.nbytes)
        wanted = triton.InferRequestedOutput("output")
        wanted.set_shared_memory("out", expected.nbytes)
        for factor in (1.0, 0.5):
            shm.set_shared_memory_region(inputs, [given * np.float32(factor)])
            client.infer("m", [image], outputs=[wanted])
            answer = np.array(shm.get_contents_as_numpy(outputs, np.float32, list(expected.shape)))
            if factor == 1.0:
                np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4)
            else:
                assert not np.allclose(answer, expected, rtol=1e-3, atol=1e-4)
        client.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match="not registered"):
            client.infer("m", [image], outputs=[wanted])
        client.unregister_system_shared_memory()
        assert client.get_system_shared_memory_status() == []


def test_what_may_not_be_registered(client, golden):
    with region("small", 64):
        for name, key, nbytes in (("a", "/etc-passwd", 8), ("b", f"/{PREFIX}-small", 65), ("c", f"/{PREFIX}/../x", 8)):
            with pytest.raises(InferenceServerException):
                client.register_system_shared_memory(name, key, nbytes)
        client.register_system_shared_memory("d", f"/{PREFIX}-small", 64)
        image = triton.InferInput("image", [1, 3, 16, 16], "FP32")
        image.set_shared_memory("d", 3 * 16 * 16 * 4)
        with pytest.raises(InferenceServerException):
            client.infer("m", [image])
        client.unregister_system_shared_memory("d")


def test_without_a_prefix_there_is_none():
    with serving(f"m={GOLDEN}") as (port, _):
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        with pytest.raises(InferenceServerException, match="not enabled"):
            client.register_system_shared_memory("a", "/onecard-x", 8)
        assert "system_shared_memory" not in client.get_server_metadata()["extensions"]


def test_cuda_shared_memory_that_cannot_be_opened_is_refused_and_harms_nothing(golden):
    handle = base64.b64encode(bytes(64)).decode()
    with serving(f"m={GOLDEN}", "--cuda-shared-memory", "--device", "cpu") as (port, _):
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        assert "cuda_shared_memory" in client.get_server_metadata()["extensions"]
        with pytest.raises(InferenceServerException):
            client.register_cuda_shared_memory("a", handle.encode(), 0, 8)
        assert client.get_cuda_shared_memory_status() == []
        tensor = triton.InferInput("image", [1, 3, 16, 16], "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(golden["in.image"][:1]))
        assert client.infer("m", [tensor]).as_numpy("output").shape == (1, 10)
