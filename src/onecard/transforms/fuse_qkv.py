"""Fusing linear layers that read the same tensor (query, key and value; gate and up) into one matrix product.

The weights are stacked and the answer is split: one wide product uses a card better than three narrow ones
(NVIDIA's FasterTransformer calls it the fused QKV product).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.transforms import watch

_FEWEST = 2


def fuse_qkv(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Make one ``nn.Linear`` of all sibling linears that read the very same tensor.

    The groups are found by watching one run, so that any module works, also those that cannot be traced.
    The first linear of a group becomes a :class:`StackedLinear`, which holds the stacked ``nn.Linear``; the
    others become :class:`LinearPiece` s, which only hand out what the first has computed.

    Args:
        module: a module that the caller gives up.
        inputs: example inputs by name, on the module's device.

    Raises:
        Unsupported: no two sibling linears read the same tensor, or the answers would change.
    """
    with watch.exact_run():
        groups = _find_groups(module, inputs)
        if not groups:
            raise Unsupported("no two linear layers of one module read the same tensor")
        names = {child: name for name, child in module.named_modules()}

        def change() -> None:
            links: list[_Link] = []
            for group in groups:
                pieces = stack(group)
                links.append(pieces[0]._link)
                for layer, piece in zip(group, pieces, strict=True):
                    module.set_submodule(names[layer], piece)
            module.register_forward_hook(_Forget(tuple(links)), always_call=True)

        return watch.rewrite(module, inputs, change, "fusing linear layers")


class _Cells(threading.local):
    """The last input, with the pieces nobody has asked for yet, of one thread."""

    last: tuple[Tensor, dict[int, Tensor]] | None = None


class _Link:
    """What the pieces of one stacked linear share; no module, so that its weight is registered once."""

    def __init__(self) -> None:
        self.stacked: StackedLinear | None = None
        self.cells = _Cells()

    def __getstate__(self) -> dict[str, Any]:
        return {"stacked": self.stacked}  # cells belong to threads, and cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.stacked, self.cells = state["stacked"], _Cells()


class _Forget:
    """A hook behind the whole module's call: a call that did not run all pieces leaves nothing to the next.

    The next may come with the same tensor object, filled anew. An object, so that a copied module has its own links.

    Args:
        links: of all groups.
    """

    def __init__(self, links: tuple[_Link, ...]) -> None:
        self.links = links

    def __call__(self, module: nn.Module, args: Any, answer: Any) -> None:
        for link in self.links:
            link.cells.last = None


class StackedLinear(nn.Module):
    """The first of a group: computes the whole group's product and gives out its own part.

    Args:
        linear: the stacked layer, ``[sum(sizes), in_features]``; a quantiser may put another in its place.
        sizes: output features of each member of the group.
        link: shared with the pieces.
    """

    def __init__(self, linear: nn.Linear, sizes: tuple[int, ...], link: _Link) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = sizes
        self._link = link
        link.stacked = self

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.split(x)
        self._link.cells.last = (x, dict(enumerate(others, 1)))
        return first

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all members, as views of one tensor."""
        parts: tuple[Tensor, ...] = self.linear(x).split(self.sizes, dim=-1)
        return parts


class LinearPiece(nn.Module):
    """Another member of a group: its part of what the first computed, if that was for the same tensor."""

    def __init__(self, position: int, link: _Link) -> None:
        super().__init__()
        self.position = position
        self._link = link

    def forward(self, x: Tensor) -> Tensor:
        cell = self._link.cells.last
        if cell is not None and cell[0] is x and self.position in cell[1]:
            part = cell[1].pop(self.position)
            if not cell[1]:
                self._link.cells.last = None  # nothing of this call is kept alive
            return part
        assert self._link.stacked is not None  # set when the group was made
        return self._link.stacked.split(x)[self.position]


@torch.no_grad()
def stack(group: tuple[nn.Linear, ...]) -> list[StackedLinear | LinearPiece]:
    """One module for each member of a group, which together hold a single linear."""
    first = group[0]
    sizes = tuple(layer.out_features for layer in group)
    biased = any(layer.bias is not None for layer in group)
    weight = first.weight
    linear = nn.Linear(first.in_features, sum(sizes), biased, device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(torch.cat(tuple(layer.weight for layer in group)))
    if biased:
        linear.bias.copy_(torch.cat(tuple(_bias(layer) for layer in group)))
    link = _Link()
    modules: list[StackedLinear | LinearPiece] = [
        StackedLinear(linear, sizes, link),
        *(LinearPiece(i, link) for i in range(1, len(group))),
    ]
    return [made.train(first.training).requires_grad_(False) for made in modules]


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def _find_groups(module: FlatModule, inputs: dict[str, Tensor]) -> list[tuple[nn.Linear, ...]]:
    """Linears of one parent that were called with one tensor, always together, in the order of their calls."""
    tied = watch.shared_weights(module)
    names: dict[nn.Module, str] = {
        child: name
        for name, child in module.named_modules()
        if type(child) is nn.Linear and watch.is_plain(child) and id(child.weight) not in tied
    }
    calls: dict[tuple[Any, ...], list[nn.Linear]] = defaultdict(list)
    alive: list[Tensor] = []  # so that no id is used again

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            assert isinstance(layer, nn.Linear)
            alive.append(args[0])
            parent = names[layer].rpartition(".")[0]
            kind = (layer.weight.dtype, layer.weight.device)
            calls[(id(args[0]), watch.version(args[0]), parent, *kind)].append(layer)

    def hooks(stack: ExitStack) -> None:
        for layer in names:
            stack.callback(layer.register_forward_pre_hook(note).remove)

    watch.watch(module, inputs, hooks)
    return _consistent(list(calls.values()))


def _consistent(calls: list[list[nn.Linear]]) -> list[tuple[nn.Linear, ...]]:
    """The groups of two and more whose members were never called in other company."""
    company: dict[nn.Linear, set[tuple[nn.Linear, ...]]] = defaultdict(set)
    for group in calls:
        for layer in group:
            company[layer].add(tuple(group))
    sound = (
        tuple(group)
        for group in calls
        if len(group) >= _FEWEST and len(set(group)) == len(group) and all(len(company[layer]) == 1 for layer in group)
    )
    return list(dict.fromkeys(sound))
