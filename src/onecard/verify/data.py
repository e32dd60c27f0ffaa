"""Labelled data: the user's own rows, checked against the spec before anything is run on them.

Three forms: an ``.npz`` or ``.safetensors`` file whose arrays are named like the model's inputs, with the labels
in ``label`` or ``labels`` (or in several arrays whose names begin with ``label_``), or a function named
``module:callable`` or ``file.py:callable`` that returns ``(inputs, labels)`` or yields such batches.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.errors import DataError, UsageError
from onecard.reference import resolve_callable
from onecard.spec import Spec, TensorSpec

Named = dict[str, Tensor]
Labels = Tensor | dict[str, Tensor] | None

_FORMS = "Pass an .npz or .safetensors file, 'module:callable' or 'file.py:callable'."
_LABEL_PREFIX = "label_"


@dataclass(frozen=True)
class Dataset:
    """Rows of inputs with their labels, on the CPU.

    Args:
        inputs: name to tensor [rows, ...], with the dtypes of the spec.
        labels: [rows, ...], or name to such a tensor (``label_start`` is ``start``), or None.
        rows: their number.
    """

    inputs: Named
    labels: Labels
    rows: int


def load_data(text: str, spec: Spec) -> Dataset:
    """Read labelled data and check it against the model's inputs.

    Args:
        text: a file's path or a function's reference.
        spec: the model's inputs. All must have one common first dimension, along which the rows lie; there
            may be more rows than its range allows, for they are run in batches.

    Raises:
        DataError: unreadable, empty, or not what the spec asks for; the message names the tensor and the cure.
        UsageError: the text is neither a file nor a reference.
        ModelError: the function's module cannot be imported.
    """
    suffix = Path(text).suffix.lower()
    if suffix in (".npz", ".safetensors"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise DataError(f"there is no file '{path}'.", _FORMS)
        arrays = _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
        inputs, labels = _split(arrays, spec, text)
    elif ":" in text:
        inputs, labels = _call(text, spec)
    else:
        raise UsageError(f"cannot read data from '{text}'.", _FORMS)
    return _checked(inputs, labels, spec)


def batches(dataset: Dataset, size: int) -> Iterator[Dataset]:
    """The rows in order, ``size`` at a time; the last batch has what is left.

    Raises:
        ValueError: ``size`` is not positive.
    """
    if size < 1:
        raise ValueError(f"a batch must have at least one row, got {size}")
    for low in range(0, dataset.rows, size):
        part = slice(low, min(low + size, dataset.rows))
        inputs = {name: tensor[part] for name, tensor in dataset.inputs.items()}
        labels = dataset.labels
        if isinstance(labels, dict):
            labels = {name: tensor[part] for name, tensor in labels.items()}
        elif labels is not None:
            labels = labels[part]
        yield Dataset(inputs, labels, part.stop - part.start)


def _read_npz(path: Path) -> Named:
    try:
        with path.open("rb") as file:  # opened here, because NumPy leaves a damaged file open
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise DataError(f"'{path}' is not an .npz archive.", "Write it with numpy.savez(path, name=array).")
            with loaded:
                return {name: _as_tensor(loaded[name], name) for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error):
            cure = "Save arrays of numbers: numpy.savez(path, image=images.astype('float32'), label=labels)."
            raise DataError(f"'{path}' holds Python objects (pickles), which are never loaded.", cure) from error
        raise DataError(f"cannot read '{path}': {error}.", "Write it with numpy.savez(path, name=array).") from error


def _read_safetensors(path: Path) -> Named:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        cure = "Write it with safetensors.torch.save_file({name: tensor}, path)."
        raise DataError(f"cannot read '{path}': {error}.", cure) from error


def _split(arrays: Named, spec: Spec, source: str) -> tuple[Named, Labels]:
    """Sort a file's arrays into inputs and labels; anything else is a mistake that must not pass in silence."""
    names = {tensor.name for tensor in spec.inputs}
    inputs = {name: tensor for name, tensor in arrays.items() if name in names}
    rest = {name: tensor for name, tensor in arrays.items() if name not in names}
    single = [name for name in rest if name in ("label", "labels")]
    several = {n.removeprefix(_LABEL_PREFIX): t for n, t in rest.items() if n.startswith(_LABEL_PREFIX)}
    unknown = sorted(set(rest) - set(single) - {_LABEL_PREFIX + name for name in several})
    if unknown:
        raise DataError(
            f"'{source}' holds arrays that are neither inputs nor labels: {', '.join(unknown)}.",
            f"The inputs are {', '.join(sorted(names))}; labels are 'label' or begin with '{_LABEL_PREFIX}'.",
        )
    if len(single) + bool(several) > 1:
        raise DataError(f"'{source}' holds labels twice: {', '.join(sorted(rest))}.", "Keep one kind.")
    return inputs, rest[single[0]] if single else several or None


