"""From a module to a :class:`Model`: made still, its inputs settled, its outputs found by running it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onecard.errors import OnecardError, SpecError
from onecard.models.flat import CallPlan, FlatModule, plan_call, positional
from onecard.models.model import Model, Origin
from onecard.models.probe import find_outputs, spec_at
from onecard.models.request import Request
from onecard.spec import DTYPES, Dim, Range, Spec, TensorSpec, parse_spec

Derived = tuple[CallPlan, Spec]
_DEFAULT_BATCH = 8
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def assemble(
    name: str,
    module: nn.Module,
    origin: Origin,
    request: Request,
    *,
    derive: Callable[[], Derived | None] = lambda: None,
    files: dict[str, Path] | None = None,
) -> Model:
    """Make a model of a module: still, in fp32, with its spec.

    Args:
        name: what the user sees.
        module: the original, weights loaded.
        origin: how to build it again.
        request: what the user said; ``inputs`` win over examples, examples over ``derive``.
        derive: finds plan and inputs from the model itself, or gives None.
        files: files that rebuilding needs.

    Raises:
        SpecError: no inputs are known, or the model cannot be called with them.
        ModelError: its answer holds no tensor, or one that no variant could carry.
    """
    module = make_still(module)
    has_own_names = origin.kind in ("exported", "onnx")
    if request.inputs:
        plan, spec = plan_inputs(module, parse_spec(request.inputs), derive if has_own_names else None)
        flat, spec = find_outputs(FlatModule(module, plan).eval(), settle(spec))
    elif request.has_examples:
        flat, spec = from_examples(module, request)
    else:
        derived = derive()
        if derived is None:
            raise missing_inputs(module)
        plan, spec = derived
        flat, spec = find_outputs(FlatModule(module, plan).eval(), settle(spec))
    return Model(name, flat, spec, origin, dict(files or {}))


def with_notes(model: Model, notes: Sequence[str]) -> Model:
    """A model with notes for the report under ``extra['notes']``."""
    return replace(model, extra={**model.extra, "notes": list(notes)}) if notes else model


def make_still(module: nn.Module) -> nn.Module:
    """Put a module in evaluation mode, on the CPU, in fp32 where it was in half precision, without gradients."""

    def settle_tensor(tensor: Tensor) -> Tensor:
        tensor = tensor.cpu()
        return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor

    module.eval()
    module._apply(settle_tensor)  # type: ignore[no-untyped-call]
    for parameter in module.parameters():  # TorchScript has no requires_grad_ of its own
        parameter.requires_grad_(False)
    return module


def settle(spec: Spec) -> Spec:
    """A spec in which a symbol that can only take one size is that size."""
    return spec_at(spec, {name: rng.low for name, rng in spec.symbols.items() if rng.low == rng.high})


def plan_inputs(module: nn.Module, spec: Spec, own: Callable[[], Derived | None] | None) -> Derived:
    """How to pass a user's inputs: by keyword if forward knows all the names, else by position.

    A file that names its inputs itself gives its plan by ``own``; there the names must be the same.

    Raises:
        SpecError: the names are not the file's.
    """
    names = tuple(tensor.name for tensor in spec.inputs)
    derived = own() if own is not None else None
    if derived is None:
        if set(names) <= set(parameters(module)):
            return CallPlan(names, (), {name: {"$": name} for name in names}), spec
        return positional(names), spec
    plan, known = derived
    if set(names) != set(plan.inputs):
        raise SpecError(
            f"the model's inputs are {list(plan.inputs)}, but --input names {list(names)}.", f"Use {known}."
        )
    by_name = {tensor.name: tensor for tensor in spec.inputs}
    return plan, Spec(tuple(by_name[name] for name in plan.inputs), (), spec.symbols)


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names that forward takes by keyword, in order; empty if it does not say."""
    schema = getattr(getattr(module, "forward", None), "schema", None)
    if schema is not None:  # TorchScript
        return tuple(argument.name for argument in schema.arguments if argument.name != "self")
    try:
        found = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def missing_inputs(module: nn.Module) -> SpecError:
    """What to say when nothing tells the shapes of a model's inputs: an example with forward's own names."""
    names = parameters(module)[:2] or ("image",)
    example = " ".join(f"--input '{name}: float32[B,3,224,224], B=1..8'" for name in names)
    return SpecError(
        f"nothing says what {type(module).__name__} takes: forward has the parameters "
        f"{list(parameters(module)) or '(not named)'}.",
        f"Give each tensor's dtype and shape, for example {example}.",
    )


def from_examples(module: nn.Module, request: Request) -> tuple[FlatModule, Spec]:
    """Derive the spec from example arguments: the first dimension varies if the model can be run so.

    Raises:
        SpecError: the examples hold something else than tensors and constants, or the model does not take them.
    """
    try:
        plan, tensors = plan_call(request.example_args, request.example_kwargs, _example_names(module, request))
    except ValueError as error:
        raise SpecError(
            f"the example inputs cannot be used: {error}.", "Pass tensors, or containers of them."
        ) from error
    if not tensors:
        raise SpecError("the example inputs hold no tensor.", "Pass at least one tensor.")
    failure: OnecardError | None = None
    for batched in _batch_guesses(tensors):
        try:
            return find_outputs(FlatModule(module, plan).eval(), _spec_of_examples(tensors, batched, request.batch))
        except OnecardError as error:
            failure = failure or error
    if request.batch is not None and failure is not None:
        raise failure
    return find_outputs(FlatModule(module, plan).eval(), _spec_of_examples(tensors, (), None))


def _example_names(module: nn.Module, request: Request) -> tuple[str, ...]:
    if request.input_names or not all(isinstance(value, Tensor) for value in request.example_args):
        return request.input_names
    names = (*parameters(module)[: len(request.example_args)], *plan_call((), request.example_kwargs)[0].inputs)
    count = len(plan_call(request.example_args, request.example_kwargs)[1])
    return names if len(set(names)) == count == len(names) else ()


def _batch_guesses(tensors: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """Which inputs may have the batch as first dimension, likeliest first: all of one size, else the first."""
    first = next(iter(tensors.values()))
    if first.dim() == 0 or first.shape[0] == 0:
        return []
    alike = tuple(name for name, t in tensors.items() if t.dim() and t.shape[0] == first.shape[0])
    alone = (next(iter(tensors)),)
    return [alike, alone] if alike != alone else [alike]


def _spec_of_examples(tensors: dict[str, Tensor], batched: Sequence[str], batch: Range | None) -> Spec:
    inputs = []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise SpecError(f"the example '{name}' is of dtype {dtype}, expected one of {', '.join(DTYPES)}.")
        dims: tuple[Dim, ...] = tuple(tensor.shape)
        is_integer = not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel()
        values = Range(int(tensor.min()), int(tensor.max())) if is_integer else None
        inputs.append(TensorSpec(name, dtype, ("B", *dims[1:]) if name in batched else dims, values))
    size = tensors[batched[0]].shape[0] if batched else 0
    ranges = {"B": batch or Range(1, max(_DEFAULT_BATCH, size))} if batched else {}
    return settle(Spec(tuple(inputs), (), ranges))
