"""Bodies of inference requests, put together by hand so that every part can be wrong."""

import json
from typing import Any

import numpy as np

from onecard.server.oip_contract import InferContract
from onecard.spec import Range, Spec, TensorSpec

SPEC = Spec(
    (TensorSpec("image", "float32", ("B", 2, 3)), TensorSpec("mask", "bool", ("B", "S"))),
    (TensorSpec("scores", "float32", ("B", 4)), TensorSpec("half", "float16", ("B", 4))),
    {"B": Range(1, 4), "S": Range(1, 16)},
)
RAW_IMAGE = TensorSpec("image", "uint8", ("B", 3, 2))


def contract(**options: Any) -> InferContract:
    return InferContract(SPEC, **options)


def one(dtype: str, *shape: int | str) -> InferContract:
    """Of a model with one input ``x`` and one output ``y``."""
    symbols = {dim: Range(1, 8) for dim in shape if isinstance(dim, str)}
    return InferContract(Spec((TensorSpec("x", dtype, shape),), (TensorSpec("y", "float32", shape),), symbols))


def head(**changes: Any) -> dict[str, Any]:
    """A right request of two rows in binary data, with its fields changed."""
    return {
        "id": "1",
        "parameters": {"binary_data_output": True},
        "inputs": [image(), mask()],
        **changes,
    }


def image(**changes: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "FP32", "shape": [2, 2, 3], "parameters": {"binary_data_size": 48}, **changes}


def mask(**changes: Any) -> dict[str, Any]:
    return {"name": "mask", "datatype": "BOOL", "shape": [2, 5], "parameters": {"binary_data_size": 10}, **changes}


def data() -> bytes:
    return np.arange(12, dtype="<f4").tobytes() + bytes([0, 1] * 5)


def body(request: dict[str, Any], binary: bytes | None = None) -> tuple[bytes, int]:
    text = json.dumps(request).encode()
    return text + (data() if binary is None else binary), len(text)


def json_body(**fields: Any) -> bytes:
    """A request to a model of one input ``x``, all in JSON."""
    item = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4], **fields}
    return json.dumps({"inputs": [item]}).encode()
