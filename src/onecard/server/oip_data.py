"""One tensor's data: from a request's JSON or bytes to an array, checked to the last element.

Sources: "Tensor Data" of the specification; Triton's "Binary Tensor Data Extension".
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

import msgspec
import numpy as np

from onecard.server.oip_types import Array, Datatype, Form, ProtocolError, Shape

_COMMA = ord(",")
_SPACES = b" \t\r\n"


def from_bytes(data: memoryview, form: Form, shape: Shape, elements: int) -> Array:
    """See bytes as a tensor, without a copy where they lie at an address that suits the dtype.

    Args:
        data: row-major, little-endian, without padding.
        form: the input's.
        shape: as sent, checked against the model.
        elements: of that shape.

    Raises:
        ProtocolError: not exactly the bytes of the shape, or a truth value that is neither 0 nor 1.
    """
    dtype = form.datatype.numpy
    if len(data) != elements * dtype.itemsize:
        raise ProtocolError(
            f"input '{form.tensor.name}' has {len(data)} bytes of data, expected {elements * dtype.itemsize} "
            f"({form.datatype.name} of shape {list(shape)})."
        )
    array = np.frombuffer(data, dtype) if elements else np.empty(0, dtype)
    if dtype == np.bool_ and elements and array.view(np.uint8).max() > 1:
        raise ProtocolError(f"input '{form.tensor.name}' is BOOL, but has bytes that are neither 0 nor 1.")
    return (array if array.flags.aligned else array.copy()).reshape(shape)


def from_json(raw: msgspec.Raw, form: Form, shape: Shape, elements: int) -> Array:
    """Read a tensor's JSON array, flat in row-major order or nested exactly as the shape says.

    Args:
        raw: the text of ``data``, valid JSON.
        form: the input's.
        shape: as sent, checked against the model.
        elements: of that shape.

    Raises:
        ProtocolError: 16-bit floats; another number of elements, or another nesting, than the shape's; an element of
            another type or out of the datatype's range.
    """
    where = f"input '{form.tensor.name}'"
    if not form.datatype.in_json:
        raise ProtocolError(
            f"{where} is {form.datatype.name}, which cannot be sent as JSON.", "Send it as binary data."
        )
    text = memoryview(raw)
    # Counted before anything is decoded: a Python object an element is 16 times what the text takes.
    commas = int(np.count_nonzero(np.frombuffer(text, np.uint8) == _COMMA))
    if commas != max(elements - 1, 0):
        raise ProtocolError(f"{where} has {commas + 1} elements of data, expected {elements} (shape {list(shape)}).")
    nested = bytes(text[:256]).translate(None, _SPACES)[:2] == b"[["
    try:
        values = _decoder(form.datatype, len(shape) if nested else 1).decode(text)
        with np.errstate(over="ignore"):
            array = np.array(values, form.datatype.numpy)
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{where}, data: {_reason(error, form.datatype, shape)}") from None
    if array.shape != (shape if nested else (elements,)):
        raise ProtocolError(f"{where} has data of shape {list(array.shape)}, expected {list(shape)} or a flat array.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(f"{where} has a number that is out of the range of {form.datatype.name}.")
    return array.reshape(shape)


def _reason(error: Exception, datatype: Datatype, shape: Shape) -> str:
    if isinstance(error, msgspec.MsgspecError):
        return f"{error} ({datatype.name})."
    if isinstance(error, OverflowError):
        return f"a number is out of the range of {datatype.name}."
    return f"the nested arrays do not have the shape {list(shape)}."


@functools.lru_cache(maxsize=256)
def _decoder(datatype: Datatype, depth: int) -> msgspec.json.Decoder[Any]:
    """Of ``depth`` arrays within one another, whose elements must fit the datatype."""
    element: Any = float
    if datatype.numpy.kind == "b":
        element = bool
    elif datatype.numpy.kind in "iu":
        bounds = np.iinfo(datatype.numpy)
        # msgspec takes bounds of int64; what is above in UINT64 is refused by NumPy.
        high = int(bounds.max) if int(bounds.max) < 1 << 63 else None
        element = Annotated[int, msgspec.Meta(ge=int(bounds.min), le=high)]
    for _ in range(depth):
        element = list[element]
    return msgspec.json.Decoder(element)
