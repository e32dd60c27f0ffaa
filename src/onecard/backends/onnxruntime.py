"""ONNX Runtime: the exported program as an ONNX graph, run by its CPU, CUDA or TensorRT provider.

The TensorRT provider and the CUDA one are written to ONNX Runtime's documentation
(https://onnxruntime.ai/docs/execution-providers/); only the CPU provider is covered by the tests.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from onecard.backends.base import Target, Tensors
from onecard.backends.export import dynamic_symbols, export_program, onnx_file, quiet_export
from onecard.errors import Unsupported, UsageError
from onecard.evidence import Verdict
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.quiet import muted
from onecard.spec import Spec

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_FILE = "model.onnx"
_ENGINES = "engines"
_CONVERTERS = ("torch.onnx", "onnxscript", "onnx_ir")
"""The loggers that tell of operators skipped and constants not folded: neither changes an answer."""
_QUIET = 3
"""ONNX Runtime's severity "error": its warnings tell of graph details nobody can act on."""
_UNWANTED_OPTIMIZERS = ["WeightBiasQuantization"]
"""It quantises each float convolution between two quantised ones, and with one scale for the whole weight: just
those that were kept in floats because they lose most."""
_ONNX_BFLOAT16 = 16
"""``onnx.TensorProto.BFLOAT16``; NumPy has no such type, so the binding takes ONNX's own number."""


