"""One calling convention for every model: tensors in by position, a tuple of tensors out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from onecard.spec import Spec

Template = Any
"""A JSON-like tree of a call's arguments, in which ``{"$": "name"}`` stands for the input of that name, and
``{"()": [...]}`` for a tuple, which JSON cannot tell from a list."""


class CallPlan(msgspec.Struct, frozen=True):
    """How to call the original: its arguments as trees over named inputs, and its outputs' names."""

    inputs: tuple[str, ...]
    args: tuple[Template, ...] = ()
    kwargs: dict[str, Template] = {}
    outputs: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """True where the inputs are just the positional arguments, in order."""
        return not self.kwargs and list(self.args) == [{"$": name} for name in self.inputs]


def positional(names: tuple[str, ...]) -> CallPlan:
    """The plan of a model that takes just these tensors, by position."""
    return CallPlan(names, tuple({"$": name} for name in names))


def plan_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...] = ()
) -> tuple[CallPlan, dict[str, Tensor]]:
    """Find the tensors in example arguments and name them.

    Args:
        args: example positional arguments: tensors, or nested tuples, lists and dicts of them, or constants.
        kwargs: example keyword arguments, likewise.
        names: names for the tensors in the order found; by default the keyword, or ``input``, ``input_1`` ...

    Returns:
        The plan and the named example tensors.

    Raises:
        ValueError: an argument is neither a tensor, a container, a number, a string, a bool nor None,
            or the number of names does not fit.
    """
    found: dict[str, Tensor] = {}

    def walk(value: Any, hint: str) -> Template:
        if isinstance(value, Tensor):
            default, count = hint, 0
            while default in found:
                count += 1
                default = f"{hint}_{count}"
            if names and len(found) >= len(names):
                raise ValueError(f"the call holds more tensors than the {len(names)} names {list(names)}")
            name = names[len(found)] if names else default
            found[name] = value
            return {"$": name}
        if isinstance(value, list):
            return [walk(item, hint) for item in value]
        if isinstance(value, tuple):
            return {"()": [walk(item, hint) for item in value]}
        if isinstance(value, Mapping):
            return {str(key): walk(item, str(key)) for key, item in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"an argument of type {type(value).__name__} is neither a tensor nor a container of tensors")

    arg_trees = tuple(walk(value, "input") for value in args)
    kwarg_trees = {key: walk(value, key) for key, value in kwargs.items()}
    if names and len(found) != len(names):
        raise ValueError(f"the call holds {len(found)} tensors, but {len(names)} names are given: {list(names)}")
    return CallPlan(tuple(found), arg_trees, kwarg_trees), found


def fill(template: Template, tensors: Mapping[str, Tensor]) -> Any:
    """A template with the named tensors put in."""
    if isinstance(template, Mapping):
        if set(template) == {"$"}:
            return tensors[template["$"]]
        if set(template) == {"()"}:
            return tuple(fill(item, tensors) for item in template["()"])
        return {key: fill(item, tensors) for key, item in template.items()}
    if isinstance(template, list):
        return [fill(item, tensors) for item in template]
    return template


def named_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's answer with their names, in order; ``None`` and constants are dropped.

    A lone tensor is ``output``, the items of a sequence ``output_0``, ``output_1`` ..., the fields of a dict
    or dataclass have their own names, and nesting joins names with a dot.
    """
    if isinstance(value, Tensor):
        yield prefix or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            name = f"{prefix}.{field.name}" if prefix else field.name
            yield from named_leaves(getattr(value, field.name), name)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield from named_leaves(getattr(value, name), f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from named_leaves(item, f"{prefix or 'output'}_{index}")


class FlatModule(nn.Module):
    """The original behind one calling convention, with the precision transforms' casts around it.

    Args:
        inner: the original, or a transformed copy.
        plan: how to call it.
    """

    def __init__(self, inner: nn.Module, plan: CallPlan) -> None:
        super().__init__()
        self.inner = inner
        self.plan = plan
        self.compute_dtype: torch.dtype | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.output_dtypes: tuple[torch.dtype, ...] | None = None
        self.channels_last = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the original: tensors in ``plan.inputs`` order to a tuple in ``plan.outputs`` order."""
        named = {name: self._enter(t) for name, t in zip(self.plan.inputs, tensors, strict=True)}
        args = [fill(t, named) for t in self.plan.args]
        kwargs = {key: fill(t, named) for key, t in self.plan.kwargs.items()}
        if self.autocast_dtype is None:
            answer = self.inner(*args, **kwargs)
        else:
            with torch.autocast(tensors[0].device.type, self.autocast_dtype):
                answer = self.inner(*args, **kwargs)
        leaves = [leaf for _, leaf in named_leaves(answer)]
        if self.channels_last:
            leaves = [leaf.contiguous() for leaf in leaves]
        if self.output_dtypes is not None:
            leaves = [leaf.to(dtype) for leaf, dtype in zip(leaves, self.output_dtypes, strict=True)]
        return tuple(leaves)

    def _enter(self, tensor: Tensor) -> Tensor:
        if self.compute_dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.compute_dtype)
        if self.channels_last and tensor.dim() == 4:  # noqa: PLR2004 - [B, C, H, W]
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def output_names(self, answer: Any) -> tuple[str, ...]:
        """The names that :func:`named_leaves` gives to an answer of the original."""
        return tuple(name for name, _ in named_leaves(answer))


def by_name(module: nn.Module, spec: Spec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Call a module that follows the flat convention with named tensors, and name its answers.

    Args:
        module: takes the spec's inputs by position and gives a tuple in the order of its outputs.
        spec: names both.
        inputs: on the module's device; more than the spec's are ignored.
    """
    answers = module(*(inputs[t.name] for t in spec.inputs))
    return dict(zip((t.name for t in spec.outputs), answers, strict=True))
