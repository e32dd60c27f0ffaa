"""What a user may say about a model beside its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecard.spec import Range


@dataclass(frozen=True)
class Request:
    """The options of :func:`onecard.models.load.load_model`, as one value for every loader.

    Args:
        inputs: specs in their text form; they win over everything that could be derived.
        weights: a checkpoint to load strictly.
        example_args: example positional arguments.
        example_kwargs: example keyword arguments.
        input_names: names for the tensors in the examples, in order.
        batch: the range of the batch symbol that is derived.
    """

    inputs: tuple[str, ...] = ()
    weights: Path | None = None
    example_args: tuple[Any, ...] = ()
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    input_names: tuple[str, ...] = ()
    batch: Range | None = None

    @property
    def has_examples(self) -> bool:
        return bool(self.example_args or self.example_kwargs)
