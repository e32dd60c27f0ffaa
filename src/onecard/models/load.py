"""From a reference to a :class:`Model`: which kind it is, and the loader of that kind."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from onecard.errors import ModelError
from onecard.models.model import Model
from onecard.models.request import Request
from onecard.spec import Range

LOADERS: dict[str, str] = {
    "factory": "onecard.models.factory:load",
    "torchvision": "onecard.models.hub:load_torchvision",
    "timm": "onecard.models.hub:load_timm",
    "hf": "onecard.models.hf:load",
    "torchscript": "onecard.models.files:load_torchscript",
    "exported": "onecard.models.files:load_program",
    "onnx": "onecard.models.files:load_onnx",
    "live": "onecard.models.live:load_live",
}
"""Kind of origin to its loader, ``(reference, Request) -> Model``."""

_PREFIXES = ("torchvision", "timm", "hf")
_SUFFIXES = {".pt": "torchscript", ".ts": "torchscript", ".torchscript": "torchscript", ".pth": "torchscript"}
_SUFFIXES |= {".pt2": "exported", ".onnx": "onnx"}
_FORMS = (
    "Write path/file.py:callable, package.module:callable, torchvision:NAME, timm:NAME, hf:DIR_OR_ID, "
    "or the path of a .pt (TorchScript), .pt2 or .onnx file."
)


def load_model(  # noqa: PLR0913 - the keywords are the interface; inside they are one Request
    reference: str | nn.Module,
    *,
    inputs: Sequence[str] = (),
    weights: Path | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] = (),
    batch: Range | None = None,
) -> Model:
    """Load a model, find its spec, and run it once at two sizes.

    Args:
        reference: a live module, or text: ``package.module:callable``, ``path/file.py:callable``,
            ``torchvision:NAME[@WEIGHTS]``, ``timm:NAME[@pretrained]``, ``hf:DIR_OR_ID``, or a ``.pt`` (TorchScript),
            ``.pt2`` (exported program) or ``.onnx`` file.
        inputs: the inputs in the spec's text form; without them they are derived where that is possible.
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` state dict, loaded strictly.
        example_args: example positional arguments to derive the inputs from.
        example_kwargs: example keyword arguments.
        input_names: names for the tensors in the examples, in the order found.
        batch: the range of the derived batch symbol ``B``; 1..8 by default.

    Returns:
        The original in fp32 and evaluation mode on the CPU, with inputs, outputs and symbols.

    Raises:
        ModelError: it cannot be found, built or read.
        SpecError: its inputs are not known, or it cannot be called with them.
        MissingDependencyError: the package it comes from is not installed.
    """
    request = Request(
        tuple(inputs), weights, tuple(example_args), dict(example_kwargs or {}), tuple(input_names), batch
    )
    kind, body = ("live", reference) if isinstance(reference, nn.Module) else classify(reference)
    module, _, name = LOADERS[kind].partition(":")
    model: Model = getattr(importlib.import_module(module), name)(body, request)
    return model


def classify(reference: str) -> tuple[str, str]:
    """The kind of a reference in text form, and what stands behind it.

    Raises:
        ModelError: it has none of the known forms.
    """
    prefix, colon, body = reference.partition(":")
    if colon and prefix in _PREFIXES:
        if not body:
            raise ModelError(f"'{reference}' names no model.", f"Write {prefix}:NAME.")
        return prefix, body
    path = Path(reference)
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix], reference
    if (path / "config.json").is_file():
        return "hf", reference
    if colon and not reference.endswith(":"):
        return "factory", reference
    raise ModelError(f"'{reference}' is no reference to a model.", _FORMS)
