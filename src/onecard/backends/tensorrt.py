"""TensorRT: the exported program as one serialized engine, run by TensorRT's own Python runtime.

Written to the documentation of Torch-TensorRT 2.11 (``convert_exported_program_to_serialized_trt_engine``)
and of TensorRT 10 (``IExecutionContext``). Untested on hardware: TensorRT was nowhere to be had.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from onecard.backends.base import Target, Tensors
from onecard.backends.export import dynamic_symbols, export_program, quiet_export
from onecard.errors import Unsupported
from onecard.evidence import Verdict
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.spec import TensorSpec

_FILE = "engine.plan"
_OUTPUT = re.compile(r"^output_?(\d+)$")
_CURE = "pip install 'onecard[tensorrt]'"


class TensorRtBackend:
    """A strongly typed engine: every layer computes in the dtype that the module gives it."""

    def available(self, target: Target) -> Verdict | None:
        if not target.device.startswith("cuda"):
            return Verdict("unavailable", "TensorRT needs an NVIDIA GPU", "Use a cuda device.")
        for package in ("torch_tensorrt", "tensorrt"):
            if importlib.util.find_spec(package) is None:
                return Verdict("unavailable", f"{package} is not installed", _CURE)
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        compiler = importlib.import_module("torch_tensorrt")
        program = export_program(module, inputs, target)
        with quiet_export():
            try:
                plan = compiler.dynamo.convert_exported_program_to_serialized_trt_engine(
                    program,
                    arg_inputs=[_input(compiler, t, target) for t in target.spec.inputs],
                    device=torch.device(target.device),
                    disable_tf32=target.recipe.precision != "tf32",
                    require_full_compilation=True,
                )
            except Exception as error:  # an operator without a converter, a shape without a kernel, memory
                raise Unsupported(
                    f"TensorRT cannot build an engine for this model: {first_line(error)}",
                    "Try onnxruntime.tensorrt, which leaves to CUDA what TensorRT cannot do.",
                ) from error
        (folder / _FILE).write_bytes(plan)

    def load(self, folder: Path, target: Target) -> TensorRtRunner:
        trt = importlib.import_module("tensorrt")
        logger = trt.Logger(trt.Logger.ERROR)
        with torch.cuda.device(target.device):
            engine = trt.Runtime(logger).deserialize_cuda_engine((folder / _FILE).read_bytes())
        if engine is None:
            raise RuntimeError("this engine was built by another TensorRT or for another card; build it again here")
        return TensorRtRunner(trt, engine, target)


class TensorRtRunner:
    """An engine with one execution context, reading and writing torch's own memory."""

    def __init__(self, trt: Any, engine: Any, target: Target) -> None:
        self._engine: Any = engine
        self._device = torch.device(target.device)
        with torch.cuda.device(self._device):
            self._context: Any = engine.create_execution_context()
            # TensorRT adds waits of its own on the default stream; a stream of the runner's avoids them.
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        made = sorted((name for name in names if name not in given), key=_output_order)
        self._inputs = list(zip(given, target.spec.inputs, strict=True))
        self._outputs = list(zip(made, target.spec.outputs, strict=True))

    def __call__(self, inputs: Tensors) -> Tensors:
        current = torch.cuda.current_stream(self._device)
        for name, spec in self._inputs:
            tensor = inputs[spec.name]
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        answer: Tensors = {}
        for name, spec in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise RuntimeError(f"the size of output '{spec.name}' depends on the data, which TensorRT cannot tell")
            answer[spec.name] = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device)
            self._context.set_tensor_address(name, answer[spec.name].data_ptr())
        self._stream.wait_stream(current)
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT refused to run the engine on these inputs")
        current.wait_stream(self._stream)
        return answer

    def close(self) -> None:
        self._stream.synchronize()
        self._context = self._engine = None


def _input(compiler: Any, tensor: TensorSpec, target: Target) -> Any:
    """The shapes an engine must take: the bucket's, or the range of the spec, tuned for its largest."""
    dtype = getattr(torch, tensor.dtype)
    spec = target.spec
    if target.bucket is not None or not any(dim in dynamic_symbols(spec) for dim in tensor.shape):
        return compiler.Input(shape=tensor.concrete(target.bucket or spec.largest()), dtype=dtype)
    low, high = tensor.concrete(spec.smallest()), tensor.concrete(spec.largest())
    return compiler.Input(min_shape=low, opt_shape=high, max_shape=high, dtype=dtype)


def _output_order(name: str) -> int:
    """Torch-TensorRT names the outputs ``output0``, ``output1`` ... in the program's order."""
    match = _OUTPUT.match(name)
    if match is None:
        raise RuntimeError(f"unexpected output '{name}' in the TensorRT engine")
    return int(match[1])
