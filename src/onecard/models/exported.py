"""Exported programs as files: saving without pickles, loading only after vetting, and exporting a flat module."""

from __future__ import annotations

import importlib
import logging
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from onecard.errors import BundleError, ModelError, OnecardError, Unsupported
from onecard.models.flat import FlatModule
from onecard.models.layers import restore_layers
from onecard.models.probe import probe_sizes, sample_inputs, spec_at
from onecard.models.program import input_values, symbolic_shape
from onecard.models.vet import DEFAULT_CAP_BYTES, MODEL, clean_copy, rejector
from onecard.models.wording import first_line
from onecard.quiet import muted
from onecard.spec import Bucket, Spec


def save_exported(program: ExportedProgram, path: Path) -> None:
    """Save a program so that nothing in the file is a pickle.

    Sample inputs, guards and the author's stack traces are left out.

    Args:
        program: what ``torch.export.export`` made.
        path: the ``.pt2`` file to write.

    Raises:
        Unsupported: a weight or constant is no plain tensor, so that torch would pickle it.
    """
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "model.pt2"
        try:
            with muted("torch.export", level=logging.CRITICAL):
                torch.export.save(program, raw)
            clean_copy(raw, path, rejector(path, ModelError), DEFAULT_CAP_BYTES, drop_samples=True)
        except Exception as error:
            path.unlink(missing_ok=True)
            raise Unsupported(f"the exported program cannot be saved without a pickle: {first_line(error)}") from error


def vet_exported(path: Path, *, error: type[OnecardError] = BundleError, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
    """Check that a ``.pt2`` file holds nothing that could run code when it is loaded.

    Args:
        path: the file.
        error: the class of the refusal, ``BundleError`` or ``ModelError``.
        cap_bytes: most bytes that it may unpack to.

    Raises:
        OnecardError: of class ``error``, with the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        clean_copy(path, Path(folder) / "model.pt2", rejector(path, error), cap_bytes, drop_samples=False)


def load_exported(
    path: Path,
    *,
    error: type[OnecardError] = BundleError,
    cap_bytes: int = DEFAULT_CAP_BYTES,
    drop_samples: bool = False,
) -> ExportedProgram:
    """Load a ``.pt2`` file after vetting it; what is loaded is the vetted copy, not the file itself.

    Args:
        path: the file.
        error: the class of a refusal, ``BundleError`` or ``ModelError``.
        cap_bytes: most bytes that it may unpack to.
        drop_samples: accept a file with (pickled) sample inputs, and leave them out. For a user's own file.

    Raises:
        OnecardError: of class ``error``, if the file is refused or cannot be loaded by this torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.pt2"
        clean_copy(path, copy, rejector(path, error), cap_bytes, drop_samples=drop_samples)
        try:
            with muted("torch.export", level=logging.CRITICAL):
                _register_operators(copy)
                return torch.export.load(copy)
        except Exception as reason:
            raise error(
                f"the exported program {path.name} cannot be loaded by torch {torch.__version__}: "
                f"{first_line(reason)}.",
                "Export it again with this version of torch.",
            ) from reason


def _register_operators(path: Path) -> None:
    """Define the operators of quantised programs, which torch does only when its quantisation is imported."""
    with zipfile.ZipFile(path) as archive:
        model = next(name for name in archive.namelist() if name.endswith(MODEL))
        if b"quantized_decomposed" in archive.read(model):
            importlib.import_module("torch.ao.quantization.fx._decomposed")


def flat_program(program: ExportedProgram) -> nn.Module:
    """A program as a plain module with layers: its user inputs by position, its user outputs as a list.

    The module that ``ExportedProgram.module`` gives refuses ``eval()`` and packs arguments into the
    containers of its first call; neither is wanted behind :class:`onecard.models.flat.FlatModule`.
    """
    with muted("torch.export", level=logging.CRITICAL):
        module = program.module(check_guards=False)
        graph = module.graph
        graph.set_codegen(fx.graph.CodeGen())
        plain = fx.GraphModule(module, graph)
    plain.eval()
    return restore_layers(plain)


def export_flat(flat: FlatModule, spec: Spec) -> tuple[ExportedProgram, Spec, list[str]]:
    """Export a flat module, dynamic over the spec's symbols as far as it can be.

    Args:
        flat: in evaluation mode on the CPU.
        spec: its inputs and symbols.

    Returns:
        The program, the spec it serves (with fixed sizes if it could not be dynamic), and notes.

    Raises:
        Unsupported: ``torch.export`` cannot trace the model even at one size.
    """
    moving = [name for name, rng in spec.symbols.items() if rng.low < rng.high]
    sizes = _trace_sizes(spec)
    example = tuple(sample_inputs(spec, sizes))
    reason = ""
    if moving:
        for infer in (False, True):
            try:
                program = _export(flat, example, _dynamic_shapes(spec, moving, infer))
                if _is_dynamic(program, spec):
                    return program, spec, []
                reason = "it fixes a dimension that the spec lets vary"
            except Exception as error:  # the model's own code runs here: anything may be raised
                reason = first_line(error)
    try:
        program = _export(flat, example, None)
    except Exception as error:
        raise Unsupported(f"torch.export cannot trace this model: {first_line(error)}") from error
    if not moving:
        return program, spec, []
    fixed = spec_at(spec, sizes)
    return program, fixed, [f"exported at {fixed} only, not for every size: {reason}"]


def _export(flat: FlatModule, example: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    with muted("torch.export", level=logging.CRITICAL), torch.inference_mode(False), torch.no_grad():
        return torch.export.export(flat, example, dynamic_shapes=shapes, strict=False)


def _trace_sizes(spec: Spec) -> Bucket:
    """Sizes of at least 2, since export takes 1 for a constant, and different for every symbol."""
    first, second = probe_sizes(spec)
    low = 2
    return {name: size if size >= low else max(size, second[name]) for name, size in first.items()}


def _dynamic_shapes(spec: Spec, moving: list[str], infer: bool) -> Any:
    dims: dict[str, Any] = {}
    for name in moving:
        rng = spec.symbols[name]
        dims[name] = Dim.AUTO(min=rng.low, max=rng.high) if infer else Dim(name, min=rng.low, max=rng.high)
    shapes = tuple({axis: dims[dim] for axis, dim in enumerate(t.shape) if dim in dims} for t in spec.inputs)
    return (shapes,)  # one var-positional argument holds them all


def _is_dynamic(program: ExportedProgram, spec: Spec) -> bool:
    """True where the program keeps every symbol of the spec over its whole range."""
    for tensor, (_, value) in zip(spec.inputs, input_values(program), strict=True):
        for dim, size in zip(tensor.shape, symbolic_shape(value), strict=True):
            if isinstance(dim, int) or spec.symbols[dim].low == spec.symbols[dim].high:
                continue
            if not isinstance(size, torch.SymInt):
                return False
            limits = program.range_constraints.get(size.node.expr)
            if limits is None or limits.lower > spec.symbols[dim].low or limits.upper < spec.symbols[dim].high:
                return False
    return True
