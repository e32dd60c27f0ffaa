"""Models out of one file: TorchScript ``.pt``, exported program ``.pt2``, ``.onnx``."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from onecard.errors import ModelError
from onecard.models.assemble import Derived, assemble
from onecard.models.exported import flat_program, load_exported
from onecard.models.flat import positional
from onecard.models.model import Model, Origin
from onecard.models.onnx_module import OnnxModule, spec_names, spec_of_onnx
from onecard.models.program import plan_of_program, spec_of_program
from onecard.models.request import Request
from onecard.models.wording import first_line


def load_torchscript(reference: str, request: Request) -> Model:
    """A TorchScript file; it says nothing of shapes, so ``--input`` is needed.

    Raises:
        ModelError: the file does not exist or is no TorchScript.
    """
    path = existing(reference)
    if request.weights is not None:
        raise ModelError("a TorchScript file carries its weights.", "Leave out --weights.")
    module = open_torchscript(path)
    origin = Origin("torchscript", path.name)
    return assemble(path.stem, module, origin, request, files={"model.ts": path})


def open_torchscript(path: Path) -> nn.Module:
    """Load TorchScript onto the CPU.

    Raises:
        ModelError: the file is no TorchScript.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the format, not this model
            module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return module
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{path} is not a TorchScript file: {first_line(error)}.",
            "If it is a checkpoint, pass it as --weights and the model as file.py:function; a pickled module is never "
            "loaded.",
        ) from error


def load_program(reference: str, request: Request) -> Model:
    """An exported program, vetted first; the spec is the one in its graph signature.

    Raises:
        ModelError: the file does not exist, is refused or cannot be loaded.
    """
    path = existing(reference)
    if request.weights is not None:
        raise ModelError("an exported program carries its weights.", "Leave out --weights.")
    program = load_exported(path, error=ModelError, drop_samples=True)

    def derive() -> Derived:
        return plan_of_program(program), spec_of_program(program, request)

    return assemble(path.stem, flat_program(program), Origin("exported", path.name), request, derive=derive)


def load_onnx(reference: str, request: Request) -> Model:
    """An ONNX file, run by ONNX Runtime on the CPU; dim_params are the symbols.

    Raises:
        ModelError: the file does not exist or cannot be opened.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    path = existing(reference)
    if request.weights is not None:
        raise ModelError("an ONNX file carries its weights.", "Leave out --weights.")
    module = OnnxModule(path)

    def derive() -> Derived:
        return positional(spec_names(module.input_names)), spec_of_onnx(module, request)

    origin = Origin("onnx", path.name)
    return assemble(path.stem, module, origin, request, derive=derive, files={"model.onnx": path})


def existing(reference: str) -> Path:
    """The file that a reference names.

    Raises:
        ModelError: it does not exist.
    """
    path = Path(reference)
    if not path.is_file():
        raise ModelError(f"the model file {reference} does not exist.", "Check the path.")
    return path
