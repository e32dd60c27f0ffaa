"""The server tells of itself and its models in the words of the specification and of Triton."""

import json

import onecard
from onecard.server.oip_metadata import (
    CODEC_EXTENSIONS,
    BatchCounts,
    Duration,
    InferCounts,
    ModelCounts,
    model_config,
    model_metadata,
    model_ready,
    model_statistics,
    server_live,
    server_metadata,
    server_ready,
)
from tests.unit.server.oip_bodies import SPEC, one


def test_server():
    told = json.loads(server_metadata(onecard.__version__, CODEC_EXTENSIONS))
    assert told == {
        "name": "onecard",
        "version": onecard.__version__,
        "extensions": ["binary_tensor_data", "classification", "schedule_policy"],
    }


def test_health():
    assert json.loads(server_live(True)) == {"live": True}
    assert json.loads(server_ready(False)) == {"live": False, "ready": False}
    assert json.loads(model_ready("m", True)) == {"name": "m", "ready": True}


def test_model_metadata():
    assert json.loads(model_metadata("m", ["1", "2"], SPEC)) == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "onecard",
        "inputs": [
            {"name": "image", "datatype": "FP32", "shape": [-1, 2, 3]},
            {"name": "mask", "datatype": "BOOL", "shape": [-1, -1]},
        ],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 4]},
            {"name": "half", "datatype": "FP16", "shape": [-1, 4]},
        ],
    }


def test_config_of_a_model_with_a_batch():
    assert json.loads(model_config("m", SPEC, priorities=3)) == {
        "name": "m",
        "platform": "onecard",
        "backend": "onecard",
        "max_batch_size": 4,
        "input": [
            {"name": "image", "data_type": "TYPE_FP32", "dims": [2, 3]},
            {"name": "mask", "data_type": "TYPE_BOOL", "dims": [-1]},
        ],
        "output": [
            {"name": "scores", "data_type": "TYPE_FP32", "dims": [4]},
            {"name": "half", "data_type": "TYPE_FP16", "dims": [4]},
        ],
        "dynamic_batching": {"priority_levels": 3},
    }


def test_config_of_a_model_without_a_batch():
    told = json.loads(model_config("m", one("int64", 2, 3).spec))
    assert (told["max_batch_size"], "dynamic_batching" in told) == (0, False)
    assert told["input"] == [{"name": "x", "data_type": "TYPE_INT64", "dims": [2, 3]}]


def test_statistics():
    once = Duration(1, 5)
    batch = BatchCounts(batch_size=8, compute_input=once, compute_infer=Duration(1, 9), compute_output=once)
    counts = ModelCounts("m", "1", 1_700_000_000_000, 8, 1, InferCounts(success=Duration(2, 30)), (batch,))
    (told,) = json.loads(model_statistics([counts]))["model_stats"]
    assert told["last_inference"] == 1_700_000_000_000
    assert (told["inference_count"], told["execution_count"]) == (8, 1)
    assert told["inference_stats"]["success"] == {"count": 2, "ns": 30}
    assert set(told["inference_stats"]) == {
        *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
    }
    assert told["batch_stats"][0]["compute_infer"] == {"count": 1, "ns": 9}
    assert json.loads(model_statistics([])) == {"model_stats": []}