class OnnxRuntimeBackend:
    """One ONNX file for the whole range of the spec, or for one bucket; the mode is the provider."""

    native = frozenset({"int8", "int8_dynamic", "int8_weights", "int4_weights"})

    def available(self, target: Target) -> Verdict | None:
        mode = _mode(target)
        on_cpu = target.device == "cpu"
        if (mode == "cpu") != on_cpu:
            return Verdict("unavailable", f"provider {PROVIDERS[mode]} does not run on {target.device}")
        extra = "onnxruntime" if on_cpu else "onnxruntime-gpu"
        for package in ("onnxruntime", "onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                return Verdict("unavailable", f"{package} is not installed", f"pip install 'onecard[{extra}]'")
        if not on_cpu and PROVIDERS[mode] not in _runtime().get_available_providers():
            return Verdict(
                "unavailable",
                f"this onnxruntime was built without {PROVIDERS[mode]}",
                "pip uninstall onnxruntime && pip install 'onecard[onnxruntime-gpu]'",
            )
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        on_cpu = _mode(target) == "cpu"
        if target.native(self) and not on_cpu:
            raise Unsupported(f"{PROVIDERS[_mode(target)]} gains nothing from '{target.native(self)}'")
        if target.native(self) or (on_cpu and "qat" in target.recipe.transforms):
            self._build_quantized(module, inputs, folder, target)
        else:
            _write_float(module, inputs, folder, target)
        if _mode(target) == "tensorrt":
            (folder / _ENGINES).mkdir()
        # A precision that the provider has no kernels for shows only when a session is made; for
        # TensorRT the first run also builds the engines, into the artifact.
        try:
            runner = self.load(folder, target)
            if _mode(target) == "tensorrt":
                runner(inputs)
            runner.close()
        except Exception as error:
            raise Unsupported(f"ONNX Runtime cannot run this graph: {first_line(error)}") from error

    def _build_quantized(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        """Have the float graph quantised; the one of moving sizes serves every bucket of a variant."""
        from onecard.backends.onnx_quantize import quantize

        if target.work is None:
            raise UsageError(f"{target.recipe.id} needs a folder to work in.")
        moving = dataclasses.replace(target, bucket=None)
        source = target.work / "float"
        if not source.exists():
            source.mkdir(parents=True)
            try:
                _write_float(module, inputs, source, moving)
            except Unsupported as error:
                raise Unsupported(f"quantising needs one graph for all sizes: {error.detail}") from error
        quantize(source / _FILE, module, folder, target, lambda trial: self.load(trial, moving))

    def load(self, folder: Path, target: Target) -> OnnxRuntimeRunner:
        ort = _runtime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = _QUIET
        stream = None
        if target.device != "cpu":
            # A stream of the runner's own: the provider takes one for good, and cannot take the default stream.
            stream = torch.cuda.Stream(torch.device(target.device))  # type: ignore[no-untyped-call]
        providers = _providers(folder, target, stream)
        session = ort.InferenceSession(
            str(folder / _FILE), options, providers=providers, disabled_optimizers=_UNWANTED_OPTIMIZERS
        )
        session.disable_fallback()
        wanted = providers[0][0]
        if wanted not in session.get_providers():
            raise RuntimeError(f"ONNX Runtime could not start {wanted}; it offers {session.get_providers()}")
        return OnnxRuntimeRunner(session, target, stream)


class OnnxRuntimeRunner:
    """A session whose inputs and outputs are bound to torch's own memory, so nothing is copied."""

    def __init__(self, session: Any, target: Target, stream: torch.cuda.Stream | None) -> None:
        ort = _runtime()
        spec = target.spec
        self._session: Any = session
        self._binding: Any = session.io_binding()
        self._device = torch.device(target.device)
        self._stream = stream
        self._options = ort.RunOptions()
        if stream is not None:
            # The answer is ordered by streams, not by a wait of the host.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        names = [node.name for node in session.get_inputs()]
        self._inputs = [
            (name, _input_name(spec, index, name), _element(spec, index)) for index, name in enumerate(names)
        ]
        self._outputs = list(zip([node.name for node in session.get_outputs()], spec.outputs, strict=True))
        self._axes = _axes_of_symbols(spec)

    def __call__(self, inputs: Tensors) -> Tensors:
        if self._stream is None:
            return self._run(inputs)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        answer = self._run(inputs)
        # Waiting also keeps the caller's memory in use until the run is over, as torch frees it by stream.
        current.wait_stream(self._stream)
        return answer

    def _run(self, inputs: Tensors) -> Tensors:
        kind, index = self._device.type, self._device.index or 0
        sizes = {symbol: inputs[name].shape[axis] for symbol, (name, axis) in self._axes.items()}
        answer: Tensors = {}
        for node, name, element in self._inputs:
            tensor = inputs[name]
            self._binding.bind_input(node, kind, index, element, tuple(tensor.shape), tensor.data_ptr())
        for node, out in self._outputs:
            if all(isinstance(dim, int) or dim in sizes for dim in out.shape):
                tensor = torch.empty(out.concrete(sizes), dtype=getattr(torch, out.dtype), device=self._device)
                element = _numpy_or_onnx(out.dtype)
                self._binding.bind_output(node, kind, index, element, tuple(tensor.shape), tensor.data_ptr())
                answer[out.name] = tensor
            else:
                self._binding.bind_output(node, "cpu")
        self._session.run_with_iobinding(self._binding, self._options)
        if len(answer) < len(self._outputs):
            self._collect_unsized(answer)
        self._binding.clear_binding_outputs()
        return {out.name: answer[out.name] for _, out in self._outputs}

    def _collect_unsized(self, answer: Tensors) -> None:
        """Take the outputs whose size only the run tells; the runtime allocated them on the host."""
        if self._stream is not None:
            self._stream.synchronize()
        for (_, out), value in zip(self._outputs, self._binding.get_outputs(), strict=True):
            if out.name not in answer:
                # The clone ends the sharing of memory with the runtime's own value.
                answer[out.name] = torch.from_numpy(value.numpy()).clone().to(self._device)

    def close(self) -> None:
        self._binding = self._session = None


def _runtime() -> Any:
    return importlib.import_module("onnxruntime")


def _mode(target: Target) -> str:
    mode = target.recipe.mode or ("cpu" if target.device == "cpu" else "cuda")
    if mode not in PROVIDERS:
        raise UsageError(f"unknown mode '{mode}' of onnxruntime: expected one of {', '.join(PROVIDERS)}.")
    return mode


def _write_float(module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
    source = onnx_file(module)
    if source is not None:
        _copy(source, folder)
    else:
        _export(module, inputs, folder, target)


def _export(module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
    from onecard.backends.onnx_graph import EXTERNAL_DATA_BYTES, name_nodes

    program = export_program(module, inputs, target)
    tensors = (*module.parameters(), *module.buffers())
    weight_bytes = sum(t.numel() * t.element_size() for t in tensors)
    with quiet_export(), muted(*_CONVERTERS, warned=False):
        try:
            onnx_program = torch.onnx.export(
                program,
                input_names=[t.name for t in target.spec.inputs],
                output_names=[t.name for t in target.spec.outputs],
                dynamo=True,
                optimize=True,
                verbose=False,
            )
            if onnx_program is None:
                raise RuntimeError("torch.onnx.export returned nothing")
            name_nodes(onnx_program.model.graph, module)
            onnx_program.save(str(folder / _FILE), external_data=weight_bytes > EXTERNAL_DATA_BYTES)
        except Exception as error:  # the exporter wraps what it meets in errors of many kinds
            raise Unsupported(f"torch.onnx cannot convert this model: {first_line(error)}") from error


def _copy(source: Path, folder: Path) -> None:
    """Copy an ONNX file and the files beside it that hold its weights."""
    onnx = importlib.import_module("onnx")
    graph = onnx.load(str(source), load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    for location in {entry.value for entry in entries if entry.key == "location"}:
        if Path(location).name != location:
            raise Unsupported(f"the ONNX file keeps weights outside its own folder, in '{location}'")
        shutil.copyfile(source.parent / location, folder / location)
    shutil.copyfile(source, folder / _FILE)


def _providers(folder: Path, target: Target, stream: torch.cuda.Stream | None) -> list[tuple[str, dict[str, str]]]:
    """The provider asked for with its options, then those that take what it leaves over."""
    cpu: tuple[str, dict[str, str]] = (PROVIDERS["cpu"], {})
    if stream is None:
        return [cpu]
    common = {"device_id": str(stream.device.index), "user_compute_stream": str(stream.cuda_stream)}
    # use_tf32 is on by default there, which an fp32 recipe must not be given.
    cuda = (PROVIDERS["cuda"], {**common, "use_tf32": "1" if target.recipe.precision == "tf32" else "0"})
    if _mode(target) == "cuda":
        return [cuda, cpu]
    return [(PROVIDERS["tensorrt"], {**common, **_tensorrt_options(folder, target)}), cuda, cpu]


def _tensorrt_options(folder: Path, target: Target) -> dict[str, str]:
    precision, spec = target.recipe.precision, target.spec
    options = {
        "trt_fp16_enable": "1" if precision.endswith("fp16") else "0",
        "trt_bf16_enable": "1" if precision.endswith("bf16") else "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder / _ENGINES),
    }
    if target.bucket is None and dynamic_symbols(spec):
        for key, bucket in (("min", spec.smallest()), ("opt", spec.largest()), ("max", spec.largest())):
            shapes = (f"{t.name}:{'x'.join(map(str, t.concrete(bucket)))}" for t in spec.inputs)
            options[f"trt_profile_{key}_shapes"] = ",".join(shapes)
    return options


def _input_name(spec: Spec, index: int, node: str) -> str:
    """The spec's name of a graph input: the same where the graph kept it, else that of its position."""
    return node if any(t.name == node for t in spec.inputs) else spec.inputs[index].name


def _element(spec: Spec, index: int) -> Any:
    return _numpy_or_onnx(spec.inputs[index].dtype)


def _numpy_or_onnx(dtype: str) -> Any:
    import numpy as np

    return _ONNX_BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _axes_of_symbols(spec: Spec) -> dict[str, tuple[str, int]]:
    """Where to read the size of each symbol: an input's name and axis."""
    places: dict[str, tuple[str, int]] = {}
    for tensor in spec.inputs:
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str):
                places.setdefault(dim, (tensor.name, axis))
    return places
