"""The Python face: a module whose weights are more than the device holds, made callable all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onecard.environment import resolve_device
from onecard.errors import ModelError, SpecError, Unsupported
from onecard.models.assemble import parameters
from onecard.models.flat import CallPlan, FlatModule, plan_call, positional
from onecard.spec import DTYPES, Spec, parse_spec
from onecard.streaming.capture import capture, spec_of_tensors
from onecard.streaming.link import make_link
from onecard.streaming.residency import Budget, Residency, plan_residency
from onecard.streaming.runner import StreamRunner
from onecard.streaming.split import Split, split_program
from onecard.streaming.store import ModuleSource, require_main_memory
from onecard.units import parse_size

if TYPE_CHECKING:
    from rich.table import Table

_PARTS_IN_BUDGET = 32
_LARGEST_PART_BYTES = 256 << 20
_WORKSPACE_BYTES = 128 << 20
_WORKSPACE_SHARE = 8


@dataclass(frozen=True)
class StreamOptions:
    """What may be set, where the defaults do not fit.

    Args:
        part_bytes: about how much weight is copied at once; by default a 32nd of the device memory, but no more than
            256 MiB: smaller parts leave more room for weights that stay, larger ones cost less per copy.
        slots: parts that may be on their way or in use at once.
        activation_bytes: what to leave for activations and workspace; by default an estimate from the graph.
    """

    part_bytes: int | None = None
    slots: int = 2
    activation_bytes: int | None = None


class StreamedModel:
    """A module that runs from main memory; call it as the module, or with its inputs by name. Thread-safe.

    It is a context manager: leaving it closes it.

    Attributes:
        spec: names, dtypes and sizes of the inputs.
        outputs: names of the answers.
        split: the parts.
        residency: what stays on the device, and what a pass copies.
        device: where it runs.
    """

    def __init__(self, runner: StreamRunner, split: Split, spec: Spec, plan: CallPlan, device: str) -> None:
        self.spec = spec
        self.outputs = plan.outputs
        self.split = split
        self.device = device
        self._runner = runner
        self._plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Answer one batch.

        Args:
            *args: as the module takes them, tensors on any device.
            **kwargs: likewise; or all inputs by the names that ``spec`` gives them.

        Returns:
            Output name to answer, on the device of the first input.

        Raises:
            SpecError: another number of tensors, or a dtype or size that does not fit.
        """
        named = self._named(args, kwargs)
        for tensor in self.spec.inputs:
            if named[tensor.name].dtype != getattr(torch, tensor.dtype):
                have = str(named[tensor.name].dtype).removeprefix("torch.")
                raise SpecError(f"input '{tensor.name}' is {have}, expected {tensor}.")
        self.spec.bind({name: tuple(tensor.shape) for name, tensor in named.items()})
        home = next(iter(named.values())).device
        answers = self._runner([named[t.name].detach().to(self.device) for t in self.spec.inputs])
        return {name: answer.to(home) for name, answer in zip(self.outputs, answers, strict=True)}

    @property
    def residency(self) -> Residency:
        """What stays on the device, and what a pass copies."""
        return self._runner.residency

    @property
    def copied_bytes(self) -> int:
        """Weight bytes that were copied to the device so far."""
        return self._runner.copied_bytes

    @property
    def is_pinned(self) -> bool:
        """Whether main memory could be locked, which fast copies need."""
        return self._runner.is_pinned

    def table(self) -> Table:
        """The parts: name, first and last layer, bytes, and where they are."""
        from onecard.streaming.table import parts_table

        return parts_table(self.split, self.residency)

    def close(self) -> None:
        """Release the memory, here and on the device."""
        self._runner.close()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        names = [t.name for t in self.spec.inputs]
        if not args and set(kwargs) == set(names) and all(isinstance(v, Tensor) for v in kwargs.values()):
            return dict(kwargs)
        try:
            plan, tensors = plan_call(args, kwargs, self._plan.inputs)
        except ValueError as error:
            raise SpecError(f"the inputs do not fit: {error}.", f"Pass {self.spec}.") from error
        if (plan.args, plan.kwargs) != (self._plan.args, self._plan.kwargs):
            raise SpecError(
                "the arguments are not those that the model was captured with.",
                f"Call it with the same constants and containers as the example, or with {names} by name.",
            )
        return tensors