def _call(text: str, spec: Spec) -> tuple[Named, Labels]:
    """The rows that a user's function returns or yields, joined."""
    function = resolve_callable(text)
    try:
        answer = function()
        pairs = [answer] if _is_pair(answer) else list(answer)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the data function '{text}' failed with {type(error).__name__}: {error}.") from error
    if not pairs:
        raise DataError(f"the data function '{text}' gave no batch.")
    if not all(_is_pair(pair) for pair in pairs):
        raise DataError(
            f"the data function '{text}' must return (inputs, labels) or an iterable of such pairs.",
            "inputs is a dict of tensors or arrays by the input's name; labels a tensor, a dict or None.",
        )
    inputs = _join([_named_inputs(pair[0], spec) for pair in pairs], "input")
    if all(pair[1] is None for pair in pairs):
        return inputs, None
    if any(pair[1] is None for pair in pairs):
        raise DataError(f"the data function '{text}' gave labels for some batches only.")
    labels = [pair[1] if isinstance(pair[1], Mapping) else {"": pair[1]} for pair in pairs]
    joined = _join([{str(k): _as_tensor(v, f"label {k}".strip()) for k, v in part.items()} for part in labels], "label")
    return inputs, joined[""] if set(joined) == {""} else joined


def check_pair(pair: Any, spec: Spec, source: str) -> Dataset:
    """One ``(inputs, labels)`` that a user's function gave, checked against the model's inputs.

    Args:
        pair: inputs as a dict of tensors or arrays, or as one tensor; labels as a tensor, a dict or None.
        spec: the model's inputs.
        source: what the user calls the function.

    Raises:
        DataError: it is no such pair, or not what the spec asks for.
    """
    if not _is_pair(pair):
        raise DataError(
            f"the data function '{source}' must return (inputs, labels) or an iterable of such pairs.",
            "inputs is a dict of tensors or arrays by the input's name; labels a tensor, a dict or None.",
        )
    inputs, labels = _named_inputs(pair[0], spec), pair[1]
    if isinstance(labels, Mapping):
        labels = {str(name): _as_tensor(value, f"label {name}") for name, value in labels.items()} or None
    elif labels is not None:
        labels = _as_tensor(labels, "label")
    return _checked(inputs, labels, spec)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], Mapping | Tensor | np.ndarray)  # noqa: PLR2004


def _named_inputs(value: Any, spec: Spec) -> Named:
    if isinstance(value, Mapping):
        return {str(name): _as_tensor(item, str(name)) for name, item in value.items()}
    if len(spec.inputs) != 1:
        names = ", ".join(t.name for t in spec.inputs)
        raise DataError("the data function gave one tensor as inputs.", f"Give a dict with the inputs {names}.")
    return {spec.inputs[0].name: _as_tensor(value, spec.inputs[0].name)}


def _join(parts: list[Named], kind: str) -> Named:
    first = parts[0]
    for part in parts:
        if set(part) != set(first):
            raise DataError(f"the batches differ in their {kind}s: {sorted(first)} and {sorted(part)}.")
        for name, tensor in part.items():
            if tensor.dim() == 0 or tensor.shape[1:] != first[name].shape[1:] or tensor.dtype != first[name].dtype:
                raise DataError(
                    f"the batches' {kind} '{name}' differs: {_what(first[name])} and {_what(tensor)}.",
                    "All must have one dtype and, but for the first dimension, one shape: pad them.",
                )
    return {name: torch.cat([part[name] for part in parts]) for name in first}


def _as_tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    try:
        # Big-endian, read-only and negatively strided arrays cannot be shared with torch: copy.
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise DataError(f"'{name}' is {array.dtype}, which is no tensor's dtype.", "Save numbers.") from error


def _checked(inputs: Named, labels: Labels, spec: Spec) -> Dataset:
    expected = [tensor.name for tensor in spec.inputs]
    if set(inputs) != set(expected):
        raise DataError(f"the data holds the inputs {sorted(inputs)}, expected {sorted(expected)}.", f"Spec: {spec}.")
    _check_first_dimension(spec)
    rows = _rows(inputs, labels, spec)
    sizes: dict[str, int] = {}
    result = {t.name: _checked_input(inputs[t.name], t, spec, sizes) for t in spec.inputs}
    if isinstance(labels, dict):
        labels = {name: tensor.contiguous() for name, tensor in labels.items()}
    return Dataset(result, labels, rows)


