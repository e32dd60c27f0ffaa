"""Writing an inference answer: arrays to JSON and binary data, as the client asked; and the body of an error.

Sources: "Inference Response JSON Object" of the specification; Triton's extensions for binary tensor data,
classification and shared memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from onecard.errors import EngineError
from onecard.server.oip_classify import classify, length_prefixed
from onecard.server.oip_contract import InferContract
from onecard.server.oip_types import (
    BFLOAT16,
    DATATYPES,
    Array,
    Buffer,
    Datatype,
    Form,
    InferRequest,
    InferResponse,
    ProtocolError,
    Region,
    RegionAccess,
    RequestedOutput,
    Written,
)

_JOINED_BYTES = 32 << 10  # below it a copy costs less than one more buffer to send
_BY_NUMPY = {datatype.numpy: datatype for datatype in DATATYPES.values() if datatype is not BFLOAT16}
_ENCODER = msgspec.json.Encoder()


def encode_infer(
    request: InferRequest,
    answers: Mapping[str, Any],
    contract: InferContract,
    model: tuple[str, str],
    regions: RegionAccess | None = None,
) -> InferResponse:
    """Write the answer to a request.

    JSON has no NaN and no infinity; a float output that holds one is written with the literals ``NaN``, ``Infinity``
    and ``-Infinity``, which ``tritonclient`` and Python read.

    Args:
        request: what is answered.
        answers: the outputs by name, at least those requested: NumPy arrays or CPU tensors, or :class:`Written` for
            one that is on the device already. bfloat16 may also come as an int16 carrier, or widened to float32 as the
            engine gives it.
        contract: of the model.
        model: its name, and its version or an empty string.
        regions: access to registered shared memory, to which the outputs are written that belong there; None where the
            server has none.

    Returns:
        The buffers to send, and the length of the JSON where binary data follows it.

    Raises:
        ProtocolError: a shared-memory place that is too small, or was cut off or unregistered meanwhile.
        StorageError: no memory is left for what is written to a shared-memory place.
        EngineError: an output that is not among the answers, or of a dtype that cannot be sent.
    """
    writer = _Writer(contract, regions)
    described = [writer.describe(wanted, answers.get(wanted.name)) for wanted in request.outputs]
    name, version = model
    head: dict[str, Any] = {"model_name": name}
    if version:
        head["model_version"] = version
    if request.id:
        head["id"] = request.id
    head["outputs"] = described
    text = _ENCODER.encode(head)
    if not any(wanted.binary and wanted.region is None for wanted in request.outputs):
        return InferResponse([text], None)
    total = len(text) + sum(len(buffer) for buffer in writer.data)
    body: list[Buffer] = [b"".join((text, *writer.data))] if total <= _JOINED_BYTES else [text, *writer.data]
    return InferResponse(body, len(text))


class _Writer:
    """Describes outputs as JSON objects, and collects the binary data that goes behind them."""

    def __init__(self, contract: InferContract, regions: RegionAccess | None) -> None:
        self.data: list[Buffer] = []
        self._contract = contract
        self._regions = regions

    def describe(self, wanted: RequestedOutput, value: Any) -> dict[str, Any]:
        """An output's JSON object; its binary data, if any, is put behind ``data`` or into its region."""
        if isinstance(value, Written):
            return _written(wanted, value)
        array, datatype = _answer(value, wanted.name, self._contract.outputs[wanted.name])
        if wanted.classes:
            return self._classes(wanted, array, datatype)
        shown = {"name": wanted.name, "datatype": datatype.name, "shape": list(array.shape)}
        if wanted.region is not None:
            self._to_region(wanted.name, wanted.region, array)
            return {**shown, "parameters": _place(wanted.region, array.nbytes)}
        if wanted.binary:
            self.data.append(_bytes(array))
            return {**shown, "parameters": {"binary_data_size": array.nbytes}}
        return {**shown, "data": _json_data(wanted.name, array, datatype)}

    def _classes(self, wanted: RequestedOutput, array: Array, datatype: Datatype) -> dict[str, Any]:
        batched = self._contract.batched
        rows = classify(array, datatype, wanted.classes, self._contract.labels.get(wanted.name, ()), batched)
        count = min(wanted.classes, array.size // max(len(rows), 1))
        shown = {"name": wanted.name, "datatype": "BYTES", "shape": [len(rows), count] if batched else [count]}
        texts = [text for row in rows for text in row]
        if wanted.binary:
            self.data.append(length_prefixed(texts))
            return {**shown, "parameters": {"binary_data_size": len(self.data[-1])}}
        return {**shown, "data": texts}

    def _to_region(self, name: str, region: Region, array: Array) -> None:
        if self._regions is None:
            raise ProtocolError(f"output '{name}' is to go to shared memory, which is not enabled on this server.")
        if region.byte_size < array.nbytes:
            raise ProtocolError(
                f"output '{name}' has {array.nbytes} bytes, but its 'shared_memory_byte_size' is {region.byte_size}."
            )
        self._regions.write(region, _bytes(array))


def _written(wanted: RequestedOutput, value: Written) -> dict[str, Any]:
    if wanted.region is None:
        raise EngineError(f"output '{wanted.name}' was left on the device, but is to be sent.")
    datatype = DATATYPES[value.dtype]
    size = math.prod(value.shape) * datatype.numpy.itemsize
    shown = {"name": wanted.name, "datatype": datatype.name, "shape": list(value.shape)}
    return {**shown, "parameters": _place(wanted.region, size)}


def _place(region: Region, byte_size: int) -> dict[str, Any]:
    place = {"shared_memory_region": region.name, "shared_memory_byte_size": byte_size}
    return {**place, "shared_memory_offset": region.offset} if region.offset else place


def _answer(value: Any, name: str, form: Form) -> tuple[Array, Datatype]:
    if value is None:
        raise EngineError(f"the model gave no output '{name}'.")
    expected = form.datatype
    array: Array = value if isinstance(value, np.ndarray) else _from_tensor(value)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if expected is BFLOAT16 and array.dtype in (np.dtype(np.int16), np.dtype(np.float32)):
        return (array if array.dtype.kind == "i" else _narrowed(array)), BFLOAT16
    datatype = _BY_NUMPY.get(array.dtype)
    if datatype is None:
        raise EngineError(f"the model gave output '{name}' as {array.dtype}, expected {expected.dtype}.")
    return array, datatype


def _from_tensor(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    array: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _narrowed(wide: Array) -> Array:
    """bfloat16 that was widened to float32 for NumPy: its upper half is the number, its lower half is zero."""
    return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


def _json_data(name: str, array: Array, datatype: Datatype) -> Any:
    if not datatype.in_json:
        raise EngineError(
            f"the model gave output '{name}' as {datatype.name}, which cannot be sent as JSON.", "Ask for binary data."
        )
    values = array.reshape(-1).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return msgspec.Raw(json.dumps(values, separators=(",", ":")).encode())
    return values


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
