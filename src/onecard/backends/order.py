"""The order of a compiled graph's nodes, chosen so that fewer tensors are alive at once.

A residual block whose short branch is computed last keeps the block's input alive beside the long branch's answer;
computed first, the input is gone before that answer is there. Models are written the former way: DeepLabV3 at a batch
of 16 has 640 MiB of intermediate tensors at its peak where 576 do (the whole variant, on an H200: 779 MiB and 715).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_COMPUTED_ANYWHERE = {_ATEN.index.Tensor, _ATEN._unsafe_index.Tensor, _ATEN.full.default, torch.ops.prims.iota.default}
"""Beside the elementwise operators: what a compiler computes within the kernel that reads it."""
_SETTLES_STRIDES = "prims::inductor_force_stride_order"
"""What TorchInductor adds to fix a tensor's strides: the kernel before it writes them so, and nothing is copied."""
_MOST_MOVES = 100
_MOST_STEPS = 400_000
"""Nodes that the simulations may pass through in all, one or two seconds; no clock, so that builds are alike."""


def order_for_memory(graph: fx.Graph) -> None:
    """Move nodes forward, as far as their arguments allow, where that lowers the peak of live tensors.

    The peak is that of a simulation of what TorchInductor makes of the graph: weights and inputs do not count, views
    are part of what they look at, elementwise operators are computed where they are read, and write over an argument
    that nobody needs any more. A graph with symbolic sizes is left as it is.

    Args:
        graph: of ATen operators, functional but for copies into inputs; changed in place.
    """
    schedule = _Schedule(list(graph.nodes))
    if not schedule.is_known:
        return
    peak, at = schedule.peak(schedule.nodes)
    left = _MOST_STEPS // max(1, len(schedule.nodes))
    for _ in range(_MOST_MOVES):
        tries = [(*schedule.peak(order), move, order) for move, order in itertools.islice(schedule.moves(at), left)]
        left -= len(tries)
        better = min(tries, key=operator.itemgetter(0), default=None)
        if better is None or better[0] >= peak:
            return
        peak, at, (node, place), schedule.nodes = better
        place.append(node)


class _Schedule:
    """Nodes in the order in which they run, and what each of them holds and reads.

    Args:
        nodes: of a graph, in order.
    """

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes = nodes
        self.elementwise = frozenset(filter(_is_elementwise, nodes))
        self.roots: dict[fx.Node, fx.Node] = {}  # a node's storage: itself, or what it is a view of
        for node in nodes:
            source = _looks_at(node)
            self.roots[node] = node if source is None else self.roots[source]
        sizes = {node: _nbytes(node.meta.get("val")) if self._is_kept(node) else 0 for node in nodes}
        self.is_known = None not in sizes.values() and not any(map(_writes, nodes))
        self.nbytes = {node: size or 0 for node, size in sizes.items()}
        self.reads: dict[fx.Node, frozenset[fx.Node]] = {}  # the storages that a node's kernel reads
        for node in nodes:
            roots = [self.roots[source] for source in node.all_input_nodes]
            self.reads[node] = frozenset().union(*({r} if self.nbytes[r] else self.reads[r] for r in roots))

    def peak(self, order: list[fx.Node]) -> tuple[int, int]:
        """The most bytes alive at once in this order, and the index of the first node at which they are."""
        last = {root: i for i, node in enumerate(order) if self._runs(node) for root in (*self.reads[node], node)}
        alive = highest = at = 0
        for index, node in enumerate(order):
            if not self._runs(node):
                continue
            ending = {root for root in self.reads[node] if last[root] == index}
            reused = node in self.elementwise and any(self.nbytes[root] == self.nbytes[node] for root in ending)
            before = alive
            alive += 0 if reused else self.nbytes[node]
            if alive > highest:
                highest, at = alive, index
            alive = before + self.nbytes[node] - sum(self.nbytes[root] for root in ending)
            if last[node] == index:
                alive -= self.nbytes[node]
        return highest, at

    def moves(self, at: int) -> Iterable[tuple[tuple[fx.Node, fx.Node], list[fx.Node]]]:
        """Every node that runs at or after an index and could run before it: the node, after which, and the order."""
        index = {node: i for i, node in enumerate(self.nodes)}
        start = max((i for node, i in index.items() if node.op in ("placeholder", "get_attr")), default=0)
        for node in self.nodes[at:]:
            if not self.nbytes[node] or not _may_move(node):
                continue
            place = max((start, *(index[source] for source in node.all_input_nodes)))
            if place < at and place + 1 < index[node]:
                rest = [n for n in self.nodes if n is not node]
                yield (node, self.nodes[place]), [*rest[: place + 1], node, *rest[place + 1 :]]

    def _runs(self, node: fx.Node) -> bool:
        """Whether a kernel ends with this node."""
        return bool(self.nbytes[node]) or node.op == "output"

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether a node's answer is written to memory: not what other elementwise operators alone will read."""
        if node.op != "call_function" or self.roots[node] is not node:
            return False
        readers = list(self._readers(node))
        return node not in self.elementwise or not readers or not self.elementwise.issuperset(readers)

    def _readers(self, node: fx.Node) -> Iterable[fx.Node]:
        for user in node.users:
            if _looks_at(user) is node:
                yield from self._readers(user)
            else:
                yield user


def _looks_at(node: fx.Node) -> fx.Node | None:
    """The argument in whose storage a node's answer lies, if any."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.name == _SETTLES_STRIDES:
        return node.all_input_nodes[0]
    for value, argument in zip(node.args, node.target._schema.arguments, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def _writes(node: fx.Node) -> bool:
    """Whether an operator changes what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _may_move(node: fx.Node) -> bool:
    """Whether it does not matter when a node runs, as long as its arguments are there."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_elementwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in _COMPUTED_ANYWHERE


def _nbytes(value: Any) -> int | None:
    """Bytes of a node's value; None where they are symbolic."""
    if isinstance(value, (tuple, list)):
        sizes = [_nbytes(item) for item in value]
        return None if None in sizes else sum(size or 0 for size in sizes)
    if not isinstance(value, Tensor):
        return 0
    count = value.numel()
    return count * value.element_size() if isinstance(count, int) else None
