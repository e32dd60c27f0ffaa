"""A real server whose engine has a real card, through the official client; CUDA shared memory in both directions."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import onecard
from onecard.search.job import EffortSpec
from tests.conftest import INPUT, MODEL_FILE
from tests.services.running_server import serving

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

triton = pytest.importorskip("tritonclient.http")
pytestmark = pytest.mark.timeout(300)
SHAPE = (2, 3, 16, 16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    (folder / "zoo.py").write_text(MODEL_FILE)
    onecard.optimize(
        f"{folder / 'zoo.py'}:small",
        inputs=INPUT,
        output=folder / "small.onecard",
        device="cuda:0",
        recipes=("cudagraph.eager+fp16@bucket",),
        effort=EffortSpec(0.1, 0.1, 0.1, 2),
    ).close()
    return folder / "small.onecard"


@pytest.fixture(scope="module")
def server(bundle: Path):
    with serving(f"m={bundle}", "--cuda-shared-memory", "--ingest", "image=uint8 NHWC") as (port, server):
        yield triton.InferenceServerClient(f"127.0.0.1:{port}"), server


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)


def ask(client, given: np.ndarray) -> np.ndarray:
    image = triton.InferInput("image", list(given.shape), "FP32" if given.dtype == np.float32 else "UINT8")
    image.set_data_from_numpy(given)
    answer: np.ndarray = client.infer("m", [image]).as_numpy("output")
    return answer


def expected(bundle: Path, given: np.ndarray) -> np.ndarray:
    with contextlib.closing(onecard.load(bundle)) as loaded:
        answer: np.ndarray = loaded(image=torch.from_numpy(given))["output"].cpu().numpy()
        return answer


def test_answers_are_the_bundles_own(server, bundle):
    client, _ = server
    for seed in range(3):
        np.testing.assert_allclose(ask(client, picture(seed)), expected(bundle, picture(seed)), rtol=1e-2, atol=1e-2)


def test_pictures_as_bytes(server, bundle):
    client, _ = server
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    floats = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) / np.float32(255))
    np.testing.assert_allclose(ask(client, pixels), expected(bundle, floats), rtol=1e-2, atol=1e-2)


def test_cuda_shared_memory_both_ways(server, bundle):
    shm = pytest.importorskip("tritonclient.utils.cuda_shared_memory")
    client, _ = server
    given = picture(7)
    right = expected(bundle, given)
    inputs = shm.create_shared_memory_region("in", given.nbytes, 0)
    outputs = shm.create_shared_memory_region("out", right.nbytes, 0)
    try:
        client.register_cuda_shared_memory("in", shm.get_raw_handle(inputs), 0, given.nbytes)
        client.register_cuda_shared_memory("out", shm.get_raw_handle(outputs), 0, right.nbytes)
        assert {entry["name"] for entry in client.get_cuda_shared_memory_status()} == {"in", "out"}
        image = triton.InferInput("image", list(given.shape), "FP32")
        image.set_shared_memory("in", given.nbytes)
        wanted = triton.InferRequestedOutput("output")
        wanted.set_shared_memory("out", right.nbytes)
        for factor in (1.0, 0.5, 1.0):
            scaled = given * np.float32(factor)
            shm.set_shared_memory_region(inputs, [scaled])
            client.infer("m", [image], outputs=[wanted])
            found = shm.get_contents_as_numpy(outputs, np.float32, list(right.shape))
            np.testing.assert_allclose(found, expected(bundle, scaled), rtol=1e-2, atol=1e-2)
        client.unregister_cuda_shared_memory("in")
        with pytest.raises(triton.InferenceServerException, match="not registered"):
            client.infer("m", [image], outputs=[wanted])
        client.unregister_cuda_shared_memory()
        assert client.get_cuda_shared_memory_status() == []
    finally:
        shm.destroy_shared_memory_region(inputs)
        shm.destroy_shared_memory_region(outputs)
    np.testing.assert_allclose(ask(client, given), right, rtol=1e-2, atol=1e-2)


def test_an_engine_that_is_killed_comes_back(server, bundle):
    client, running = server
    right = expected(bundle, picture(1))
    children = psutil.Process(running.process.pid).children()
    engine = max(children, key=lambda child: child.memory_info().rss)
    os.kill(engine.pid, signal.SIGKILL)
    began = time.monotonic()
    np.testing.assert_allclose(ask(client, picture(1)), right, rtol=1e-2, atol=1e-2)  # it waits for the new engine
    print(f"answered {time.monotonic() - began:.2f} s after the engine was killed")
    assert engine.pid not in [child.pid for child in psutil.Process(running.process.pid).children()]
