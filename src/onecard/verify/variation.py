"""Whether the original's outputs vary with its inputs at all: where they do not, agreement with them proves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_WEIGHTS = "give trained --weights"
_RANGE = "check the weights and the range of the inputs"


@dataclass
class _Output:
    """What is known of one output so far."""

    floating: bool
    value: float | int | bool = 0
    elements: int = 0
    one_value: bool = True
    finite: bool = False
    contrasted: bool = False
    varies: bool = False

    def add(self, out: Tensor) -> None:
        """Take an answer that is not empty into account."""
        first = out.reshape(-1)[0]
        if self.elements == 0:
            self.value = first.item()
        self.one_value = self.one_value and _alike(out, torch.full_like(first, self.value).expand_as(out))
        self.finite = self.finite or bool(torch.isfinite(out).any())
        self.elements += out.numel()

    def contrast(self, out: Tensor, other: Tensor) -> None:
        """Take the answers to two different questions of one size into account."""
        self.contrasted = True
        self.varies = self.varies or not _alike(out, other)

    def fault(self) -> tuple[str, str] | None:
        """What the output is in every case, and what may cure it; None if it tells variants apart."""
        if self.floating and not self.finite:
            return "NaN or infinite in every element", _RANGE
        if self.varies:
            return None
        if self.one_value and (self.contrasted or self.elements > 1):
            return f"{_shown(self.value)} for every input", _WEIGHTS
        return ("the same for every input of one size", _WEIGHTS) if self.contrasted else None


class Variation:
    """Follows the original's outputs over all cases."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Take the answers to one case into account."""
        for name, out in outputs.items():
            if out.numel():
                self._outputs.setdefault(name, _Output(out.is_floating_point())).add(out)

    @property
    def in_doubt(self) -> bool:
        """Whether answers to other inputs could still tell something."""
        found = self._outputs.values()
        return any(o.floating and not o.varies for o in found) or not any(o.varies for o in found)

    def contrast(self, outputs: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Take the answers to two sets of inputs into account, which differ and are of one size."""
        for name, out in outputs.items():
            if name in self._outputs:
                self._outputs[name].contrast(out, others[name])

    def notes(self) -> list[str]:
        """One sentence for each output that no variant can get wrong.

        Integers and booleans are often the same by right (masks, say), so they count only if no output is sound.
        """
        faults = {name: output.fault() for name, output in self._outputs.items()}
        all_are = all(faults.values())
        return [
            f"output '{name}' of the original is {fault[0]}, so agreement with it proves nothing; {fault[1]}"
            for name, fault in faults.items()
            if fault is not None and (all_are or self._outputs[name].floating)
        ]


def differ(inputs: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two sets of inputs are not the same."""
    return any(not _alike(tensor, others[name]) for name, tensor in inputs.items())


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal in every element; NaN equals itself, and zero its negative."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124 - NaN


def _shown(value: float | int | bool) -> str:
    return f"{value + 0.0:g}" if isinstance(value, float) else str(value)
