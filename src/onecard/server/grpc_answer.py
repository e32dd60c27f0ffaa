"""Inference answers as gRPC's messages. Tensors always go as raw contents, as Triton sends them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from onecard.errors import EngineError
from onecard.server.grpc_face import Answers
from onecard.server.grpc_messages import inference_messages
from onecard.server.grpc_wire import write_infer, write_stream
from onecard.server.oip_classify import classify, length_prefixed
from onecard.server.oip_contract import InferContract
from onecard.server.oip_types import (
    BFLOAT16,
    DATATYPES,
    Array,
    Buffer,
    Datatype,
    InferRequest,
    ProtocolError,
    Region,
    RegionAccess,
    RequestedOutput,
    Shape,
    Written,
)

_NOTHING = b""


class _Described(NamedTuple):
    """An output as the answer's head has it.

    Args:
        name: of the output.
        datatype: the protocol's.
        shape: of what is sent.
        region: where it was written instead.
        byte_size: of what was written there.
    """

    name: str
    datatype: str
    shape: Shape
    region: Region | None = None
    byte_size: int = 0


def encode_answer(
    model: str,
    request: InferRequest,
    answers: Answers,
    contract: InferContract,
    regions: RegionAccess | None = None,
    streamed: bool = False,
) -> bytes:
    """Write an answer.

    Args:
        model: its name.
        request: what is answered.
        answers: the outputs, at least those requested. They are copied: nothing of them is used afterwards.
        contract: of the model.
        regions: access to registered shared memory, to which the outputs are written that belong there; None where the
            server has none.
        streamed: whether a ``ModelStreamInferResponse`` is wanted.

    Returns:
        A ``ModelInferResponse``. It has ``raw_output_contents`` for each output, empty for one in shared memory.

    Raises:
        ProtocolError: a shared-memory place that is too small, or was cut off or unregistered meanwhile.
        StorageError: no memory is left for what is written to a shared-memory place.
        EngineError: an output that is not among the answers, or of a dtype that cannot be sent.
    """
    described: list[_Described] = []
    raw: list[Buffer] = []
    for wanted in request.outputs:
        value = answers.outputs.get(wanted.name)
        if wanted.region is not None:
            described.append(_in_region(wanted, wanted.region, value, contract, regions))
            raw.append(_NOTHING)
            continue
        array, datatype = _array(value, wanted.name, contract)
        if wanted.classes:
            shape, data = _classes(wanted, array, datatype, contract)
            described.append(_Described(wanted.name, "BYTES", shape))
        else:
            data = _bytes(array)
            described.append(_Described(wanted.name, datatype.name, array.shape))
        raw.append(data)
    parts = write_infer(_head(model, answers.version, streamed, tuple(described)), request.id, raw)
    return b"".join(write_stream(parts) if streamed else parts)


@functools.lru_cache(maxsize=1024)  # one model's answers differ in their shapes at most
def _head(model: str, version: str, streamed: bool, described: tuple[_Described, ...]) -> bytes:
    """A ``ModelInferResponse`` without the request's id and the raw contents."""
    message = inference_messages()["ModelInferResponse"](model_name=model, model_version=version)
    if streamed:  # clients of decoupled models wait for it
        message.parameters["triton_final_response"].bool_param = True
    for name, datatype, shape, region, byte_size in described:
        parameters = message.outputs.add(name=name, datatype=datatype, shape=shape).parameters
        if region is not None:
            parameters["shared_memory_region"].string_param = region.name
            parameters["shared_memory_byte_size"].int64_param = byte_size
            parameters["shared_memory_offset"].int64_param = region.offset
    return message.SerializeToString()  # type: ignore[no-any-return]


def _in_region(
    wanted: RequestedOutput, region: Region, value: Any, contract: InferContract, regions: RegionAccess | None
) -> _Described:
    """See to it that an output is at its place."""
    if isinstance(value, Written):
        datatype = DATATYPES[value.dtype]
        byte_size = math.prod(value.shape) * datatype.numpy.itemsize
        return _Described(wanted.name, datatype.name, value.shape, region, byte_size)
    array, datatype = _array(value, wanted.name, contract)
    if regions is None:
        raise ProtocolError(f"output '{wanted.name}' is to go to shared memory, which is not enabled on this server.")
    if region.byte_size < array.nbytes:
        raise ProtocolError(
            f"output '{wanted.name}' has {array.nbytes} bytes, but its 'shared_memory_byte_size' is {region.byte_size}."
        )
    regions.write(region, _bytes(array))
    return _Described(wanted.name, datatype.name, array.shape, region, array.nbytes)


def _classes(
    wanted: RequestedOutput, array: Array, datatype: Datatype, contract: InferContract
) -> tuple[Shape, Buffer]:
    """The highest values as strings: shape and data of what is sent instead of the tensor."""
    labels = contract.labels.get(wanted.name, ())
    rows = classify(array, datatype, wanted.classes, labels, contract.batched)
    count = min(wanted.classes, array.size // max(len(rows), 1))
    shape = (len(rows), count) if contract.batched else (count,)
    return shape, length_prefixed([text for row in rows for text in row])


def _array(value: Any, name: str, contract: InferContract) -> tuple[Array, Datatype]:
    if not isinstance(value, np.ndarray):
        raise EngineError(f"the model gave no output '{name}' that can be sent.")
    array = value if value.flags.c_contiguous else np.ascontiguousarray(value)
    expected = contract.outputs[name].datatype
    if array.dtype == expected.numpy:
        return array, expected
    datatype = DATATYPES.get(array.dtype.name)
    if datatype is None or expected is BFLOAT16:
        raise EngineError(f"the model gave output '{name}' as {array.dtype}, expected {expected.dtype}.")
    return array, datatype


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(_NOTHING)
