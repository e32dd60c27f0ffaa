"""The inputs of the requests: drawn from the model's own description and a seed, or rows of the user's file.

The front of a server says dtypes and shapes and no more, and the load generator does without torch: so this draws with
NumPy what :mod:`onecard.inputs` draws for a search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onecard.bench.target import Inputs
from onecard.errors import DataError, UsageError
from onecard.spec import Bucket, Spec, TensorSpec

ROWS = "rows"
"""The symbol of a first dimension of any size, where a server does not say its name."""
ANY_SIZE = 1 << 31
MOST_SAMPLES = 64
_MOST_BYTES = 128 << 20
_MASK_DIMENSIONS = 2


def sizes_of(spec: Spec, rows: int, dimensions: Sequence[str]) -> Bucket:
    """The size of every symbol.

    Args:
        spec: of the model.
        rows: of a request.
        dimensions: ``S=128``; of a server, whose metadata has no names for them, ``INPUT=128`` for all of an input's
            and ``INPUT:AXIS=128`` for one. A name that is none of these stands for whatever else is open.

    Raises:
        UsageError: a size is missing, unknown or out of range.
    """
    given = dict(_dimension(text) for text in dimensions)
    batch = spec.batch_symbol or (ROWS if ROWS in spec.symbols else None)
    if batch is None and rows != 1:
        raise UsageError(f"--rows is {rows}, but the model takes no batches: {spec}.", "Leave it out.")
    found: Bucket = {} if batch is None else {batch: given.pop(batch, rows)}
    known = {*spec.symbols, *(t.name for t in spec.inputs)}
    others = [name for name in given if name not in known]
    taken: set[str] = set()
    for symbol in spec.symbols:
        if symbol in found:
            continue
        names = [symbol, symbol.partition(":")[0], *(others if ":" in symbol else [])]
        name = next((name for name in names if name in given), None)
        if name is None:
            raise UsageError(f"the model takes any size of '{symbol}' ({spec}).", f"Say --dimension {symbol}=128.")
        found[symbol] = given[name]
        taken.add(name)
    if left := sorted(set(given) - taken):
        raise UsageError(f"--dimension {left[0]}: the model has no such dimension; it takes {spec}.")
    for symbol, size in found.items():
        if size not in spec.symbols[symbol]:
            raise UsageError(f"{symbol}={size} is outside of what the model takes: {symbol}={spec.symbols[symbol]}.")
    return found


def _dimension(text: str) -> tuple[str, int]:
    name, _, size = text.rpartition("=")
    if not name or not size.isdecimal() or int(size) < 1:
        raise UsageError(f"cannot read --dimension '{text}':", "write it like S=128.")
    return name.strip(), int(size)


def draw_samples(spec: Spec, sizes: Bucket, seed: int = 0) -> list[Inputs]:
    """Random inputs: normal floats, integers of the range that the spec names (or 0 and 1), masks of ones.

    bfloat16, which NumPy lacks, is in the bits of int16. There are as many as fit in some memory, 64 at most.
    """
    chance = np.random.default_rng(seed)
    first = {t.name: _draw(t, t.concrete(sizes), chance) for t in spec.inputs}
    count = min(MOST_SAMPLES, _fitting(first))
    return [first, *({t.name: _draw(t, t.concrete(sizes), chance) for t in spec.inputs} for _ in range(count - 1))]


def _fitting(sample: Inputs) -> int:
    return max(1, _MOST_BYTES // max(1, sum(a.nbytes for a in sample.values())))


def _draw(tensor: TensorSpec, shape: tuple[int, ...], chance: np.random.Generator) -> npt.NDArray[np.generic]:
    if tensor.is_float:
        values = chance.standard_normal(shape, np.float32)
        if tensor.values is not None:
            values = chance.uniform(tensor.values.low, tensor.values.high, shape).astype(np.float32)
        if tensor.dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
        return values.astype(tensor.dtype)
    if len(shape) == _MASK_DIMENSIONS and "mask" in tensor.name:
        return np.ones(shape, tensor.dtype)
    low, high = (tensor.values.low, tensor.values.high) if tensor.values else (0, 1)
    return chance.integers(low, high + 1, shape).astype(tensor.dtype)


def cut_samples(arrays: Mapping[str, npt.NDArray[np.generic]], spec: Spec, sizes: Bucket) -> list[Inputs]:
    """Requests made of the user's rows, in their order, as many as fit in some memory.

    The last one's rows are made up from the first.

    Args:
        arrays: by input name: ``[N, ...]`` rows; of an input without a batch dimension, N whole inputs.
        spec: of the model.
        sizes: of the requests.

    Raises:
        DataError: an input is missing, or of another dtype or shape.
    """
    names = [t.name for t in spec.inputs]
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"the data has no array '{missing[0]}': it has {sorted(arrays)}.", f"The model takes {spec}.")
    batch = spec.batch_symbol or (ROWS if ROWS in sizes else None)
    shapes = {t.name: t.concrete(sizes) for t in spec.inputs}
    for tensor in spec.inputs:
        row = shapes[tensor.name][1:] if batch else shapes[tensor.name]
        array = arrays[tensor.name]
        dtype = "int16" if tensor.dtype == "bfloat16" else tensor.dtype
        if array.dtype != np.dtype(dtype) or tuple(array.shape[1:]) != row or not len(array):
            raise DataError(
                f"the array '{tensor.name}' is {array.dtype}{list(array.shape)}, expected {dtype}"
                f"{['N', *row]} for requests of {tensor} at {sizes}."
            )
    rows = sizes[batch] if batch else 1
    count = min(len(arrays[name]) for name in names)
    wanted = math.ceil(count / rows)
    index = [np.arange(n * rows, (n + 1) * rows) % count for n in range(wanted)]
    first = {name: arrays[name][:rows] for name in names}
    return [{name: arrays[name][i if batch else i[0]] for name in names} for i in index[: _fitting(first)]]
