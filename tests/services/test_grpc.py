"""The official gRPC clients, unchanged, and the health service, against a real ``onecard serve``."""

from __future__ import annotations

import asyncio
import os
import re

import numpy as np
import pytest
import safetensors.numpy

grpc = pytest.importorskip("grpc")
import tritonclient.grpc as triton  # noqa: E402
import tritonclient.grpc.aio as triton_aio  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402
from tritonclient.utils import shared_memory as shm  # noqa: E402

from onecard.server.grpc_messages import health_messages  # noqa: E402
from tests.services.running_server import GOLDEN, serving  # noqa: E402

pytestmark = pytest.mark.timeout(180)
PREFIX = f"onecard-grpc-{os.getpid()}"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def address():
    with serving(f"m={GOLDEN}", "--shared-memory-prefix", PREFIX) as (_, server):
        port = re.search(r"gRPC on port (\d+)", server.output)
        assert port is not None, server.output
        yield f"127.0.0.1:{port[1]}"


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address) as client:
        yield client


def image(array: np.ndarray, module=triton):
    tensor = module.InferInput("image", list(array.shape), "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor


def test_answers_are_the_originals(client, golden):
    for rows in (1, 2):
        answer = client.infer("m", [image(golden["in.image"][:rows])])
        np.testing.assert_allclose(answer.as_numpy("output"), golden["out.output"][:rows], rtol=1e-3, atol=1e-4)


def test_what_the_client_can_ask(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m")
    assert client.get_server_metadata().name == "onecard"
    assert client.get_model_metadata("m").inputs[0].name == "image"
    assert client.get_model_config("m").config.max_batch_size > 1
    assert client.get_inference_statistics("m").model_stats[0].name == "m"
    assert [entry.state for entry in client.get_model_repository_index().models] == ["READY"]
    client.load_model("m")
    assert client.get_model_metadata("m").versions == ["2"]


def test_errors_have_grpcs_codes(client, golden):
    for name, array, code in (
        ("none", golden["in.image"][:1], "NOT_FOUND"),
        ("m", np.zeros((1, 3, 8, 8), np.float32), "INVALID_ARGUMENT"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            client.infer(name, [image(array)])
        assert refused.value.status() == f"StatusCode.{code}"
    with pytest.raises(InferenceServerException) as late:
        client.infer("m", [image(golden["in.image"][:1])], timeout=1)
    assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_many_at_once_by_the_asyncio_client(address, golden):
    async def main() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(address) as client:
            scaled = [image(golden["in.image"][:1] * np.float32(n), triton_aio) for n in range(32)]
            return [a.as_numpy("output") for a in await asyncio.gather(*(client.infer("m", [x]) for x in scaled))]

    found = asyncio.run(main())
    np.testing.assert_allclose(found[1], golden["out.output"][:1], rtol=1e-3, atol=1e-4)
    assert len({answer.tobytes() for answer in found}) == 32


def test_a_stream(client, golden):
    found: list = []
    client.start_stream(lambda result, error: found.append(error or result.as_numpy("output")))
    for _ in range(5):
        client.async_stream_infer("m", [image(golden["in.image"][:1])])
    client.stop_stream()
    assert len(found) == 5
    for answer in found:
        np.testing.assert_allclose(answer, golden["out.output"][:1], rtol=1e-3, atol=1e-4)


def test_shared_memory(client, golden):
    given = np.ascontiguousarray(golden["in.image"][:1])
    handle = shm.create_shared_memory_region("in", f"/{PREFIX}-in", given.nbytes)
    try:
        shm.set_shared_memory_region(handle, [given])
        client.register_system_shared_memory("in", f"/{PREFIX}-in", given.nbytes)
        tensor = triton.InferInput("image", list(given.shape), "FP32")
        tensor.set_shared_memory("in", given.nbytes)
        answer = client.infer("m", [tensor]).as_numpy("output")
        np.testing.assert_allclose(answer, golden["out.output"][:1], rtol=1e-3, atol=1e-4)
        client.unregister_system_shared_memory("in")
    finally:
        shm.destroy_shared_memory_region(handle)


def test_the_health_service(address):
    with grpc.insecure_channel(address) as channel:
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
    assert health_messages()["HealthCheckResponse"].FromString(answer).status == 1  # SERVING
