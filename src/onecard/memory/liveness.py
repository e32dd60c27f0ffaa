"""The peak of live bytes of a forward pass at one size, found without running it: shapes alone are replayed.

There are two roads. *As written*: the module's own code on fake tensors, so that a tensor lives as long as Python
holds it, as it does in eager mode. *Captured*: the graph of ``torch.export`` on fake tensors, where a tensor lives
from the operator that makes it to the last that reads it, as in a compiled variant. No weight is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from onecard.errors import Unsupported
from onecard.memory.allocator import reserved_for
from onecard.memory.figures import Prediction
from onecard.memory.trace import Trace, storage_bytes, storage_key, tensor_bytes
from onecard.models.exported import export_flat, flat_program
from onecard.models.flat import FlatModule
from onecard.models.onnx_module import OnnxModule
from onecard.models.probe import spec_at
from onecard.models.wording import first_line
from onecard.quiet import muted
from onecard.spec import Bucket, Spec

DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The precisions that can be predicted, and what floating tensors become; None leaves them."""


def predict_as_written(flat: FlatModule, spec: Spec, bucket: Bucket, precision: str = "fp32") -> Prediction:
    """Follow the module's own code.

    Args:
        flat: in evaluation mode; it is not changed, but must not run elsewhere meanwhile.
        spec: inputs, outputs and symbols.
        bucket: the size of every symbol.
        precision: a key of :data:`DTYPES`; weights and floating inputs are taken to be so.

    Raises:
        Unsupported: the code asks what is in a tensor, or runs something that has no shapes of its own.
    """
    dtype = DTYPES[precision]
    if isinstance(flat.inner, OnnxModule):
        raise Unsupported("ONNX Runtime runs this file and plans its memory itself")
    scripted = isinstance(flat.inner, torch.jit.ScriptModule)
    if scripted and dtype is not None:
        raise Unsupported("a TorchScript file is predicted in fp32 only", "Give the module itself.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    outer = cast_around(flat, spec, dtype)
    weights = _fake_weights(outer, mode, dtype)

    def call(trace: Trace, inputs: Sequence[Tensor]) -> Any:
        if scripted:  # the mode gives back the same fake tensor for the same weight
            return outer(*inputs)
        with _named_layers(flat.inner, trace):
            return torch.func.functional_call(outer, weights, tuple(inputs))

    return _follow(call, mode, weights, spec, bucket, "as written")


def cast_around(flat: FlatModule, spec: Spec, dtype: torch.dtype | None) -> FlatModule:
    """The same inner module behind casts of floating inputs to a dtype, and of outputs to those of the spec."""
    outer = FlatModule(flat.inner, flat.plan)
    outer.compute_dtype = dtype
    if dtype is not None and spec.outputs:
        outer.output_dtypes = tuple(getattr(torch, t.dtype) for t in spec.outputs)
    return outer.eval()


class CapturedModel:
    """A model captured once by ``torch.export``, replayed at any size that the capture serves.

    Args:
        flat: in evaluation mode on the CPU.
        spec: inputs, outputs and symbols.
    """

    def __init__(self, flat: FlatModule, spec: Spec) -> None:
        self._flat = flat
        self._spec = spec
        self._graph: nn.Module | None = None
        self._fixed = False

    def predict(self, bucket: Bucket, precision: str = "fp32") -> Prediction:
        """Walk the graph at one size.

        Raises:
            Unsupported: ``torch.export`` cannot trace the model, or the graph cannot be replayed so.
        """
        graph = self._graph_at(bucket)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        weights = _fake_weights(graph, mode, DTYPES[precision])
        dtype = DTYPES[precision]

        def call(trace: Trace, inputs: Sequence[Tensor]) -> Any:
            cast = [t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in inputs]
            answers = torch.func.functional_call(_Replay(graph, trace), _within("graph", weights), tuple(cast))
            if dtype is None or not self._spec.outputs:
                return answers
            return [a.to(getattr(torch, t.dtype)) for a, t in zip(answers, self._spec.outputs, strict=True)]

        return _follow(call, mode, weights, self._spec, bucket, "captured")

    def _graph_at(self, bucket: Bucket) -> nn.Module:
        """The one graph for all sizes, or where export fixes sizes a graph for this one."""
        if self._graph is None and not self._fixed:
            program, served, _ = export_flat(self._flat, self._spec)
            self._fixed = served != self._spec
            self._graph = None if self._fixed else flat_program(program)
        if self._graph is not None:
            return self._graph
        return flat_program(export_flat(self._flat, spec_at(self._spec, bucket))[0])


class _Replay(nn.Module):
    """A graph that is walked node by node, each value dropped after its last use."""

    def __init__(self, graph: nn.Module, trace: Trace) -> None:
        super().__init__()
        self.graph = graph
        self._trace = trace

    def forward(self, *inputs: Tensor) -> Any:
        return _Walk(self.graph, self._trace).run(*inputs)


class _Walk(fx.Interpreter):
    """An interpreter that tells the trace which layer a node belongs to."""

    def __init__(self, graph: nn.Module, trace: Trace) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._trace = trace

    def run_node(self, n: fx.Node) -> Any:
        with self._trace.inside(_layer_of(n)):
            return super().run_node(n)


def _layer_of(node: fx.Node) -> str:
    """The path of the layer that a node came from, as the original has it, or else the node's own name."""
    path = str(node.target) if node.op == "call_module" else ""
    stack = node.meta.get("nn_module_stack")
    if not path and stack:
        path = str(next(reversed(stack.values()))[0])
    path = path.removeprefix("L['self'].").removeprefix("inner.")
    return path if path not in ("", "inner") else node.name


def _follow(
    call: Callable[[Trace, Sequence[Tensor]], Any],
    mode: FakeTensorMode,
    weights: dict[str, Tensor],
    spec: Spec,
    bucket: Bucket,
    road: str,
) -> Prediction:
    """Run a call under a trace on fake inputs, and write down what was alive."""
    with mode:
        inputs = [torch.empty(t.concrete(bucket), dtype=getattr(torch, t.dtype)) for t in spec.inputs]
    held = [*weights.values(), *inputs]
    trace = Trace(held)
    try:
        with _shapes_only(), mode, trace:
            answers = call(trace, inputs)
    except DataDependentOutputException as error:
        raise Unsupported(f"its code asks what is in a tensor, so its shapes alone do not tell ({road})") from error
    except Exception as error:  # the model's own code runs here: anything may be raised
        raise Unsupported(f"its shapes cannot be followed ({road}): {first_line(error)}") from error
    finally:
        trace.close()
    kept = {storage_key(t) for t in held}
    fresh = storage_bytes(t for t in answers if storage_key(t) not in kept)
    return Prediction(
        road=road,
        weights_bytes=storage_bytes(weights.values()),
        inputs_bytes=sum(map(tensor_bytes, inputs)),
        outputs_bytes=fresh,
        answer_bytes=sum(map(tensor_bytes, answers)),
        activations_bytes=max(0, trace.peak_bytes - fresh),
        peak_layer=trace.peak_layer or "the model itself",
        peak_tensors=len(trace.peak),
        peak_bytes=trace.peak_bytes,
        reserved_bytes=_reserved(weights, inputs, trace),
        convolution_bytes=trace.convolution_bytes,
        has_products=trace.has_products,
    )


def _reserved(weights: dict[str, Tensor], inputs: Sequence[Tensor], trace: Trace) -> int:
    storages = {storage_key(t): int(t.untyped_storage().nbytes()) for t in (*weights.values(), *inputs)}
    moves = ((event.block.number, event.block.nbytes if event.allocates else 0) for event in trace.events)
    return reserved_for(filter(None, storages.values()), moves)


def _fake_weights(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Parameters and buffers as fake tensors; a tensor with two names stays one."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    made: dict[int, Tensor] = {}
    for _, tensor in named:
        if id(tensor) not in made:
            fake = mode.from_tensor(tensor)
            cast = dtype is not None and fake.is_floating_point()
            made[id(tensor)] = fake.to(dtype) if cast else fake
    return {name: made[id(tensor)] for name, tensor in named}


def _within(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}


@contextlib.contextmanager
def _named_layers(module: nn.Module, trace: Trace) -> Iterator[None]:
    """Tell the trace, by hooks that are taken off again, which layer is running."""
    handles = []
    for name, layer in module.named_modules():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: trace.enter(name)))
        handles.append(layer.register_forward_hook(lambda *_: trace.leave(), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _shapes_only() -> Iterator[None]:
    """No gradients, no remarks, and no fused encoder layer, which is one operator that knows no shapes."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with muted("torch", "transformers"), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def largest_layer_bytes(flat: FlatModule, precision: str = "fp32") -> int:
    """Bytes of the weights that one layer alone holds, the largest of all."""
    dtype = DTYPES[precision]
    largest = 0
    for layer in flat.inner.modules():
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        nbytes = sum(t.numel() * _itemsize(t, dtype) for t in own)
        largest = max(largest, nbytes)
    return largest


def _itemsize(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return (dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize
