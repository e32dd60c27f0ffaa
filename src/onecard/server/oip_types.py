"""The words of the Open Inference Protocol v2: datatypes, limits, a parsed request, an encoded answer.

Sources: the KServe specification ``inference_rest.md`` (https://github.com/kserve/open-inference-protocol), and
Triton's extensions (https://github.com/triton-inference-server/server, ``docs/protocol``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from onecard.errors import UsageError
from onecard.spec import TensorSpec

Array = np.ndarray[Any, Any]
Buffer = bytes | bytearray | memoryview
Shape = tuple[int, ...]
_LONGEST_QUOTE = 80


class ProtocolError(UsageError):
    """A request that breaks the protocol or does not fit the model; the message names the field."""


class Datatype(NamedTuple):
    """One tensor datatype of the protocol ("Tensor Data Types").

    Args:
        name: in the protocol, for example ``FP32``.
        dtype: in onecard, for example ``float32``.
        numpy: of the arrays that carry it, little-endian; bfloat16, which NumPy has not, travels as int16.
        in_json: whether its values may be sent as JSON numbers.
    """

    name: str
    dtype: str
    numpy: np.dtype[Any]
    in_json: bool = True


_TABLE = (
    Datatype("BOOL", "bool", np.dtype(np.bool_)),
    Datatype("UINT8", "uint8", np.dtype("u1")),
    Datatype("UINT16", "uint16", np.dtype("<u2")),
    Datatype("UINT32", "uint32", np.dtype("<u4")),
    Datatype("UINT64", "uint64", np.dtype("<u8")),
    Datatype("INT8", "int8", np.dtype("i1")),
    Datatype("INT16", "int16", np.dtype("<i2")),
    Datatype("INT32", "int32", np.dtype("<i4")),
    Datatype("INT64", "int64", np.dtype("<i8")),
    Datatype("FP16", "float16", np.dtype("<f2"), in_json=False),
    Datatype("FP32", "float32", np.dtype("<f4")),
    Datatype("FP64", "float64", np.dtype("<f8")),
    Datatype("BF16", "bfloat16", np.dtype("<i2"), in_json=False),
)
DATATYPES = {datatype.dtype: datatype for datatype in _TABLE}
"""By onecard's name of the dtype."""
BFLOAT16 = DATATYPES["bfloat16"]


@dataclass(frozen=True)
class OipLimits:
    """What a request may ask of the parser.

    Args:
        max_json_bytes: of the JSON part; tensors above it must come as binary data.
        max_id_chars: of the request's ``id``, which is sent back.
    """

    max_json_bytes: int = 8 << 20
    max_id_chars: int = 512


class Region(NamedTuple):
    """A place in a registered shared-memory region ("Shared-Memory Extension").

    Args:
        name: under which the region was registered.
        byte_size: of the tensor.
        offset: in bytes, from the region's beginning.
    """

    name: str
    byte_size: int
    offset: int = 0


Where = Literal["host", "device"]
"""Whose memory a place is in: the host's, or a device's, which only the engine can read and write."""


class RegionAccess(Protocol):
    """Registered shared memory, as one request sees it. Every method raises a ProtocolError for what is no place."""

    def locate(self, region: Region) -> Where:
        """Where a place lies; checked here, before the model is run."""
        ...

    def read(self, region: Region) -> memoryview:
        """A copy of a place in host memory, exactly ``byte_size`` bytes; the client cannot change it any more."""
        ...

    def write(self, region: Region, data: memoryview) -> None:
        """Write bytes, ``byte_size`` of them or fewer, to the beginning of a place in host memory."""
        ...


class HeldRegions(RegionAccess, Protocol):
    """The same for a request whose places are known before it is read."""

    def hold(self, places: Sequence[Region]) -> bool:
        """Keep these places for this request; False if one of them is not within registered memory of the host."""
        ...

    def read_into(self, region: Region, out: memoryview) -> None:
        """Copy a place that is held to ``out``, which has as many bytes; a ProtocolError if it was cut off."""
        ...


class DeviceInput(NamedTuple):
    """An input that lies in a device's shared memory: checked against the model, but not read.

    Args:
        name: of the input.
        dtype: in onecard.
        shape: as sent.
        region: where it lies, exactly as many bytes as the shape has.
    """

    name: str
    dtype: str
    shape: Shape
    region: Region


class Written(NamedTuple):
    """An answer's output that the engine has already written to its place on the device.

    Args:
        dtype: in onecard.
        shape: of the output.
    """

    dtype: str
    shape: Shape


class Form(NamedTuple):
    """One way in which an input may be sent: the name, dtype and shape asked for, and the protocol's datatype."""

    tensor: TensorSpec
    datatype: Datatype


class RequestedOutput(NamedTuple):
    """One output that the client wants, and how.

    Args:
        name: of the output.
        binary: as binary data behind the JSON.
        classes: how many of the highest values to send as ``value:index`` strings instead; 0 for the tensor itself.
        region: where to write it instead of sending it.
    """

    name: str
    binary: bool
    classes: int = 0
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """An inference request that fits the protocol and the model.

    Args:
        id: as the client gave it, or empty.
        inputs: arrays by name, in C order; they may be read-only views of the request's body.
        dtypes: onecard's dtype of each of them; ``bfloat16`` is carried by an int16 array.
        outputs: those to send, in this order.
        priority: 1 is the highest, larger numbers are lower; 0 stands for the server's default.
        timeout_us: within which the answer is wanted, in microseconds; 0 stands for the server's default.
        on_device: the inputs that are not among ``inputs``, since they lie in a device's shared memory.
        copied: by name, where in the host's shared memory inputs were read.
    """

    id: str
    inputs: dict[str, Array]
    dtypes: dict[str, str]
    outputs: tuple[RequestedOutput, ...]
    priority: int = 0
    timeout_us: int = 0
    on_device: tuple[DeviceInput, ...] = ()
    copied: Mapping[str, Region] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferResponse:
    """An encoded answer.

    Args:
        body: to be sent one behind the other; large tensors are the model's own memory, not copies.
        json_length: the value of the header ``Inference-Header-Content-Length``, or None where it must not be sent.
    """

    body: list[Buffer]
    json_length: int | None

    @property
    def content_type(self) -> bytes:
        return b"application/json" if self.json_length is None else b"application/octet-stream"

    @property
    def content_length(self) -> int:
        return sum(len(buffer) for buffer in self.body)


def quote(text: str) -> str:
    """A client's text for a message: printable, in quotes, and short."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "...")