def _check_first_dimension(spec: Spec) -> None:
    first = {tensor.shape[0] if tensor.shape else None for tensor in spec.inputs}
    if len(first) != 1 or None in first:
        raise DataError(
            f"labelled data needs inputs that share their first dimension, along which the rows lie ({spec}).",
            "Name it with one symbol in every --input, for example 'image: float32[B,3,224,224], B=1..8'.",
        )


def _rows(inputs: Named, labels: Labels, spec: Spec) -> int:
    """The number of rows, which inputs and labels must agree on."""
    named = dict(inputs)
    if isinstance(labels, dict):
        named |= {f"{_LABEL_PREFIX}{name}": tensor for name, tensor in labels.items()}
    elif labels is not None:
        named["label"] = labels
    counts = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in named.items()}
    if 0 in counts.values():
        empty = [name for name, count in counts.items() if not count]
        raise DataError(f"the data is empty: {', '.join(empty)} has no rows.", "Give one row or more.")
    if len(set(counts.values())) > 1:
        raise DataError(f"the numbers of rows differ: {counts}.", "Every array must have one row per example.")
    rows, step = next(iter(counts.values())), spec.inputs[0].shape[0]
    if isinstance(step, int) and rows % step:
        raise DataError(f"there are {rows} rows, but the model takes just {step} at a time.", f"Drop {rows % step}.")
    return rows


def _checked_input(tensor: Tensor, wanted: TensorSpec, spec: Spec, sizes: dict[str, int]) -> Tensor:
    """One input with the spec's dtype, its shape and values checked; ``sizes`` collects the symbols' sizes."""
    if tensor.dim() != len(wanted.shape):
        raise DataError(f"input '{wanted.name}' is {_what(tensor)}, expected {wanted}.", "Reshape it.")
    for axis, (size, dim) in enumerate(zip(tensor.shape[1:], wanted.shape[1:], strict=True), start=1):
        expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
        if size != expected:
            message = f"input '{wanted.name}' is {_what(tensor)}: dimension {axis} must be {expected} ({wanted})."
            raise DataError(message, "Resize, crop or pad it as for training.")
        if isinstance(dim, str) and size not in spec.symbols[dim]:
            cure = "Pad or cut the data, or widen the range in --input."
            raise DataError(f"input '{wanted.name}' has {dim}={size}, outside {dim}={spec.symbols[dim]}.", cure)
    result = _cast(tensor, wanted)
    if result.is_floating_point() and not bool(result.isfinite().all()):
        row = int((~result.isfinite()).flatten(1).any(1).nonzero()[0])
        raise DataError(
            f"input '{wanted.name}' holds NaN or infinity (first in row {row}).", "Drop or mend those rows."
        )
    if wanted.values is not None and not result.is_floating_point() and result.dtype != torch.bool:
        low, high = int(result.min()), int(result.max())
        if low < wanted.values.low or high > wanted.values.high:
            # An index outside of an embedding ends a process that uses a GPU.
            message = f"input '{wanted.name}' holds values {low}..{high}, outside {wanted.values}."
            raise DataError(message, "Use the model's own tokenizer, or widen 'in LOW..HIGH' in --input.")
    return result.contiguous()


def _cast(tensor: Tensor, wanted: TensorSpec) -> Tensor:
    """Change the dtype where no value is lost, and from float64 to float32, NumPy's default to torch's."""
    dtype = cast(torch.dtype, getattr(torch, wanted.dtype))
    if tensor.dtype == dtype:
        return tensor
    if tensor.is_floating_point() and dtype.is_floating_point:
        if torch.promote_types(tensor.dtype, dtype) == dtype or (tensor.dtype, dtype) == (torch.float64, torch.float32):
            return tensor.to(dtype)
    elif not (tensor.is_floating_point() or tensor.is_complex() or dtype.is_floating_point or dtype == torch.bool):
        limits = torch.iinfo(dtype)
        values = tensor.long()
        if limits.min <= int(values.min()) and int(values.max()) <= limits.max:
            return tensor.to(dtype)
    cure = f"Save it as {wanted.dtype}" + (
        ", scaled and normalised as for training." if dtype.is_floating_point else "."
    )
    raise DataError(f"input '{wanted.name}' is {_what(tensor)}, expected {wanted}.", cure)


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def save_data(data: Dataset, path: Path) -> None:
    """Write a dataset as the ``.safetensors`` file from which :func:`load_data` reads it again."""
    save_file({name: tensor.contiguous() for name, tensor in _named(data).items()}, path)


def digest_of(data: Dataset) -> str:
    """SHA-256 over all rows, labels included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_named(data).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(data: Dataset) -> Named:
    if isinstance(data.labels, dict):
        return {**data.inputs, **{f"{_LABEL_PREFIX}{name}": tensor for name, tensor in data.labels.items()}}
    return data.inputs if data.labels is None else {**data.inputs, "label": data.labels}
