"""A server that speaks the Open Inference Protocol over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from onecard.bench.metadata import datatype_name, protocol_spec
from onecard.bench.records import ANSWERED, FAILED, REFUSED
from onecard.bench.target import Address, Done, Inputs, raw_bytes
from onecard.errors import EngineError, MissingDependencyError, UsageError
from onecard.spec import Spec

_CHANNELS = 4
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # else all channels share one connection
    ("grpc.enable_retries", 0),
)
_REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
_PATIENCE_S = 10.0


class GrpcTarget:
    """See :func:`open_grpc`."""

    def __init__(self, address: Address, metadata: Sequence[tuple[str, str]]) -> None:
        try:
            import grpc.aio

            from onecard.server.grpc_messages import inference_messages

            self._messages = inference_messages()
        except ImportError as error:
            raise MissingDependencyError("grpcio is not installed.", "pip install 'onecard[serve]'") from error
        self._error = grpc.aio.AioRpcError
        self._metadata = tuple(metadata)
        host = f"[{address.host}]" if ":" in address.host else address.host
        place = f"{host}:{address.port}"
        self._channels = [grpc.aio.insecure_channel(place, _OPTIONS) for _ in range(_CHANNELS)]
        self._infer = [channel.unary_unary("/inference.GRPCInferenceService/ModelInfer") for channel in self._channels]
        self._calls: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._address = address
        self.model = address.model
        self.spec = Spec(())
        self.about: dict[str, str] = {}
        self.said = ""

    def prepare(self, inputs: Inputs) -> bytes:
        request = self._messages["ModelInferRequest"](model_name=self.model)
        raw = raw_bytes(inputs)
        for tensor in self.spec.inputs:
            shape = list(inputs[tensor.name].shape)
            request.inputs.add(name=tensor.name, datatype=datatype_name(tensor.dtype), shape=shape)
            request.raw_input_contents.append(raw[tensor.name])
        return bytes(request.SerializeToString())

    def send(self, request: bytes, done: Done) -> None:
        self._turn = (self._turn + 1) % len(self._infer)
        task = asyncio.get_running_loop().create_task(self._call(self._infer[self._turn], request, done))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def close(self) -> None:
        for task in list(self._calls):
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def ask(self, method: str, **fields: object) -> Any:
        """Call another method of the service; the answer's message.

        Raises:
            EngineError: the server cannot be reached.
            UsageError: it refuses, with its own words.
        """
        call = self._channels[0].unary_unary(f"/inference.GRPCInferenceService/{method}")
        request = self._messages[f"{method}Request"](**fields).SerializeToString()
        try:
            data = await call(request, timeout=_PATIENCE_S, metadata=self._metadata)
        except self._error as error:
            code, details = error.code().name, error.details() or ""
            if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"):
                raise EngineError(
                    f"the server at {self._address.text} cannot be reached: {code}, {details}.",
                    "Is it running, and is this its gRPC port?",
                ) from error
            raise UsageError(f"the server at {self._address.text} refused: {code}, {details}") from error
        return self._messages[f"{method}Response"].FromString(data)

    async def _call(self, call: Any, request: bytes, done: Done) -> None:
        try:
            await call(request, metadata=self._metadata)
            outcome = ANSWERED
        except self._error as error:
            code = error.code().name
            outcome = f"{REFUSED if code in _REFUSALS else FAILED}{code}"
            self.said = self.said or f"{code}, {error.details()}"
        done(outcome, time.perf_counter())


async def open_grpc(address: Address, fields: Sequence[str] = ()) -> GrpcTarget:
    """Reach a server and learn what its model takes.

    Args:
        address: of the server, and the model if it has several.
        fields: metadata to send along, written like header fields: ``Authorization: Bearer ...``.

    Raises:
        MissingDependencyError: grpcio is not installed.
        EngineError: it cannot be reached.
        UsageError: it has no such model, or several and none is named.
    """
    metadata = []
    for field in fields:
        name, colon, value = field.partition(":")
        if not (colon and name.strip()):
            raise UsageError(f"cannot read --header '{field}':", "write it like 'Name: value'.")
        metadata.append((name.strip().lower(), value.strip()))
    target = GrpcTarget(address, metadata)
    try:
        server = await target.ask("ServerMetadata")
        if not target.model:
            names = sorted({entry.name for entry in (await target.ask("RepositoryIndex", ready=True)).models})
            if len(names) != 1:
                raise UsageError(f"which model of {address.text}? It has: {', '.join(names)}.", "Name it with --model.")
            target.model = names[0]
        found = await target.ask("ModelMetadata", name=target.model)
    except BaseException:
        await target.close()
        raise
    target.spec = protocol_spec([(t.name, t.datatype, list(t.shape)) for t in found.inputs])
    target.about = {
        "protocol": f"gRPC, {_CHANNELS} connections",
        "server": f"{server.name} {server.version}",
        "model": target.model,
        "model version": ", ".join(found.versions),
    }
    return target
