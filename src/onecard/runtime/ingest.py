"""What callers may send instead of what the model takes: bytes of pictures, narrower numbers; made into it at the card.

A quarter of the bytes travels, and the conversion costs the card next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from onecard.errors import SpecError
from onecard.runtime.slots import Array, as_tensor
from onecard.spec import Dim, Range, Spec, TensorSpec

Shape = tuple[int, ...]
Size = TypeVar("Size", bound=Dim)
_PICTURE_DTYPES = ("float32", "float16", "bfloat16")
_EXACT_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_BITS = {"bool": 1, "int8": 7, "uint8": 8, "int16": 15, "int32": 31, "int64": 63}
_WIDER_FLOATS = {"float32": ("float64",), "float16": ("float32", "float64"), "bfloat16": ("float32", "float64")}


class Ingest(Protocol):
    """How one input may come in another form. Shapes are of whole batches, ``[B, ...]``."""

    @property
    def input(self) -> str:
        """The name of the input."""
        ...

    @property
    def raw_dtype(self) -> str:
        """Of what is sent; never the dtype of the input itself, since by it the two are told apart."""
        ...

    def check(self, spec: Spec) -> None:
        """Raise a SpecError where the model's input cannot be made from this form."""
        ...

    @property
    def raw_values(self) -> Range | None:
        """The smallest and largest value that is sent; None for those of the input itself."""
        ...

    def raw_shape(self, shape: tuple[Size, ...]) -> tuple[Size, ...]:
        """What is sent for an input of this shape, in which there may be symbols."""
        ...

    def model_shape(self, raw_shape: Shape) -> Shape:
        """The other way round; raises a SpecError for a shape that nothing can be made of."""
        ...

    def __call__(self, raw: Tensor, out: Tensor) -> None:
        """Make rows of the input; on a GPU the work is put on the current stream.

        Args:
            raw: [rows, ...] in the raw form, on the device.
            out: [rows, ...] in the model's form: a part of its input, which it fills.
        """
        ...


@dataclass(frozen=True)
class Picture:
    """Pictures as bytes, for a float input ``[B, C, H, W]``: the model is given ``(x - mean[c]) / std[c]``.

    Args:
        input: its name.
        mean: a value per channel, or one for all, in units of the bytes (0 to 255).
        std: the same; 255 gives numbers from 0 to 1.
        layout: of the bytes: ``NHWC``, as decoders give them, or ``NCHW``.
    """

    input: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (255.0,)
    layout: str = "NHWC"

    @property
    def raw_dtype(self) -> str:
        return "uint8"

    @property
    def raw_values(self) -> Range | None:
        return Range(0, 255)

    @classmethod
    def unit(cls, name: str, mean: Sequence[float], std: Sequence[float], layout: str = "NHWC") -> Picture:
        """From the mean and deviation of numbers from 0 to 1, as torchvision and timm state them."""
        return cls(name, tuple(255.0 * m for m in mean), tuple(255.0 * s for s in std), layout)

    def check(self, spec: Spec) -> None:
        tensor = _find(spec, self.input)
        if self.layout not in ("NHWC", "NCHW"):
            raise SpecError(f"unknown picture layout '{self.layout}':", "write NHWC or NCHW.")
        if tensor.dtype not in _PICTURE_DTYPES or len(tensor.shape) != 4:  # noqa: PLR2004 - [B, C, H, W]
            raise SpecError(
                f"pictures are for an input of four dimensions [B,C,H,W] in {', '.join(_PICTURE_DTYPES)}, not {tensor}."
            )
        channels = tensor.shape[1]
        if not isinstance(channels, int):
            raise SpecError(f"pictures need a fixed number of channels, but it is {channels} in {tensor}.")
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise SpecError(f"'{self.input}' has {channels} channels, but {what} has {len(values)} values.")
        if 0 in self.std:
            raise SpecError(f"a std of 0 was given for the pictures of '{self.input}'.")

    def raw_shape(self, shape: tuple[Size, ...]) -> tuple[Size, ...]:
        batch, channels, height, width = shape
        return (batch, height, width, channels) if self.layout == "NHWC" else shape

    def model_shape(self, raw_shape: Shape) -> Shape:
        if len(raw_shape) != 4:  # noqa: PLR2004 - [B, H, W, C]
            raise SpecError(
                f"pictures for '{self.input}' are uint8 {self.layout}, but got the shape {list(raw_shape)}."
            )
        batch, a, b, c = raw_shape
        return (batch, c, a, b) if self.layout == "NHWC" else raw_shape

    def __call__(self, raw: Tensor, out: Tensor) -> None:
        from onecard.kernels.normalize import normalize

        channels = out.shape[1]
        pictures = raw.permute(0, 3, 1, 2) if self.layout == "NHWC" else raw
        mean, std = (v * channels if len(v) == 1 else v for v in (self.mean, self.std))
        normalize(pictures, mean, std, out)


@dataclass(frozen=True)
class Cast:
    """The same numbers in a dtype with fewer bits: int32 for int64 ids, float16 for a float32 input.

    Args:
        input: its name.
        raw_dtype: what is sent; every value of it must exist in the input's dtype.
    """

    input: str
    raw_dtype: str

    @property
    def raw_values(self) -> Range | None:
        return None

    def check(self, spec: Spec) -> None:
        tensor = _find(spec, self.input)
        if not _exact(self.raw_dtype, tensor.dtype):
            raise SpecError(
                f"'{self.input}' is {tensor.dtype}: it cannot be made from {self.raw_dtype} without loss.",
                f"Narrower are {', '.join(d for d in (*_BITS, *_EXACT_BITS) if _exact(d, tensor.dtype)) or 'none'}.",
            )

    def raw_shape(self, shape: tuple[Size, ...]) -> tuple[Size, ...]:
        return shape

    def model_shape(self, raw_shape: Shape) -> Shape:
        return raw_shape

    def __call__(self, raw: Tensor, out: Tensor) -> None:
        out.copy_(raw, non_blocking=True)


