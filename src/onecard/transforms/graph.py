"""An exported graph's activations as modules, so that transforms that look for modules find them.

The layers come back with the graph (:mod:`onecard.models.layers`); activations have no parameters by which
they could be found there, and stay operators until a transform asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_aten = torch.ops.aten
_RELU6 = (0.0, 6.0)


def _hardtanh(inplace: bool) -> Callable[..., nn.Module | None]:
    def make(low: float = -1.0, high: float = 1.0) -> nn.Module | None:
        return nn.ReLU6(inplace) if (low, high) == _RELU6 else None

    return make


_MAKERS: dict[Any, Callable[..., nn.Module | None]] = {
    _aten.relu.default: nn.ReLU,
    _aten.relu_.default: lambda: nn.ReLU(inplace=True),
    _aten.hardtanh.default: _hardtanh(False),
    _aten.hardtanh_.default: _hardtanh(True),
    _aten.gelu.default: nn.GELU,
    _aten.silu.default: nn.SiLU,
    _aten.silu_.default: lambda: nn.SiLU(inplace=True),
    _aten.hardswish.default: nn.Hardswish,
    _aten.hardswish_.default: lambda: nn.Hardswish(inplace=True),
    _aten.sigmoid.default: nn.Sigmoid,
    _aten.tanh.default: nn.Tanh,
}
"""Operator to what makes its module from the arguments behind the tensor; in place stays in place."""


def restore_activations(module: nn.Module) -> None:
    """Replace activation operators by modules in every exported graph inside a module, in place."""
    for child in list(module.modules()):
        if isinstance(child, fx.GraphModule):
            _restore(child)


def _restore(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        make = _MAKERS.get(node.target) if node.op == "call_function" else None
        activation = make(*node.args[1:], **node.kwargs) if make else None
        if activation is None:
            continue
        name = f"activation_{node.name}"
        graph.add_module(name, activation.eval())
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(name, (node.args[0],))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.recompile()
