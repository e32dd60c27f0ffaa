"""How good a changed module still is: by the task's metric, or by its agreement with the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from onecard.models.flat import FlatModule, by_name
from onecard.spec import Spec
from onecard.verify.compare import compare
from onecard.verify.data import Dataset
from onecard.verify.evaluate import answers_of, evaluate

AGREEMENT = "top-1 agreement"
SIMILARITY = "cosine similarity"


@dataclass(frozen=True)
class Yardstick:
    """One figure for a module; higher is better.

    Args:
        name: the metric's, or :data:`AGREEMENT` or :data:`SIMILARITY` with the original.
        original: the original's own figure.
        rows: how many rows it is taken on.
        score: the figure of a module that is on the device it was made for.
    """

    name: str
    original: float
    rows: int
    score: Callable[[FlatModule], float]


def make_yardstick(original: FlatModule, spec: Spec, rows: Dataset, metric: str, device: str) -> Yardstick:
    """Measure the original, and remember its answers if there is no metric.

    Args:
        original: on the device; it is run now.
        spec: of the model.
        rows: to judge by, on the CPU.
        metric: the task's, for rows with labels, or empty.
        device: ``cpu`` or ``cuda:0``.

    Raises:
        DataError: the metric needs labels that are not there.
    """

    def answers(module: FlatModule) -> dict[str, Tensor]:
        with torch.inference_mode():
            return answers_of(partial(by_name, module, spec), spec, rows, device)

    wanted = answers(original)
    if metric:

        def by_metric(module: FlatModule) -> float:
            return evaluate(answers(module), rows, metric)

        return Yardstick(metric, evaluate(wanted, rows, metric), rows.rows, by_metric)
    by_class = any(e.top1_agreement is not None for e in (compare(n, t, t, "") for n, t in wanted.items()))

    def by_agreement(module: FlatModule) -> float:
        errors = [compare(name, found, wanted[name], "") for name, found in answers(module).items()]
        if by_class:
            return min(e.top1_agreement for e in errors if e.top1_agreement is not None)
        return min(e.cosine for e in errors)

    return Yardstick(AGREEMENT if by_class else SIMILARITY, 1.0, rows.rows, by_agreement)
