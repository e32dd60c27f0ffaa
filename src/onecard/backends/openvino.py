"""OpenVINO on a CPU: the exported program, or an ONNX file as it is, as OpenVINO's intermediate form.

What NNCF quantises (``onecard.backends.nncf_quantize``) is quantised while an artifact is built.
"""

from __future__ import annotations

import dataclasses
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
from onecard.backends.nncf_quantize import SCHEMES, Feed, Subject, quantize
from onecard.backends.quantized_program import float_weights
from onecard.backends.signal_stack import kept_signal_stack
from onecard.calibration.bench import Run
from onecard.errors import Unsupported, UsageError
from onecard.evidence import Verdict
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.spec import Bucket, TensorSpec

PRECISION_OF_MODE = {"": "f32", "bf16": "bf16", "fp16": "f16"}
"""What each mode computes in. Forced, because OpenVINO takes bf16 by itself where the CPU has it."""
ACTIVATION_GROUP = {"int8_weights": "0", "int8_dynamic": "32", "int4_weights": "32"}
"""Input channels that share a scale where OpenVINO rounds the activations of a linear layer to 8 bits as they come.

That is its default, for speed, wherever the weights are compressed and the CPU adds 8-bit products exactly. Of 8-bit
weights it is the larger error by far, so ``int8_weights`` goes without (0); of 4-bit ones it does not show.
"""
_FILE = "model.xml"
_TELEMETRY = "openvino_telemetry"


class OpenVinoBackend:
    """fp32 by default; the modes ``bf16`` and ``fp16`` take the same model and compute in less.

    In a quantised model the mode is the precision of what is not quantised.
    """

    native = SCHEMES

    def available(self, target: Target) -> Verdict | None:
        _precision(target)
        if target.device != "cpu":
            return Verdict("unavailable", "OpenVINO does not run on NVIDIA GPUs", "Use device cpu.")
        for package in ("openvino", "nncf") if target.native(self) else ("openvino",):
            if importlib.util.find_spec(package) is None:
                return Verdict("unavailable", f"{package} is not installed", "pip install 'onecard[openvino]'")
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        with quiet_export(), _without_telemetry() as ov:
            if target.native(self):
                model = _quantized(ov, target.native(self), module, inputs, target)
            else:
                model = _convert(ov, module, inputs, target)
            ov.save_model(model, str(folder / _FILE), compress_to_fp16=False)

    def load(self, folder: Path, target: Target) -> OpenVinoRunner:
        with _without_telemetry() as ov:
            return OpenVinoRunner(_compile(ov, str(folder / _FILE), target), target)


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


def _convert(ov: Any, module: FlatModule, inputs: Tensors, target: Target) -> Any:
    source: Any = onnx_file(module) or float_weights(export_program(module, inputs, target), inputs, target)
    try:
        model = ov.convert_model(source)
        _reshape(ov, model, target)
    except Exception as error:  # OpenVINO raises plain RuntimeErrors for all it cannot convert
        raise Unsupported(f"OpenVINO cannot convert this model: {first_line(error)}") from error
    return model


def _quantized(ov: Any, scheme: str, module: FlatModule, inputs: Tensors, target: Target) -> Any:
    """The model quantised. All buckets are fitted from one model, which takes the calibration rows in any size.

    Only where no such model can be made is each bucket quantised for itself.
    """
    bench = target.bench
    if bench is None:
        raise UsageError(f"'{scheme}' is applied when an artifact is built, and cannot be applied again.")
    key = ("openvino", scheme)
    if key not in bench.memo:
        model, bucket = _calibratable(ov, module, inputs, target)

        def run(quantized: Any) -> Run:
            return _in_batches(OpenVinoRunner(_compile(ov, quantized, target), target), target, bucket)

        quantized = quantize(scheme, Subject(model, module, _feed(model, target, bucket), run), bench)
        if bucket is not None:
            return quantized
        bench.memo[key] = quantized
    fitted = bench.memo[key].clone()
    _reshape(ov, fitted, target)
    return fitted


def _calibratable(ov: Any, module: FlatModule, inputs: Tensors, target: Target) -> tuple[Any, Bucket | None]:
    """A model for the whole range of the spec; or else for the target's bucket, and that bucket."""
    try:
        return _convert(ov, module, inputs, dataclasses.replace(target, bucket=None)), None
    except Unsupported:
        if target.bucket is None:
            raise
        return _convert(ov, module, inputs, target), target.bucket


def _feed(model: Any, target: Target, bucket: Bucket | None) -> Feed:
    ports = {t.name: _port(model, i, t).get_any_name() for i, t in enumerate(target.spec.inputs)}

    def feed(rows: Tensors) -> dict[str, Any]:
        return {ports[name]: tensor.numpy() for name, tensor in _filled(rows, target, bucket).items()}

    return feed


def _in_batches(runner: OpenVinoRunner, target: Target, bucket: Bucket | None) -> Run:
    """Run any number of rows, also where the model takes just as many as its bucket."""
    batch = target.spec.batch_symbol
    if bucket is None or batch is None:
        return runner
    step = bucket[batch]

    def run(inputs: Tensors) -> Tensors:
        count = len(next(iter(inputs.values())))
        parts = []
        for low in range(0, count, step):
            part = {name: tensor[low : low + step] for name, tensor in inputs.items()}
            parts.append(runner(_filled(part, target, bucket)))
        return {name: torch.cat([p[name] for p in parts])[:count] for name in parts[0]}

    return run


def _filled(rows: Tensors, target: Target, bucket: Bucket | None) -> Tensors:
    """Rows, the last of them repeated up to the bucket's batch."""
    batch = target.spec.batch_symbol
    if bucket is None or batch is None:
        return rows
    index = torch.arange(bucket[batch]).clamp(max=len(next(iter(rows.values()))) - 1)
    return {name: tensor.index_select(0, index) for name, tensor in rows.items()}


def _compile(ov: Any, model: Any, target: Target) -> Any:
    """Compile a model, or the file of one."""
    options = {
        "INFERENCE_PRECISION_HINT": _precision(target),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    scheme = target.native(OpenVinoBackend())
    if scheme in ACTIVATION_GROUP:
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = ACTIVATION_GROUP[scheme]
    with kept_signal_stack():
        return ov.Core().compile_model(model, "CPU", options)


def _precision(target: Target) -> str:
    mode = target.recipe.mode
    if mode not in PRECISION_OF_MODE:
        raise UsageError(f"unknown mode '{mode}' of openvino: expected nothing, bf16 or fp16.")
    return PRECISION_OF_MODE[mode]


def _port(model: Any, index: int, tensor: TensorSpec) -> Any:
    """The model's input of that name (an ONNX file keeps them), or else of that position."""
    return next((port for port in model.inputs if tensor.name in port.get_names()), model.inputs[index])


def _reshape(ov: Any, model: Any, target: Target) -> None:
    named = enumerate(target.spec.inputs)
    model.reshape({_port(model, i, t): _partial_shape(ov, t, target) for i, t in named})


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
