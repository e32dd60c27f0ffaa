"""Running a variant over rows of data: its answers to all of them, and the task's metric on those."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from onecard.errors import DataError
from onecard.spec import Spec
from onecard.verify.data import Dataset, batches
from onecard.verify.metrics import get_metric
from onecard.verify.reference import to_device

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_BATCH = 32


def answers_of(run: Run, spec: Spec, data: Dataset, device: str) -> dict[str, Tensor]:
    """The answers to all rows, on the CPU, computed in batches that the spec allows."""
    parts: list[dict[str, Tensor]] = []
    for part in batches(data, batch_size(spec)):
        outputs = run(to_device(part.inputs, device))
        parts.append({name: out.detach().cpu() for name, out in outputs.items()})
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def evaluate(answers: dict[str, Tensor], data: Dataset, metric: str) -> float:
    """The task's metric.

    Raises:
        DataError: there are no labels, or the metric gives NaN or infinity.
    """
    if data.labels is None:
        raise DataError("the metric needs labels.", "Put them beside the inputs as 'label'.")
    value = float(get_metric(metric)(answers, data.labels))
    if not math.isfinite(value):
        raise DataError(f"the metric {metric} gave {value}, expected a finite number.")
    return value


def batch_size(spec: Spec) -> int:
    """Rows a call: what the spec allows at most, up to 32, or the fixed size of the first dimension."""
    batch = spec.batch_symbol
    if batch:
        return min(_BATCH, spec.symbols[batch].high)
    first = spec.inputs[0].shape[0]
    return first if isinstance(first, int) else 1
