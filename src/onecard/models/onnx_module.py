"""An ONNX file as a module: the original of an ``.onnx`` model is ONNX Runtime on the CPU, in the file's precision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import MissingDependencyError, ModelError
from onecard.models.request import Request
from onecard.models.wording import first_line
from onecard.spec import Dim, Range, Spec, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_DEFAULT_BATCH = 8
_DEFAULT_OTHER = 128


class OnnxModule(nn.Module):
    """Runs an ONNX file; it has no parameters that torch could see, and cannot be traced.

    Args:
        path: the file; ``path`` stays readable on the module.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.session = _session(path)
        self.input_names = tuple(value.name for value in self.session.get_inputs())
        self.output_names = tuple(value.name for value in self.session.get_outputs())

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Run once: tensors in the file's order to the file's outputs by name."""
        feeds = {name: t.detach().cpu().numpy() for name, t in zip(self.input_names, tensors, strict=True)}
        answers = self.session.run(self.output_names, feeds)
        return {name: torch.from_numpy(a) for name, a in zip(spec_names(self.output_names), answers, strict=True)}

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        # A session cannot be copied; the file can be opened again.
        return OnnxModule(self.path)

    def __reduce__(self) -> tuple[type[OnnxModule], tuple[Path]]:
        return OnnxModule, (self.path,)


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "an .onnx model needs ONNX Runtime.", "Install it: pip install 'onecard[onnxruntime]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes have no common base but Exception
        raise ModelError(
            f"ONNX Runtime cannot open {path}: {first_line(error)}.", "Check it with onnx.checker.check_model."
        ) from error


def spec_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that the spec's text form can hold: every other character becomes an underscore."""
    clean = [re.sub(r"[^\w.\-]", "_", name) for name in names]
    clean = [name if re.match(r"[A-Za-z_]", name) else f"_{name}" for name in clean]
    return tuple(name if clean.index(name) == i else f"{name}_{i}" for i, name in enumerate(clean))


def spec_of_onnx(module: OnnxModule, request: Request) -> Spec:
    """The inputs of an ONNX file; its dim_params are the symbols.

    A symbol that is first in an input is taken for the batch, 1..8; any other gets 1..128.

    Raises:
        ModelError: an input is of a type that onecard cannot carry.
    """
    symbols: dict[str, Range] = {}
    tensors = []
    values = module.session.get_inputs()
    for name, value in zip(spec_names(module.input_names), values, strict=True):
        if value.type not in _DTYPES:
            raise ModelError(f"the input '{name}' is a {value.type}, expected one of {', '.join(_DTYPES)}.")
        dims: list[Dim] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) and size > 0:
                dims.append(size)
                continue
            symbol = _symbol(size, axis, name)
            default = Range(1, _DEFAULT_BATCH if axis == 0 else _DEFAULT_OTHER)
            symbols.setdefault(symbol, (request.batch or default) if axis == 0 else default)
            dims.append(symbol)
        tensors.append(TensorSpec(name, _DTYPES[value.type], tuple(dims)))
    return Spec(tuple(tensors), (), symbols)


def _symbol(size: object, axis: int, name: str) -> str:
    clean = re.sub(r"\W", "_", str(size)) if isinstance(size, str) and size else ""
    if re.match(r"[A-Za-z_]", clean):
        return clean
    return "B" if axis == 0 else f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}_{axis}"
