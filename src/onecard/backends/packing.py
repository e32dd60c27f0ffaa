"""The constants of a compiled graph as data: plain tensors, and weights as they were before oneDNN packed them.

A packed weight's layout is opaque and right for one processor only. So the weight is saved with the call that packed
it, and that call is made again where the artifact is loaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor, fx

from onecard.backends.tensors import Stored, TensorStore
from onecard.errors import Unsupported

_NAMESPACES = ("mkldnn", "mkl", "onednn")
_PACKERS = ("_reorder_", "_prepack")


class Constant(msgspec.Struct, frozen=True):
    """A constant of the graph: a tensor, or what an operator makes of one.

    Args:
        name: in the generated code.
        tensor: the constant, or the operator's first argument.
        pack: the operator, as ``namespace.name`` or ``namespace.name.overload``; empty for a plain tensor.
        arguments: the operator's other arguments, null where a tensor belongs.
        tensors: those tensors, each with its place in ``arguments``.
    """

    name: str
    tensor: Stored
    pack: str = ""
    arguments: tuple[Any, ...] = ()
    tensors: tuple[tuple[int, Stored], ...] = ()


class Packings:
    """What was packed while a graph was compiled: packed weights, and the calls that made them."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[Tensor, str, tuple[Any, ...]]] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Watch inductor fold constants, where a packing operator is run once and for all."""
        from torch._inductor import constant_folding

        folding: Any = constant_folding.ConstantFolder
        deduce = folding._deduce_value

        def note(folder: Any, node: fx.Node) -> Any:
            value = deduce(folder, node)
            if isinstance(value, Tensor) and any(word in str(node.target) for word in _PACKERS):
                arguments, _ = folder.fetch_args_kwargs_from_env(node)
                # The packed weight is kept too, so that no other tensor gets its id.
                self._calls[id(value)] = (value, str(node.target), tuple(map(_plain, arguments)))
            return value

        folding._deduce_value = note
        try:
            yield
        finally:
            folding._deduce_value = deduce

    def save(self, name: str, tensor: Tensor, store: TensorStore) -> Constant:
        """Put a constant of the graph into a store.

        Raises:
            Unsupported: its layout is opaque, and nobody saw how it was made.
        """
        if id(tensor) not in self._calls:
            if tensor.layout != torch.strided:
                raise Unsupported(f"the compiled graph holds a weight in an opaque layout ({tensor.layout})")
            return Constant(name, store.add(tensor))
        _, operator, (weight, *rest) = self._calls[id(tensor)]
        tensors = tuple((place, store.add(a)) for place, a in enumerate(rest) if isinstance(a, Tensor))
        plain = tuple(None if isinstance(a, Tensor) else a for a in rest)
        return Constant(name, store.add(weight), operator, plain, tensors)


def load_constant(constant: Constant, store: TensorStore, device: str, memo: dict[Any, Any]) -> Tensor:
    """A constant as the generated code wants it.

    Args:
        constant: from :meth:`Packings.save`.
        store: where its tensors lie.
        device: to load them to.
        memo: packed weights that are there already; artifacts of several buckets share them.

    Raises:
        ValueError: the operator is not one that packs weights.
    """
    tensor = store.load(constant.tensor, device)
    if not constant.pack:
        return tensor
    if constant.pack.split(".")[0] not in _NAMESPACES or not any(word in constant.pack for word in _PACKERS):
        raise ValueError(f"unknown packing operator {constant.pack}")
    key = (constant.pack, constant.tensor, str(constant.arguments), constant.tensors)
    if key not in memo:
        arguments = list(constant.arguments)
        for place, stored in constant.tensors:
            arguments[place] = store.load(stored, device)
        pack: Any = functools.reduce(getattr, constant.pack.split("."), torch.ops)
        memo[key] = pack(tensor, *arguments)
    packed: Tensor = memo[key]
    return packed


def _plain(value: Any) -> Any:
    """An operator's argument as JSON data: tensors stay, symbolic sizes become their hints."""
    if isinstance(value, Tensor | None | bool | float | str):
        return value
    if hasattr(value, "node"):
        return value.node.hint
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else int(value)
