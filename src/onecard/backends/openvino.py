"""OpenVINO on a CPU: the exported program, or an ONNX file as it is, as OpenVINO's intermediate form."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from onecard.backends.base import Target, Tensors
from onecard.backends.export import export_program, onnx_file, quiet_export
from onecard.errors import Unsupported, UsageError
from onecard.evidence import Verdict
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.spec import TensorSpec

PRECISION_OF_MODE = {"": "f32", "bf16": "bf16", "fp16": "f16"}
"""What each mode computes in. Forced, because OpenVINO takes bf16 by itself where the CPU has it."""
_FILE = "model.xml"
_TELEMETRY = "openvino_telemetry"


class OpenVinoBackend:
    """fp32 by default; the modes ``bf16`` and ``fp16`` take the same fp32 model and compute in less."""

    def available(self, target: Target) -> Verdict | None:
        _precision(target)
        if target.device != "cpu":
            return Verdict("unavailable", "OpenVINO does not run on NVIDIA GPUs", "Use device cpu.")
        if importlib.util.find_spec("openvino") is None:
            return Verdict("unavailable", "openvino is not installed", "pip install 'onecard[openvino]'")
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        source: Any = onnx_file(module) or export_program(module, inputs, target)
        with quiet_export(), _without_telemetry() as ov:
            try:
                model = ov.convert_model(source)
                named = enumerate(target.spec.inputs)
                model.reshape({_port(model, i, t): _partial_shape(ov, t, target) for i, t in named})
                ov.save_model(model, str(folder / _FILE), compress_to_fp16=False)
            except Exception as error:  # OpenVINO raises plain RuntimeErrors for all it cannot convert
                raise Unsupported(f"OpenVINO cannot convert this model: {first_line(error)}") from error

    def load(self, folder: Path, target: Target) -> OpenVinoRunner:
        with _without_telemetry() as ov:
            options = {
                "INFERENCE_PRECISION_HINT": _precision(target),
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            }
            compiled = ov.Core().compile_model(str(folder / _FILE), "CPU", options)
        return OpenVinoRunner(compiled, target)


class OpenVinoRunner:
    """A compiled model with one infer request; answers are copied out of OpenVINO's memory."""

    def __init__(self, compiled: Any, target: Target) -> None:
        self._request: Any = compiled.create_infer_request()
        self._inputs = [(_port(compiled, i, t), t.name) for i, t in enumerate(target.spec.inputs)]
        self._outputs = list(zip(compiled.outputs, (t.name for t in target.spec.outputs), strict=True))

    def __call__(self, inputs: Tensors) -> Tensors:
        arrays = {port: inputs[name].numpy() for port, name in self._inputs}
        answer = self._request.infer(arrays, share_inputs=True, share_outputs=False)
        return {name: torch.from_numpy(answer[port]) for port, name in self._outputs}

    def close(self) -> None:
        self._request = None
        self._inputs, self._outputs = [], []


def _precision(target: Target) -> str:
    mode = target.recipe.mode
    if mode not in PRECISION_OF_MODE:
        raise UsageError(f"unknown mode '{mode}' of openvino: expected nothing, bf16 or fp16.")
    return PRECISION_OF_MODE[mode]


def _port(model: Any, index: int, tensor: TensorSpec) -> Any:
    """The model's input of that name (an ONNX file keeps them), or else of that position."""
    return next((port for port in model.inputs if tensor.name in port.get_names()), model.inputs[index])


def _partial_shape(ov: Any, tensor: TensorSpec, target: Target) -> Any:
    """The static shape of the bucket, or each symbol as the range it may take."""
    if target.bucket is not None:
        return ov.PartialShape(list(tensor.concrete(target.bucket)))
    ranges = target.spec.symbols
    return ov.PartialShape(
        [
            ov.Dimension(dim) if isinstance(dim, int) else ov.Dimension(ranges[dim].low, ranges[dim].high)
            for dim in tensor.shape
        ]
    )


@contextmanager
def _without_telemetry() -> Iterator[Any]:
    """Import openvino without its telemetry, which reports the import over the network.

    Its parts look for ``openvino_telemetry`` when they are first imported, and work without. Where the
    user's own code imported openvino before, that code's choice stands.
    """
    if _TELEMETRY in sys.modules:
        yield importlib.import_module("openvino")
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's own mark for "cannot be imported"
    try:
        yield importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]
