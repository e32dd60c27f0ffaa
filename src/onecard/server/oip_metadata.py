"""The bodies that tell of the server and its models: metadata, readiness, configuration and statistics.

Sources: "Server Metadata", "Model Metadata" and the health sections of the specification; Triton's extensions for model
configuration, statistics and the model repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from onecard.server.oip_types import DATATYPES
from onecard.spec import Dim, Spec, TensorSpec

SERVER_NAME = "onecard"
PLATFORM = "onecard"
CODEC_EXTENSIONS = ("binary_tensor_data", "classification", "schedule_policy")
"""What reading requests and writing answers supports by itself; who serves adds what it serves."""
_ENCODER = msgspec.json.Encoder()
_TRITON_KINDS = {name: f"TYPE_{datatype.name}" for name, datatype in DATATYPES.items()}


class Duration(msgspec.Struct, frozen=True):
    """How often something happened, and how long that took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0


class InferCounts(msgspec.Struct, frozen=True):
    """What became of a model's requests, each counted once in every stage that it went through.

    Args:
        success: requests answered.
        fail: requests not answered.
        queue: waiting.
        compute_input: copying inputs to the device.
        compute_infer: the model alone.
        compute_output: copying outputs back.
        cache_hit: of Triton's response cache, which is not here; its clients read the field.
        cache_miss: likewise.
    """

    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()


class BatchCounts(msgspec.Struct, frozen=True):
    """Executions of one batch size.

    Args:
        batch_size: in rows.
        compute_input: copying inputs to the device.
        compute_infer: the model alone.
        compute_output: copying outputs back.
    """

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelCounts(msgspec.Struct, frozen=True):
    """What one version of a model did since the server started ("Statistics Extension").

    Args:
        name: of the model.
        version: of the model.
        last_inference_ms: when the last request came, in milliseconds since the epoch.
        inference_count: rows answered.
        execution_count: batches run.
        inference_stats: of the requests.
        batch_stats: of the batches, by size.
    """

    name: str
    version: str
    last_inference_ms: int = msgspec.field(default=0, name="last_inference")
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: InferCounts = InferCounts()
    batch_stats: tuple[BatchCounts, ...] = ()


def server_metadata(version: str, extensions: Sequence[str]) -> bytes:
    """The body of ``GET /v2``.

    Args:
        version: of onecard.
        extensions: names of those that are served, in Triton's words.
    """
    return _ENCODER.encode({"name": SERVER_NAME, "version": version, "extensions": list(extensions)})


def server_live(live: bool) -> bytes:
    """The body of ``GET /v2/health/live``; its status says the same."""
    return _ENCODER.encode({"live": live})


def server_ready(ready: bool) -> bytes:
    """The body of ``GET /v2/health/ready``; its status says the same.

    The specification's text names the field ``live``, KServe's server and client ``ready``: both are there.
    """
    return _ENCODER.encode({"live": ready, "ready": ready})


def model_ready(name: str, ready: bool) -> bytes:
    """The body of ``GET /v2/models/{name}/ready``; its status says the same."""
    return _ENCODER.encode({"name": name, "ready": ready})


def model_metadata(name: str, versions: Sequence[str], spec: Spec, also: Sequence[TensorSpec] = ()) -> bytes:
    """The body of ``GET /v2/models/{name}``; a symbol in a shape is -1.

    Args:
        name: of the model.
        versions: of it.
        spec: of the model.
        also: further forms of inputs. The protocol has room for one of each: these are parameters.
    """
    metadata: dict[str, Any] = {
        "name": name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [_tensor_metadata(tensor) for tensor in spec.inputs],
        "outputs": [_tensor_metadata(tensor) for tensor in spec.outputs],
    }
    if also:
        metadata["parameters"] = _parameters(also)
    return _ENCODER.encode(metadata)


def model_config(name: str, spec: Spec, priorities: int = 0, also: Sequence[TensorSpec] = ()) -> bytes:
    """The body of ``GET /v2/models/{name}/config``, as far as Triton's ModelConfig has words for it.

    Args:
        name: of the model.
        spec: of the model. With a batch symbol, ``max_batch_size`` is its largest and the dims are those of a row.
        priorities: how many levels the queue tells apart; 0 to leave them out.
        also: further forms of inputs, as in :func:`model_metadata`.
    """
    batch = spec.batch_symbol
    config: dict[str, Any] = {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": spec.symbols[batch].high if batch is not None else 0,
        "input": [_tensor_config(tensor, batch) for tensor in spec.inputs],
        "output": [_tensor_config(tensor, batch) for tensor in spec.outputs],
    }
    if batch is not None:
        config["dynamic_batching"] = {"priority_levels": priorities} if priorities else {}
    if also:
        config["parameters"] = {key: {"string_value": value} for key, value in _parameters(also).items()}
    return _ENCODER.encode(config)


def model_statistics(models: Sequence[ModelCounts]) -> bytes:
    """The body of ``GET /v2/models[/{name}[/versions/{version}]]/stats``."""
    return _ENCODER.encode({"model_stats": models})


def _tensor_metadata(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": DATATYPES[tensor.dtype].name, "shape": _sizes(tensor.shape)}


def _tensor_config(tensor: TensorSpec, batch: str | None) -> dict[str, Any]:
    dims = _sizes(tensor.shape if batch is None else tensor.shape[1:])
    return {"name": tensor.name, "data_type": _TRITON_KINDS[tensor.dtype], "dims": dims}


def _parameters(also: Sequence[TensorSpec]) -> dict[str, str]:
    """``ingest.INPUT`` to what may be sent instead: ``UINT8[-1,224,224,3]``."""
    return {f"ingest.{t.name}": f"{DATATYPES[t.dtype].name}[{','.join(map(str, _sizes(t.shape)))}]" for t in also}


def _sizes(shape: Sequence[Dim]) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in shape]
