"""The memory plan: predict every size, measure it, find the largest batch that fits, and say what would help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onecard.errors import UsageError
from onecard.memory.figures import (
    Advice,
    BucketPlan,
    LargestBatch,
    Measured,
    MemoryPart,
    MemoryPlan,
    Prediction,
)
from onecard.memory.parts import Place

if TYPE_CHECKING:
    from torch import nn

    from onecard.memory.subject import Subject
    from onecard.models.model import Model

__all__ = [
    "Advice",
    "BucketPlan",
    "LargestBatch",
    "Measured",
    "MemoryPart",
    "MemoryPlan",
    "PlanOptions",
    "Prediction",
    "make_plan",
]

PRECISIONS = ("fp32", "fp16", "bf16")
_GPU_DEPTH = 3  # one batch that is copied in, one that computes, one that is copied out


@dataclass(frozen=True)
class PlanOptions:
    """What may be asked of a plan; the defaults stand here and nowhere else.

    Args:
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        device_memory: bytes that may be used; None for all that the device has.
        batches: batch sizes to plan for; empty means the bundle's, or the smallest, 8 and the largest.
        precision: ``fp32``, ``fp16`` or ``bf16``; of a model, since a bundle's variants have their own.
        depth: staging slots of the engine; None for its own number, 3 on a GPU and 1 on a CPU.
        measure: run every size in a process of its own; otherwise only predict.
        time_limit_s: for measuring one size.
    """

    device: str = "auto"
    device_memory: int | None = None
    batches: tuple[int, ...] = ()
    precision: str = "fp32"
    depth: int | None = None
    measure: bool = True
    time_limit_s: float = 300.0


def make_plan(
    target: str | Path | nn.Module | Model,
    *,
    inputs: Sequence[str] = (),
    weights: Path | None = None,
    options: PlanOptions | None = None,
    observe: Callable[[str], None] | None = None,
) -> MemoryPlan:
    """Predict, and then measure, the memory that a model or a bundle takes at each size.

    Args:
        target: a bundle's folder, a model's reference, a live module, or a loaded model.
        inputs: the inputs as text, for a model that does not say what it takes.
        weights: a state dict for a model that is built by reference.
        options: see :class:`PlanOptions`.
        observe: told what is going on, several times a second.

    Returns:
        The plan. What could not be predicted or measured is a row with its reason.

    Raises:
        OnecardError: a model, bundle or option that cannot be used; see :mod:`onecard.errors`.
    """
    from onecard.memory.planner import Planner
    from onecard.memory.subject import open_subject
    from onecard.memory.workplace import workplace

    options = options or PlanOptions()
    observe = observe or (lambda _: None)
    _check(options)
    observe("loading the model")
    subject = open_subject(target, inputs, weights, options.batches)
    device = _device(subject, options)
    limit, total = _limit(device, options)
    depth = options.depth or (1 if device == "cpu" else _GPU_DEPTH)
    place = Place(device, _capability(device), depth)
    if not options.measure:
        return Planner(subject, options, place, limit, observe).plan(total)
    with workplace(subject, options, observe) as work:
        return Planner(subject, options, place, limit, observe, work).plan(total)


def _check(options: PlanOptions) -> None:
    if options.precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{options.precision}': expected one of {', '.join(PRECISIONS)}.")
    if options.depth is not None and options.depth < 1:
        raise UsageError(f"a depth of {options.depth} leaves no slot to run in.", "Give at least 1.")
    if options.time_limit_s <= 0:
        raise UsageError("the time limit must be more than nothing.")


def _device(subject: Subject, options: PlanOptions) -> str:
    from onecard.environment import resolve_device

    if subject.manifest is not None:
        if options.precision != "fp32":
            raise UsageError("the variants of a bundle have their precision already.", "Leave out --precision.")
        if options.device == "auto" and subject.manifest.environment.device == "cpu":
            return "cpu"
    return resolve_device(options.device)


def _limit(device: str, options: PlanOptions) -> tuple[int, int]:
    from onecard.device_memory import check_device_memory, device_memory

    total = device_memory(device)
    if options.device_memory is None:
        return total, total
    if options.device_memory <= 0:
        raise UsageError(f"a device memory of {options.device_memory} bytes leaves nothing to use.")
    if options.measure:
        check_device_memory(options.device_memory, device)
    return options.device_memory, total


def _capability(device: str) -> str:
    from onecard import nvml

    known = nvml.facts(int(device.rpartition(":")[2])) if device != "cpu" else None
    return known.compute_capability if known is not None else ""
