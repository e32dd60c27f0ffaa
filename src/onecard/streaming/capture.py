"""A module as an exported program on any device without moving its weights: traced with fakes in their place.

What a module computes may depend on where it is (a causal mask made on its device, a check of ``is_cuda``). So it is
traced as if it were on the device that will run it, while its weights stay where they are, or are only announced (the
meta device).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.models.probe import unique_names
from onecard.models.wording import first_line
from onecard.quiet import muted
from onecard.spec import Spec, TensorSpec

_DYNAMIC_HINT_MIN = 2


@dataclass(frozen=True)
class Captured:
    """What tracing found.

    Args:
        program: whose weights are fakes, under the names of the flat module.
        outputs: names of its answers, in order.
    """

    program: ExportedProgram
    outputs: tuple[str, ...]


def capture(flat: FlatModule, spec: Spec, device: str) -> Captured:
    """Trace a module as if it were on a device.

    Args:
        flat: in evaluation mode, on any device, the meta device included. Its parameters and buffers are replaced
            by fakes while this runs and put back after it: no other thread may use it meanwhile.
        spec: inputs and symbols; a symbol whose range holds one size is a constant.
        device: ``cpu`` or ``cuda:N``.

    Raises:
        Unsupported: ``torch.export`` cannot trace the model, or it fixes a dimension that the spec lets vary.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    names: list[str] = []

    def note_names(module: nn.Module, args: Any, answer: Any) -> None:
        names[:] = flat.output_names(answer)

    fake = FakeTensorMode(shape_env=ShapeEnv())
    hook = flat.inner.register_forward_hook(note_names)
    try:
        with torch.inference_mode(False), torch.no_grad(), _faked(flat, fake, device):
            program = _export(flat, spec, fake, device)
    finally:
        hook.remove()
    return Captured(program, unique_names(names, flat.plan))


@contextmanager
def _faked(module: nn.Module, fake: Any, device: str) -> Iterator[None]:
    """Fakes on a device in the place of a module's parameters and buffers; what is tied stays tied."""
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    memo: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise Unsupported(f"a weight is a {type(tensor).__name__}, not a plain tensor, and cannot be streamed")
        if id(tensor) not in memo:
            with fake:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return memo[id(tensor)]

    try:
        for owner, parameters, buffers in before:
            for name, parameter in parameters.items():
                if parameter is not None:
                    owner._parameters[name] = stand_in(parameter)  # type: ignore[assignment]
            for name, buffer in buffers.items():
                if buffer is not None:
                    owner._buffers[name] = stand_in(buffer)
        yield
    finally:
        for owner, parameters, buffers in before:
            owner._parameters.update(parameters)
            owner._buffers.update(buffers)


def _export(flat: FlatModule, spec: Spec, fake: Any, device: str) -> ExportedProgram:
    moving = [name for name, rng in spec.symbols.items() if rng.low < rng.high]
    sizes = _trace_sizes(spec, moving)
    with fake:
        example = tuple(
            torch.empty(t.concrete(sizes), dtype=getattr(torch, t.dtype), device=device) for t in spec.inputs
        )
    # A model may relate its own dimensions (S a multiple of 8): then only the ranges are given.
    failure: Exception | None = None
    for infer in (False, True) if moving else (False,):
        shapes = (_dynamic_shapes(spec, moving, infer),) if moving else None
        try:
            with muted("torch.export", level=logging.CRITICAL):
                program = torch.export.export(flat, example, dynamic_shapes=shapes, strict=False)
            _require_moving(program, spec, moving)
            return program
        except Exception as error:  # the model's own code runs here: anything may be raised
            failure = failure or error
    cure = "Give fixed sizes, or pass the module without 'inputs'." if moving else ""
    raise Unsupported(f"torch.export cannot trace this model: {first_line(failure or Exception())}", cure) from failure


def _trace_sizes(spec: Spec, moving: list[str]) -> dict[str, int]:
    """The largest size of each symbol, but none twice and none 1: export takes 1 and equal sizes for constants."""
    sizes: dict[str, int] = {}
    for name, rng in spec.symbols.items():
        free = (n for n in range(rng.high, max(rng.low, _DYNAMIC_HINT_MIN) - 1, -1) if n not in sizes.values())
        sizes[name] = next(free, rng.high) if name in moving else rng.high
    return sizes


def _dynamic_shapes(spec: Spec, moving: list[str], infer: bool) -> tuple[dict[int, Any], ...]:
    dims: dict[str, Any] = {}
    for name in moving:
        rng = spec.symbols[name]
        dims[name] = Dim.AUTO(min=rng.low, max=rng.high) if infer else Dim(name, min=rng.low, max=rng.high)
    return tuple({axis: dims[dim] for axis, dim in enumerate(t.shape) if dim in dims} for t in spec.inputs)


def _require_moving(program: ExportedProgram, spec: Spec, moving: list[str]) -> None:
    """Refuse a program that fixed what should vary."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for tensor, name in zip(spec.inputs, program.graph_signature.user_inputs, strict=True):
        sizes = zip(tensor.shape, tuple(values[str(name)].shape), strict=True)
        if any(dim in moving and not _varies(program, size, spec, dim) for dim, size in sizes):
            raise Unsupported(f"the model fixes a dimension of its input '{tensor.name}' that should vary ({tensor})")


def _varies(program: ExportedProgram, size: Any, spec: Spec, dim: Any) -> bool:
    if not isinstance(size, torch.SymInt):
        return False
    limits: Any = program.range_constraints.get(size.node.expr)
    rng = spec.symbols[dim]
    return limits is not None and limits.lower <= rng.low and limits.upper >= rng.high


def spec_of_tensors(tensors: dict[str, Tensor]) -> Spec:
    """The spec of a model that takes just these sizes."""
    found = (
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    )
    return Spec(tuple(found), (), {})
