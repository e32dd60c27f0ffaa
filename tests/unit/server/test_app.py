"""What the server adds to protocol and front: where a body lies, and which words name a model."""

from types import SimpleNamespace

import numpy as np
import pytest

from onecard.errors import UsageError
from onecard.runtime.stats import BatchStats
from onecard.server.app import BodyMemory
from onecard.server.counters import Counters
from onecard.server.hosting import read_names
from onecard.server.http_types import HttpError


@pytest.mark.parametrize("json_length", [0, 1, 63, 64, 197])
@pytest.mark.parametrize("length", [0, 1, 4096])
def test_the_first_binary_tensor_of_a_body_is_aligned(json_length, length):
    headers = {b"inference-header-content-length": str(json_length).encode()} if json_length else {}
    memory = BodyMemory(1 << 20)(SimpleNamespace(headers=headers), length)
    assert (len(memory), memory.readonly, memory.format) == (length, False, "B")
    if length:
        assert (np.frombuffer(memory, np.uint8).ctypes.data + json_length) % 64 == 0


@pytest.mark.parametrize("value", [b"-1", b"x", b"9" * 30, b""])
def test_a_length_that_is_none_is_left_to_the_parser(value):
    headers = {b"inference-header-content-length": value}
    assert len(BodyMemory(1 << 20)(SimpleNamespace(headers=headers), 10)) == 10


def test_no_more_memory_is_given_for_bodies_than_allowed_and_it_comes_back_with_the_last_reference():
    give, request = BodyMemory(1000), SimpleNamespace(headers={})
    first = give(request, 600)
    view = np.frombuffer(first, np.uint8)[10:20]  # as an input of a request would be
    with pytest.raises(HttpError) as refused:
        give(request, 401)
    assert (refused.value.status, give.used_bytes) == (503, 600)
    del first
    assert give.used_bytes == 600
    del view
    assert give.used_bytes == 0
    assert len(give(request, 1000)) == 1000


def test_names_of_models(tmp_path):
    found = read_names([str(tmp_path / "resnet.onecard"), f"mine={tmp_path}/other"])
    assert {name: path.name for name, path in found.items()} == {"resnet": "resnet.onecard", "mine": "other"}
    for words in (["a/b=x"], ["=x"], [f"{'n' * 129}=x"], ["x=1", "x=2"]):
        with pytest.raises(UsageError):
            read_names(words)


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
