"""Tensors in the typed fields of ``InferTensorContents``, one element each: the courtesy beside the raw contents.

Source: "Tensor Data" of the KServe specification ``inference_grpc.md``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onecard.server.oip_types import Array, Form, ProtocolError, Shape

_FIELDS = {
    "BOOL": ("bool_contents", np.dtype(np.bool_)),
    "INT8": ("int_contents", np.dtype(np.int32)),
    "INT16": ("int_contents", np.dtype(np.int32)),
    "INT32": ("int_contents", np.dtype(np.int32)),
    "INT64": ("int64_contents", np.dtype(np.int64)),
    "UINT8": ("uint_contents", np.dtype(np.uint32)),
    "UINT16": ("uint_contents", np.dtype(np.uint32)),
    "UINT32": ("uint_contents", np.dtype(np.uint32)),
    "UINT64": ("uint64_contents", np.dtype(np.uint64)),
    "FP32": ("fp32_contents", np.dtype(np.float32)),
    "FP64": ("fp64_contents", np.dtype(np.float64)),
}
"""By datatype: the field, and the dtype that its elements have on the wire."""


def from_contents(contents: Any, form: Form, shape: Shape, elements: int) -> Array:
    """Read a tensor, flat in row-major order.

    Args:
        contents: an ``InferTensorContents``.
        form: the input's.
        shape: as sent, checked against the model.
        elements: of that shape.

    Raises:
        ProtocolError: a datatype that has no field; elements in another field, or another number of them; a number
            that is out of the datatype's range.
    """
    where = f"input '{form.tensor.name}'"
    if form.datatype.name not in _FIELDS:
        raise ProtocolError(
            f"{where} is {form.datatype.name}, for which there are no typed contents.",
            "Send it in 'raw_input_contents'.",
        )
    name, wire = _FIELDS[form.datatype.name]
    if others := [field.name for field, _ in contents.ListFields() if field.name != name]:
        raise ProtocolError(f"{where} is {form.datatype.name}: expected '{name}' alone, but it has {others}.")
    values = getattr(contents, name)
    if len(values) != elements:
        raise ProtocolError(f"{where} has {len(values)} elements in '{name}', expected {elements} ({list(shape)}).")
    array = np.fromiter(values, wire, elements)
    dtype = form.datatype.numpy
    if dtype.itemsize < wire.itemsize and elements:
        bounds = np.iinfo(dtype)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise ProtocolError(f"{where} has a number that is out of the range of {form.datatype.name}.")
    return array.astype(dtype, copy=False).reshape(shape)