def check_ingests(spec: Spec, ingests: Sequence[Ingest]) -> dict[str, Ingest]:
    """Every ingest by the name of its input.

    Raises:
        SpecError: one that does not fit the model, or two for one input.
    """
    found: dict[str, Ingest] = {}
    for ingest in ingests:
        ingest.check(spec)
        if ingest.input in found:
            raise SpecError(f"the input '{ingest.input}' was given two raw forms.", "Leave one.")
        found[ingest.input] = ingest
    return found


def raw_inputs(spec: Spec, ingests: Sequence[Ingest]) -> tuple[TensorSpec, ...]:
    """The raw forms in a spec's words, named as their inputs are: what else callers may send.

    Raises:
        SpecError: see :func:`check_ingests`.
    """
    found = check_ingests(spec, ingests)
    return tuple(_raw_input(tensor, found[tensor.name]) for tensor in spec.inputs if tensor.name in found)


def raw_spec(spec: Spec, ingests: Sequence[Ingest]) -> Spec:
    """The spec of callers who send every input in its raw form, if it has one.

    Raises:
        SpecError: see :func:`check_ingests`.
    """
    raw = {tensor.name: tensor for tensor in raw_inputs(spec, ingests)}
    return msgspec.structs.replace(spec, inputs=tuple(raw.get(tensor.name, tensor) for tensor in spec.inputs))


def in_model_form(spec: Spec, ingests: Sequence[Ingest], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """One caller's inputs, checked before, as the model itself takes them; on the host.

    Args:
        spec: what the model takes.
        ingests: see :func:`check_ingests`.
        inputs: each in the model's form or the raw one.
    """
    found = {ingest.input: ingest for ingest in ingests}
    made = dict(inputs)
    for tensor in spec.inputs:
        array, ingest = inputs[tensor.name], found.get(tensor.name)
        if ingest is None or dtype_name(array) == tensor.dtype:
            continue
        with torch.no_grad():
            raw = as_tensor(array)
            out = torch.empty(ingest.model_shape(tuple(raw.shape)), dtype=getattr(torch, tensor.dtype))
            ingest(raw, out)
        made[tensor.name] = out
    return made


def model_shapes(spec: Spec, ingests: Mapping[str, Ingest], inputs: Mapping[str, Array]) -> dict[str, Shape]:
    """The shapes that the model will see of what a caller gave, for ``spec.bind``.

    Args:
        spec: what the model takes.
        ingests: by input name, from :func:`check_ingests`.
        inputs: host arrays, each in the model's form or the raw one.

    Raises:
        SpecError: an unknown input, a dtype that is neither the model's nor the raw form's, a tensor that is not
            in host memory, an array in another machine's byte order. ``spec.bind`` finds the rest.
    """
    expected = {tensor.name: tensor for tensor in spec.inputs}
    shapes: dict[str, Shape] = {}
    for name, array in inputs.items():
        if name not in expected:
            raise SpecError(f"the model has no input '{name}': expected {', '.join(expected)}.")
        dtype = dtype_name(array)
        ingest = ingests.get(name)
        if isinstance(array, Tensor):
            if array.device.type != "cpu":
                raise SpecError(f"input '{name}' is on {array.device}, expected it in host memory.", "Call .cpu().")
        elif not array.dtype.isnative:
            raise SpecError(f"input '{name}' has another machine's byte order ({array.dtype.str}).")
        if dtype == expected[name].dtype:
            shapes[name] = tuple(array.shape)
        elif ingest is not None and dtype == ingest.raw_dtype:
            shapes[name] = ingest.model_shape(tuple(array.shape))
        else:
            raw = f" or {ingest.raw_dtype}" if ingest is not None else ""
            raise SpecError(f"input '{name}' is {dtype}, expected {expected[name]}{raw}.", "Convert it first.")
    return shapes


def dtype_name(array: Array) -> str:
    """The dtype as specs write it."""
    return str(array.dtype).removeprefix("torch.")


def _raw_input(tensor: TensorSpec, ingest: Ingest) -> TensorSpec:
    dtype, values = ingest.raw_dtype, ingest.raw_values or tensor.values
    if values is not None and dtype in _BITS:  # a narrower dtype may not hold all that a test input could be
        low, high = (0 if dtype in ("bool", "uint8") else -(1 << _BITS[dtype])), (1 << _BITS[dtype]) - 1
        values = Range(max(low, min(values.low, high)), min(high, max(values.high, low)))
    return TensorSpec(tensor.name, dtype, ingest.raw_shape(tensor.shape), values)


def _find(spec: Spec, name: str) -> TensorSpec:
    for tensor in spec.inputs:
        if tensor.name == name:
            return tensor
    raise SpecError(f"the model has no input '{name}': it has {', '.join(t.name for t in spec.inputs)}.")


def _exact(narrow: str, wide: str) -> bool:
    """True where every value of one dtype is a value of another one."""
    if narrow in _EXACT_BITS:
        return wide in _WIDER_FLOATS.get(narrow, ())
    if narrow not in _BITS or narrow == wide:
        return False
    if wide in _EXACT_BITS:
        return _BITS[narrow] <= _EXACT_BITS[wide]
    unsigned = wide in ("uint8", "bool")
    return _BITS[narrow] < _BITS[wide] and (not unsigned or narrow == "bool")
