"""What the server adds to protocol and front: where a body lies, and what is counted."""

from types import SimpleNamespace

import numpy as np
import pytest

from onecard.runtime.stats import BatchStats
from onecard.server.app import body_memory
from onecard.server.counters import Counters
from onecard.server.engine_memory import RequestMemory


@pytest.fixture
def memory():
    made = RequestMemory(1 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("json_length", [0, 1, 63, 64, 197])
@pytest.mark.parametrize("length", [0, 1, 4096])
def test_the_first_binary_tensor_of_a_body_is_aligned(memory, json_length, length):
    headers = {b"inference-header-content-length": str(json_length).encode()} if json_length else {}
    body = body_memory(memory)(SimpleNamespace(headers=headers), length)
    assert (len(body), body.readonly, body.format) == (length, False, "B")
    if length:
        assert (np.frombuffer(body, np.uint8).ctypes.data + json_length) % 64 == 0


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
