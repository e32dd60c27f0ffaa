"""What a model takes and gives: named tensors whose dimensions may be symbols with a range.

The text form is ``image: float32[B,3,224,224], B=1..64``; see :func:`parse_spec`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from onecard.errors import SpecError

Dim = int | str
Bucket = dict[str, int]
"""One concrete size for every symbol of a spec, e.g. ``{"B": 8, "S": 128}``."""

DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
FLOATS = ("float64", "float32", "float16", "bfloat16")
_DTYPE_ALIASES = {"float": "float32", "half": "float16", "double": "float64", "long": "int64"}
_TENSOR = re.compile(
    r"^\s*(?P<name>[A-Za-z_][\w.\-]*)\s*:\s*(?P<dtype>\w+)\s*\[(?P<shape>[^\]]*)\]"
    r"(\s+in\s+(?P<low>\d+)\s*\.\.\s*(?P<high>\d+))?"
)
_RANGE = re.compile(r"^\s*(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<low>\d+)(\s*\.\.\s*(?P<high>\d+))?\s*$")
_EXAMPLE = "write it like 'image: float32[B,3,224,224], B=1..64'."


class Range(msgspec.Struct, frozen=True, array_like=True):
    """The sizes a symbol may take, both ends included."""

    low: int
    high: int

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


class TensorSpec(msgspec.Struct, frozen=True):
    """One named tensor: dtype and shape, where a string in the shape is a symbol.

    ``values`` are the smallest and largest value that a test input may hold (a vocabulary, say); without
    it, floats are drawn from a normal distribution and integers from 0 and 1.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    values: Range | None = None

    def __str__(self) -> str:
        values = f" in {self.values}" if self.values else ""
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]{values}"

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def concrete(self, bucket: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size in ``bucket``."""
        return tuple(dim if isinstance(dim, int) else bucket[dim] for dim in self.shape)


class Spec(msgspec.Struct, frozen=True):
    """Named inputs and outputs of a model, and the range of every symbol."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    symbols: dict[str, Range] = {}

    def __str__(self) -> str:
        ranges = [f"{name}={rng}" for name, rng in self.symbols.items()]
        return ", ".join([*map(str, self.inputs), *ranges])

    @property
    def batch_symbol(self) -> str | None:
        """The symbol that is the first dimension of every input and every output, if there is one.

        Only along it may onecard pad, split and test rows one by one.
        """
        tensors = (*self.inputs, *self.outputs)
        first = {t.shape[0] if t.shape else None for t in tensors}
        if len(first) != 1:
            return None
        symbol = first.pop()
        return symbol if isinstance(symbol, str) else None

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> Bucket:
        """Find the size of every symbol from concrete input shapes.

        Args:
            shapes: input name to concrete shape.

        Returns:
            The bucket that these shapes stand for.

        Raises:
            SpecError: an input is missing, unknown, of the wrong rank or size, or out of range.
        """
        names = {t.name for t in self.inputs}
        if names != set(shapes):
            raise SpecError(
                f"the model takes inputs {sorted(names)}, but got {sorted(shapes)}.",
                f"Pass exactly: {self}.",
            )
        found: Bucket = {}
        for tensor in self.inputs:
            shape = tuple(shapes[tensor.name])
            if len(shape) != len(tensor.shape):
                raise SpecError(f"input '{tensor.name}' has {len(shape)} dimensions {list(shape)}, expected {tensor}.")
            for axis, (size, dim) in enumerate(zip(shape, tensor.shape, strict=True)):
                expected = dim if isinstance(dim, int) else found.setdefault(dim, size)
                if size != expected:
                    raise SpecError(
                        f"input '{tensor.name}' has size {size} in dimension {axis}, expected {expected} ({tensor})."
                    )
        for symbol, size in found.items():
            if size not in self.symbols[symbol]:
                rng = self.symbols[symbol]
                raise SpecError(
                    f"{symbol}={size} is outside the range {symbol}={rng} this model was prepared for.",
                    f"Optimise again with a wider range in --input ({self}).",
                )
        return found

    def largest(self) -> Bucket:
        """Every symbol at the upper end of its range."""
        return {name: rng.high for name, rng in self.symbols.items()}

    def smallest(self) -> Bucket:
        """Every symbol at the lower end of its range."""
        return {name: rng.low for name, rng in self.symbols.items()}


def bucket_label(bucket: Mapping[str, int]) -> str:
    """A short name for a bucket that is safe in file names: ``B8-S128``, ``fixed`` if empty."""
    return "-".join(f"{name}{size}" for name, size in bucket.items()) or "fixed"


def parse_tensor(text: str) -> tuple[TensorSpec, dict[str, Range]]:
    """Read one input in its text form, with the ranges that follow it.

    Raises:
        SpecError: the text does not follow the grammar; the message says which part.
    """
    match = _TENSOR.match(text)
    if not match:
        raise SpecError(f"cannot read the input '{text}':", _EXAMPLE)
    dtype = _DTYPE_ALIASES.get(match["dtype"], match["dtype"])
    if dtype not in DTYPES:
        raise SpecError(f"unknown dtype '{dtype}' in '{text}': expected one of {', '.join(DTYPES)}.")
    shape = tuple(_parse_dim(part, text) for part in match["shape"].split(",") if part.strip())
    ranges: dict[str, Range] = {}
    rest = text[match.end() :].strip().lstrip(",")
    for part in filter(str.strip, rest.split(",")):
        found = _RANGE.match(part)
        if not found:
            raise SpecError(f"cannot read the range '{part.strip()}' in '{text}':", _EXAMPLE)
        low, high = int(found["low"]), int(found["high"] or found["low"])
        if low < 1 or high < low:
            raise SpecError(f"the range '{part.strip()}' in '{text}' must satisfy 1 <= low <= high.")
        if ranges.setdefault(found["name"], Range(low, high)) != Range(low, high):
            raise SpecError(f"{found['name']} has two ranges in '{text}'.")
    values = Range(int(match["low"]), int(match["high"])) if match["low"] else None
    if values is not None and values.high < values.low:
        raise SpecError(f"the values 'in {values}' in '{text}' must satisfy low <= high.")
    return TensorSpec(match["name"], dtype, shape, values), ranges


def _parse_dim(part: str, text: str) -> Dim:
    part = part.strip()
    if part.isdecimal() and int(part) > 0:
        return int(part)
    if re.fullmatch(r"[A-Za-z_]\w*", part):
        return part
    raise SpecError(f"'{part}' in '{text}' is neither a positive size nor a symbol;", _EXAMPLE)


def parse_spec(texts: Iterable[str]) -> Spec:
    """Read a spec's inputs from their text forms.

    Args:
        texts: one ``name: dtype[dims], SYMBOL=low..high`` each; a range may stand behind any of them.

    Returns:
        A spec without outputs (they are found by running the model).

    Raises:
        SpecError: bad grammar, a name twice, a symbol without a range, or a range without a symbol.
    """
    tensors: list[TensorSpec] = []
    symbols: dict[str, Range] = {}
    for text in texts:
        tensor, ranges = parse_tensor(text)
        if any(t.name == tensor.name for t in tensors):
            raise SpecError(f"the input '{tensor.name}' is given twice.")
        tensors.append(tensor)
        for name, rng in ranges.items():
            if symbols.setdefault(name, rng) != rng:
                raise SpecError(f"{name} has two ranges, {symbols[name]} and {rng}.")
    if not tensors:
        raise SpecError("no input is given:", _EXAMPLE)
    used = {d for t in tensors for d in t.shape if isinstance(d, str)}
    for name in sorted(used - set(symbols)):
        raise SpecError(f"the symbol {name} has no range:", f"add it, for example ', {name}=1..8'.")
    for name in sorted(set(symbols) - used):
        raise SpecError(f"the range {name}={symbols[name]} belongs to no dimension of {list(map(str, tensors))}.")
    return Spec(tuple(tensors), (), symbols)


def default_buckets(spec: Spec, batches: Sequence[int] = ()) -> list[Bucket]:
    """The concrete sizes that static variants are built for and all variants are timed at.

    The batch symbol gets ``batches``, or its smallest, 8 and largest; any other symbol gets a quarter
    of its largest size (rounded up to 8) and the largest.

    Raises:
        SpecError: a batch size is out of range, or the spec has no batch symbol to apply it to.
    """
    batch = spec.batch_symbol
    if batches and batch is None:
        raise SpecError(
            "--batch needs a symbol as the first dimension of every input and output,",
            "for example --input 'image: float32[B,3,224,224], B=1..64'.",
        )
    choices: list[list[tuple[str, int]]] = []
    for name, rng in spec.symbols.items():
        if name == batch:
            sizes = sorted(set(batches) or {rng.low, min(max(8, rng.low), rng.high), rng.high})
            for size in sizes:
                if size not in rng:
                    raise SpecError(f"batch {size} is outside {name}={rng}.", "Widen the range in --input.")
        else:
            quarter = min(rng.high, max(rng.low, -(-rng.high // 32) * 8))
            sizes = sorted({quarter, rng.high})
        choices.append([(name, size) for size in sizes])
    return [dict(combo) for combo in itertools.product(*choices)]


def smallest_fit(buckets: Sequence[Bucket], size: Bucket) -> Bucket | None:
    """The bucket with the fewest elements that holds ``size`` in every symbol, if any."""
    fits = [b for b in buckets if all(b[name] >= value for name, value in size.items())]
    return min(fits, key=_volume, default=None)


def _volume(bucket: Bucket) -> int:
    product = 1
    for size in bucket.values():
        product *= size
    return product


def spec_of_outputs(
    spec: Spec, outputs: Mapping[str, Any], bucket: Bucket, other: tuple[Mapping[str, Any], Bucket] | None
) -> Spec:
    """Add the outputs to a spec by comparing the concrete output shapes of two runs.

    Args:
        spec: the inputs and symbols.
        outputs: name to (dtype, shape) at ``bucket``.
        bucket: the sizes of the first run.
        other: the same for a second run at sizes that all differ from the first, or None if fixed.

    Returns:
        ``spec`` with outputs; a dimension that follows a symbol in both runs is that symbol, one that changes
        in another way is a symbol of its own, without a range: ``<output>_<axis>``.

    Raises:
        SpecError: an output's number of dimensions changes.
    """
    result = []
    for name, (dtype, shape) in outputs.items():
        dims: list[Dim] = list(shape)
        if other is not None:
            second_shape = other[0][name][1]
            if len(second_shape) != len(shape):
                raise SpecError(f"output '{name}' changes its number of dimensions with the input size.")
            for axis, (a, b) in enumerate(zip(shape, second_shape, strict=True)):
                symbols = [s for s in bucket if (bucket[s], other[1][s]) == (a, b)]
                if symbols:
                    dims[axis] = symbols[0]
                elif a != b:
                    dims[axis] = f"{name}_{axis}"
        result.append(TensorSpec(name, dtype, tuple(dims)))
    return msgspec.structs.replace(spec, outputs=tuple(result))
