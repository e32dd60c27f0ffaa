"""The flat module as a ``torch.export`` program: the common first step of the compiling backends.

Symbols of the spec become dynamic dimensions with their ranges, so that one program serves every size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from onecard.backends.base import Target, Tensors
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.spec import Bucket, Spec, bucket_label

__all__ = [
    "dynamic_shapes",
    "dynamic_symbols",
    "example_args",
    "export_program",
    "first_line",
    "is_bare",
    "onnx_file",
    "quiet_export",
]

_DYNAMIC_HINT_MIN = 2
_STATIC_CURE = "Try a static recipe (one artifact for each bucket)."


def export_program(module: FlatModule, inputs: Tensors, target: Target) -> ExportedProgram:
    """Export a module, dynamic over the spec's symbols where the target has no bucket.

    Args:
        module: in evaluation mode; takes the spec's inputs by position.
        inputs: example inputs by name, on the module's device.
        target: tells static (``bucket``) from dynamic.

    Returns:
        A program whose user inputs are the spec's, in order.

    Raises:
        Unsupported: the model cannot be traced, or it fixes a dimension that the spec lets vary.
    """
    with quiet_export():
        if target.bucket is not None or not dynamic_symbols(target.spec):
            return _export(module, example_args(inputs, target), None)
        example = example_args(inputs, target)
        try:
            return _export(module, example, (dynamic_shapes(target.spec),))
        except Unsupported as named:
            # A model may relate its own dimensions (S a multiple of 8): then let export infer them, and
            # keep the result only if every size of the spec is still served.
            try:
                program = _export(module, example, (dynamic_shapes(target.spec, infer=True),))
            except Unsupported:
                raise named from named.__cause__
            _require_dynamic(program, example, target.spec, named)
            return program


def dynamic_symbols(spec: Spec) -> tuple[str, ...]:
    """The symbols whose range holds more than one size; the others are constants to a compiler."""
    return tuple(name for name, rng in spec.symbols.items() if rng.low < rng.high)


def dynamic_shapes(spec: Spec, infer: bool = False) -> tuple[dict[int, Any], ...]:
    """Which dimensions of each input vary, as ``torch.export`` wants it for one var-positional argument.

    Args:
        spec: inputs and symbols.
        infer: give each dimension only its range (``Dim.AUTO``), and let export find how they relate.
    """
    moving = dynamic_symbols(spec)
    dims: dict[str, Any] = {}
    for name in moving:
        rng = spec.symbols[name]
        dims[name] = Dim.AUTO(min=rng.low, max=rng.high) if infer else Dim(name, min=rng.low, max=rng.high)
    return tuple({axis: dims[dim] for axis, dim in enumerate(tensor.shape) if dim in dims} for tensor in spec.inputs)


def example_args(inputs: Tensors, target: Target) -> tuple[Tensor, ...]:
    """The example inputs by position; for a dynamic target none of its symbols has size 1.

    Export takes a dimension of size 1 for a constant, so such examples are tiled to a size of their own.
    """
    spec = target.spec
    given = {name: inputs[name].detach() for name in (t.name for t in spec.inputs)}
    if target.bucket is None:
        sizes = _example_sizes(spec, spec.bind({name: tuple(t.shape) for name, t in given.items()}))
        given = {t.name: _tiled(given[t.name], t.concrete(sizes)) for t in spec.inputs}
    with torch.inference_mode(False):
        # An inference tensor cannot be traced; its clone outside of inference mode is a normal one.
        return tuple(t.clone() if t.is_inference() else t for t in given.values())


def is_bare(module: FlatModule) -> bool:
    """True where the flat module only passes tensors on: no precision, layout or output casts of its own."""
    flags = (module.compute_dtype, module.autocast_dtype, module.output_dtypes)
    return all(flag is None for flag in flags) and not module.channels_last


def onnx_file(module: FlatModule) -> Path | None:
    """The ``.onnx`` file that the model came from, if it is still just that file."""
    path = getattr(module.inner, "path", None)
    is_file = isinstance(path, str | Path) and Path(path).suffix == ".onnx"
    return Path(str(path)) if is_file and is_bare(module) and module.plan.is_plain else None


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence what torch itself deprecates inside its exporters, and keep autograd out of the graph."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _export(module: FlatModule, example: tuple[Tensor, ...], shapes: tuple[Any, ...] | None) -> ExportedProgram:
    try:
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # any error of the model's own code may surface here
        cure = "" if shapes is None else _STATIC_CURE
        raise Unsupported(f"torch.export cannot trace this model: {_reason(error)}", cure) from error


def _reason(error: Exception) -> str:
    """The line of export's error that tells the reason: the first bullet, where the first line only leads to it."""
    bullets = (line.strip() for line in str(error).splitlines())
    return next((line[2:] for line in bullets if line.startswith("- ")), first_line(error))


def _example_sizes(spec: Spec, given: Bucket) -> Bucket:
    """Sizes to trace at: those given, but at least 2 and each symbol's own, so that none is confused."""
    sizes = dict(given)
    taken: set[int] = set()
    for name in dynamic_symbols(spec):
        rng = spec.symbols[name]
        free = (n for n in range(max(given[name], rng.low, _DYNAMIC_HINT_MIN), rng.high + 1) if n not in taken)
        sizes[name] = next(free, rng.high)
        taken.add(sizes[name])
    return sizes


def _tiled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape made of repetitions of another, so that its values stay valid."""
    for axis, size in enumerate(shape):
        if tensor.shape[axis] != size:
            index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor


def _require_dynamic(program: ExportedProgram, example: tuple[Tensor, ...], spec: Spec, named: Unsupported) -> None:
    """Refuse a program that serves only some sizes, by running it at the smallest and at an odd one.

    What export inferred need not show in the ranges: a view may ask for a multiple of 8.
    """
    given = spec.bind({t.name: tuple(value.shape) for t, value in zip(spec.inputs, example, strict=True)})
    odd = {name: min(size | 1, spec.symbols[name].high) for name, size in given.items()}
    for sizes in (spec.smallest(), odd):
        inputs = [_tiled(value, t.concrete(sizes)) for t, value in zip(spec.inputs, example, strict=True)]
        try:
            # Unguarded: many guards only say "not 1", where size 1 in fact works.
            program.module(check_guards=False)(*inputs)
        except Exception as error:
            detail = f"the traced model cannot take {bucket_label(sizes)}: {first_line(error)}"
            raise Unsupported(detail, _STATIC_CURE) from named
