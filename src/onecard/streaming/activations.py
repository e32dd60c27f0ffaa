"""How much memory a graph's activations take at most, from their shapes; and whether it writes to its weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

_MAY_COPY = ("aten::contiguous", "aten::reshape", "aten::to", "aten::flatten", "aten::type_as")
"""Operators that give their input or a copy of it: counted as copies, so that the estimate is not too low."""
_DETACH = "aten::detach_"  # writes nothing but the history for gradients


def peak_activation_bytes(
    graph: fx.Graph, part_of: Mapping[fx.Node, int], weights: frozenset[fx.Node], ranges: Mapping[Any, Any]
) -> int:
    """The most bytes that inputs, activations and outputs take at once, each symbol at its largest.

    What enters a part is held until that part ends, since its arguments are. Answers count twice: a caller as a rule
    still holds the last call's while the next one runs. Kernels' workspace is not counted.

    Args:
        graph: with fake tensors in ``meta["val"]``.
        part_of: the part of every node that computes.
        weights: the placeholders that are weights or constants.
        ranges: of the symbols, as ``ExportedProgram.range_constraints``.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    ends = {part: order[node] for node, part in part_of.items()}  # dicts keep the last: nodes come in order
    root = _roots(graph, weights)
    last: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            end = order[node]
            if source in part_of and node in part_of and part_of[source] != part_of[node]:
                end = ends[part_of[node]]
            owner = root[source]
            last[owner] = max(last.get(owner, 0), end)
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            for held in (node, *node.all_input_nodes):  # the caller holds the inputs until the answer is there
                last[root[held]] = len(order)
    changes = [0] * (len(order) + 2)
    for node, start in order.items():
        if root[node] is node and node not in weights and node.op != "output":
            size = _bytes(node.meta.get("val"), ranges)
            changes[start] += size
            changes[max(last.get(node, start), start) + 1] -= size
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    answers = {root[source] for node in graph.nodes if node.op == "output" for source in node.all_input_nodes}
    return peak + sum(_bytes(node.meta.get("val"), ranges) for node in answers - weights)


def written_weights(graph: fx.Graph, weights: frozenset[fx.Node]) -> list[str]:
    """Names of operators that write in place to a weight or to a view of one."""
    root = _roots(graph, weights)
    return [f"{node.target}" for node in graph.nodes if any(root[source] in weights for source in _written(node))]


def _roots(graph: fx.Graph, weights: frozenset[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For every node the one whose memory its value lies in: itself, unless it is a view."""
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        base = _base(node)
        if base is not None and _may_copy(node) and root[base] not in weights:
            base = None
        root[node] = node if base is None else root[base]
    return root


def _base(node: fx.Node) -> fx.Node | None:
    """The input that an operator's answer is a view of."""
    first = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(first, fx.Node):
        return None
    if node.target is operator.getitem:
        return first
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target is torch.ops.aten.dropout.default and node.args[2] is False:
        return first
    returns = node.target._schema.returns
    return first if any(r.alias_info is not None for r in returns) else None


def _may_copy(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _MAY_COPY


def _written(node: fx.Node) -> list[fx.Node]:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.name == _DETACH:
        return []
    found = []
    for index, argument in enumerate(node.target._schema.arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            found.append(value)
    return found


def _bytes(value: Any, ranges: Mapping[Any, Any]) -> int:
    """Bytes of a fake tensor, or of several, at the largest size of every symbol."""
    if isinstance(value, tuple | list):
        return sum(_bytes(item, ranges) for item in value)
    if not isinstance(value, Tensor):
        return 0
    sizes: list[Any] = list(value.shape)  # claims to hold integers, but may hold symbols
    return math.prod(_largest(size, ranges) for size in sizes) * value.element_size()


def _largest(size: Any, ranges: Mapping[Any, Any]) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    limits = {symbol: ranges[symbol].upper for symbol in expression.free_symbols if symbol in ranges}
    try:
        return int(expression.subs(limits))
    except (TypeError, ValueError, OverflowError):  # unbounded, or only known when it runs
        return int(size.node.hint) if size.node.hint is not None else 1
