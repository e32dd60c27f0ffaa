"""What KServe's own clients see of a server: ``python -m tests.services.kserve_calls``, JSON in and JSON out.

In a process of its own: its generated messages have the names of tritonclient's, and protobuf takes each name once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable
from typing import Any

import httpx
import numpy as np
import orjson
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelMetadataRequest, ServerMetadataRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import RequestedOutput

MODEL = "m"


def request(rows: list[Any], binary: bool, binary_answer: bool, name: str = MODEL) -> InferRequest:
    """A request as KServe's users make it.

    Args:
        rows: of ``image``, nested lists.
        binary: whether the tensor is sent as bytes.
        binary_answer: whether the answer is asked for as bytes (over HTTP; gRPC has no choice).
        name: of the model.
    """
    array = np.asarray(rows, np.float32)
    tensor = InferInput("image", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array, binary_data=binary)
    asked = [RequestedOutput("output", {"binary_data": True})] if binary_answer else None
    return InferRequest(name, [tensor], "mine", request_outputs=asked)


def answer(response: Any) -> dict[str, Any]:
    """What is in an ``InferResponse``."""
    (output,) = response.outputs
    return {
        "id": response.id,
        "model": response.model_name,
        "version": response.model_version,
        "name": output.name,
        "datatype": output.datatype,
        "values": output.as_numpy().tolist(),
    }


async def refused(call: Awaitable[Any]) -> str:
    """The error's kind and text; empty if there is none."""
    try:
        await call
    except Exception as error:
        code = getattr(error, "code", None)
        return f"{type(error).__name__} {code().name if callable(code) else ''} {error}"
    return ""


async def over_http(base: str, rows: list[Any]) -> dict[str, Any]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=60)) as client:
        infers = {
            f"infer {'binary' if sent else 'json'} {'binary' if back else 'json'}": answer(
                await client.infer(base, request(rows, sent, back), model_name=MODEL)
            )
            for sent in (False, True)
            for back in (False, True)
        }
        wide = [[[[0.0] * 8] * 8] * 3]
        return {
            "server ready": await client.is_server_ready(base),
            "server live": await client.is_server_live(base),
            "model ready": await client.is_model_ready(base, MODEL),
            "other model ready": await client.is_model_ready(base, "none"),
            **infers,
            "no such model": await refused(client.infer(base, request(rows, True, True, "none"), model_name="none")),
            "wrong shape": await refused(client.infer(base, request(wide, True, True), model_name=MODEL)),
            "metadata": await metadata_over_http(base),
        }


async def metadata_over_http(base: str) -> dict[str, Any]:
    """Its client has no call for that; its transport is httpx."""
    async with httpx.AsyncClient(timeout=60) as client:
        found = (await client.get(f"{base}/v2/models/{MODEL}")).json()
        return {"name": found["name"], "inputs": found["inputs"], "outputs": found["outputs"]}


async def over_grpc(address: str, rows: list[Any]) -> dict[str, Any]:
    async with InferenceGRPCClient(address, timeout=60) as client:
        wide = [[[[0.0] * 8] * 8] * 3]
        return {
            "server ready": await client.is_server_ready(),
            "server live": await client.is_server_live(),
            "model ready": await client.is_model_ready(MODEL),
            "other model ready": await client.is_model_ready("none"),
            "infer raw": answer(await client.infer(request(rows, True, False))),
            "infer typed": answer(await client.infer(request(rows, False, False))),
            "no such model": await refused(client.infer(request(rows, True, False, "none"))),
            "wrong shape": await refused(client.infer(request(wide, True, False))),
            "too late": await refused(client.infer(request(rows, True, False), timeout=1e-6)),
            "metadata": await metadata_over_grpc(client),
        }


async def metadata_over_grpc(client: InferenceGRPCClient) -> dict[str, Any]:
    """By KServe's generated stub, on the client's channel."""
    stub = GRPCInferenceServiceStub(client._channel)
    model = await stub.ModelMetadata(ModelMetadataRequest(name=MODEL))
    server = await stub.ServerMetadata(ServerMetadataRequest())

    def tensors(these: Any) -> list[dict[str, Any]]:
        return [{"name": each.name, "datatype": each.datatype, "shape": list(each.shape)} for each in these]

    return {
        "name": model.name,
        "inputs": tensors(model.inputs),
        "outputs": tensors(model.outputs),
        "server": server.name,
    }


async def calls(asked: dict[str, Any]) -> dict[str, Any]:
    """All calls of both clients.

    Args:
        asked: ``http`` and ``grpc``, where the server listens, and ``rows`` of the model's input.
    """
    return {
        "http": await over_http(asked["http"], asked["rows"]),
        "grpc": await over_grpc(asked["grpc"], asked["rows"]),
    }


def main() -> None:
    logging.disable(logging.CRITICAL)  # the clients log what they raise
    sys.stdout.buffer.write(orjson.dumps(asyncio.run(calls(json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