def stream(  # noqa: PLR0913 - the keywords are the interface
    module: nn.Module,
    example_inputs: Any,
    device_memory: int | str,
    device: str = "auto",
    inputs: Sequence[str] | None = None,
    *,
    weights: str | Path | None = None,
    consume: bool = False,
    options: StreamOptions | None = None,
) -> StreamedModel:
    """Make a module run on a device that holds only some of its weights.

    The module is cut in order into parts. As many as fit stay on the device; the weights of the others are copied
    from locked main memory while the parts before them compute. The operators and their order are the module's own,
    so that the answers are the same to the last bit.

    Args:
        module: in any precision; on a CPU, or on the meta device with the values in ``weights``. It is put in
            evaluation mode, and no other thread may use it until this returns.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; their values are
            not used.
        device_memory: for weights and activations together, in bytes or as ``"4GiB"``.
        device: ``auto``, ``cpu`` (where the limit is only counted) or ``cuda:N``.
        inputs: the inputs in the spec's text form, to let sizes vary (``"ids: int64[B,128], B=1..8"``); without
            them only the sizes of the example are taken.
        weights: a ``.safetensors`` file or a folder of them, whose values take the place of the module's.
        consume: give up the module's own weights one by one while they are copied; it cannot be used afterwards.
        options: sizes of parts and slots.

    Raises:
        DeviceMemoryError: the limit is too small; the message names the smallest that works.
        ModelError: the module cannot be captured, or main memory cannot hold what is streamed.
        SpecError: inputs and examples do not fit each other.
    """
    chosen = options or StreamOptions()
    limit = parse_size(device_memory) if isinstance(device_memory, str) else device_memory
    place = resolve_device(device)
    plan, tensors = _plan_example(module, example_inputs, inputs)
    spec = _spec(plan, tensors, inputs)
    flat = FlatModule(module, plan).eval()
    try:
        captured = capture(flat, spec, place)
        split = split_program(captured.program, chosen.part_bytes or default_part_bytes(limit))
    except Unsupported as error:
        raise ModelError(f"the model cannot be streamed: {error.detail}.", error.cure) from error
    residency = plan_residency(split.sizes, make_budget(split, limit, place, chosen))
    source = ModuleSource(module, Path(weights) if weights is not None else None, consume)
    copied = {name for i in residency.streamed for name in split.parts[i].weights} - residency.kept
    require_main_memory(source.new_bytes(split.weights[name] for name in copied))
    link = make_link(place, limit - residency.budget.activation_bytes)
    runner = StreamRunner(split, residency, source, link)
    return StreamedModel(runner, split, spec, replace_outputs(plan, captured.outputs), place)


def default_part_bytes(limit_bytes: int) -> int:
    """How much weight to copy at once under a limit."""
    return max(1, min(limit_bytes // _PARTS_IN_BUDGET, _LARGEST_PART_BYTES))


def make_budget(split: Split, limit_bytes: int, device: str, options: StreamOptions) -> Budget:
    """What a limit leaves for weights: all but activations, constants and, on a card, its kernels' workspace."""
    activations = options.activation_bytes
    if activations is None:
        constants = sum(t.numel() * t.element_size() for t in split.constants.values())
        workspace = 0 if device == "cpu" else min(_WORKSPACE_BYTES, limit_bytes // _WORKSPACE_SHARE)
        activations = split.activation_bytes + constants + workspace
    return Budget(limit_bytes, activations, options.slots)


def replace_outputs(plan: CallPlan, outputs: tuple[str, ...]) -> CallPlan:
    """A plan with its outputs' names."""
    return CallPlan(plan.inputs, plan.args, plan.kwargs, outputs)


def _plan_example(module: nn.Module, example: Any, inputs: Sequence[str] | None) -> tuple[CallPlan, dict[str, Tensor]]:
    args, kwargs = _as_call(example)
    if not args and not kwargs:
        if not inputs:
            raise SpecError("nothing says what the module takes.", "Pass example_inputs, or inputs.")
        return positional(tuple(t.name for t in parse_spec(inputs).inputs)), {}
    names: tuple[str, ...] = ()
    if args and all(isinstance(value, Tensor) for value in args):
        by_keyword = plan_call((), kwargs)[0].inputs
        found = (*parameters(module)[: len(args)], *by_keyword)
        names = found if len(set(found)) == len(args) + len(by_keyword) else ()
    try:
        plan, tensors = plan_call(args, kwargs, names)
    except ValueError as error:
        raise SpecError(
            f"the example inputs cannot be used: {error}.", "Pass tensors or containers of them."
        ) from error
    if not tensors:
        raise SpecError("the example inputs hold no tensor.", "Pass at least one tensor.")
    return plan, tensors


def _as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        return (), {}
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def _spec(plan: CallPlan, tensors: dict[str, Tensor], inputs: Sequence[str] | None) -> Spec:
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise SpecError(f"the example '{name}' is of dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}.")
    if not inputs:
        return spec_of_tensors(tensors)
    spec = parse_spec(inputs)
    by_name = {tensor.name: tensor for tensor in spec.inputs}
    if set(by_name) != set(plan.inputs):
        raise SpecError(f"the inputs are {list(plan.inputs)}, but 'inputs' names {list(by_name)}.")
    ordered = Spec(tuple(by_name[name] for name in plan.inputs), (), spec.symbols)
    if tensors:
        ordered.bind({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return ordered
