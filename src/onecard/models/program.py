"""The spec of an exported program: names, dtypes, symbols and ranges as its graph signature has them."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram

from onecard.errors import ModelError
from onecard.models.flat import CallPlan, named_leaves, positional
from onecard.models.request import Request
from onecard.spec import DTYPES, Dim, Range, Spec, TensorSpec

_DEFAULT_BATCH = 8
_DEFAULT_OTHER = 512


def input_values(program: ExportedProgram) -> list[tuple[str, Tensor]]:
    """The user inputs by position: name and fake tensor.

    Raises:
        ModelError: an input is no tensor.
    """
    wanted = program.graph_signature.user_inputs
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    found = []
    for name in wanted:
        value = values.get(name) if isinstance(name, str) else None
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"the exported program takes an input that is no tensor: {name!r}.",
                "Export it with tensors only; make constants part of the module.",
            )
        found.append((name, value))
    return found


def symbolic_shape(value: Tensor) -> tuple[int | torch.SymInt, ...]:
    """The shape of a fake tensor, typed as what it is: ``Tensor.shape`` claims plain integers."""
    return tuple(value.shape)


def plan_of_program(program: ExportedProgram) -> CallPlan:
    """The plan of :func:`onecard.models.exported.flat_program`, outputs named as the original had them."""
    names = tuple(name for name, _ in input_values(program))
    values = {n.name: n.meta.get("val") for n in program.graph.nodes}
    leaves = [values.get(name) if isinstance(name, str) else None for name in program.graph_signature.user_outputs]
    outputs: tuple[str, ...] = ()
    if program.call_spec.out_spec is not None and program.call_spec.out_spec.num_leaves == len(leaves):
        answer = pytree.tree_unflatten(leaves, program.call_spec.out_spec)
        named = tuple(name for name, _ in named_leaves(answer))
        outputs = named if len(set(named) | set(names)) == len(named) + len(names) else ()
    plan = positional(names)
    return CallPlan(plan.inputs, plan.args, {}, outputs)


def spec_of_program(program: ExportedProgram, request: Request) -> Spec:
    """The inputs and symbols of a program.

    An upper limit that the program leaves open becomes 8 for the batch and 512 for any other symbol.

    Raises:
        ModelError: a dimension is a formula of symbols, or a dtype is not one onecard carries.
    """
    values = input_values(program)
    names: dict[Any, str] = {}
    ranges: dict[str, Range] = {}
    tensors = []
    for name, value in values:
        dims: list[Dim] = []
        for axis, size in enumerate(symbolic_shape(value)):
            if not isinstance(size, torch.SymInt):
                dims.append(int(size))
                continue
            expr = size.node.expr
            if expr not in program.range_constraints:
                raise ModelError(
                    f"dimension {axis} of the exported program's input '{name}' is {expr}, which is no plain symbol.",
                    "Export it with independent dimensions, or with that dimension fixed.",
                )
            if expr not in names:
                names[expr] = _symbol(axis, value, set(names.values()))
                ranges[names[expr]] = _range(program.range_constraints[expr], names[expr], request)
            dims.append(names[expr])
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ModelError(f"the input '{name}' is of dtype {dtype}, expected one of {', '.join(DTYPES)}.")
        tensors.append(TensorSpec(name, dtype, tuple(dims)))
    return Spec(tuple(tensors), (), ranges)


def _symbol(axis: int, value: Tensor, taken: set[str]) -> str:
    picture = {2: "H", 3: "W"} if value.dim() == 4 else {}  # noqa: PLR2004 - [B, C, H, W]
    base = {0: "B", 1: "S", **picture}.get(axis, f"D{axis}")
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}{count}"
    return name


def _range(limits: Any, name: str, request: Request) -> Range:
    if name == "B" and request.batch is not None:
        return request.batch
    low = max(1, int(limits.lower))
    try:
        high = int(limits.upper)
    except (TypeError, ValueError, OverflowError):
        high = 0
    if not 0 < high < 1 << 40:
        high = max(low, _DEFAULT_BATCH if name == "B" else _DEFAULT_OTHER)
    return Range(low, high)
