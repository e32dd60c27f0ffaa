"""Layers out of operators: an exported graph's convolutions, linears and batch norms as modules again.

Transforms that fold, quantise or prune look for ``nn.Conv2d``, ``nn.Linear`` and ``nn.BatchNorm2d``. An exported
program has only operators over parameters, whose names still tell the module they came from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_aten = torch.ops.aten
_CONVS = {
    _aten.conv1d.default: nn.Conv1d,
    _aten.conv2d.default: nn.Conv2d,
    _aten.conv3d.default: nn.Conv3d,
}
_NORM_OF_DIMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_WEIGHTS_OF = {
    **dict.fromkeys(_CONVS, (1, 2)),
    _aten.linear.default: (1, 2),
    _aten.batch_norm.default: (1, 2, 3, 4),
}
"""Which arguments of each operator are parameters or buffers of its layer."""


def restore_layers(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace operators by the layers that own their parameters, in place, wherever that is unambiguous.

    A layer stays an operator if its parameters belong to several owners, or if its owner holds something else.

    Args:
        graph: from :func:`onecard.models.exported.flat_program`; its answers do not change.

    Returns:
        The same graph module.
    """
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        owner = _owner(node)
        if owner:
            calls[owner].append(node)
    for owner, nodes in calls.items():
        layer = _layer(graph, owner, nodes)
        if layer is None:
            continue
        graph.set_submodule(owner, layer)
        for node in nodes:
            with graph.graph.inserting_before(node):
                call = graph.graph.call_module(owner, (node.args[0],))
            call.meta = node.meta
            node.replace_all_uses_with(call)
            graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _owner(node: fx.Node) -> str:
    """The path of the module that holds all parameters of an operator, or empty."""
    places: tuple[int, ...] = _WEIGHTS_OF.get(node.target, ()) if node.op == "call_function" else ()  # type: ignore[call-overload]
    weights = [node.args[i] for i in places if i < len(node.args) and node.args[i] is not None]
    if not weights or not all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights):
        return ""
    owners = {str(w.target).rpartition(".")[0] for w in weights if isinstance(w, fx.Node)}
    return owners.pop() if len(owners) == 1 else ""


def _layer(graph: fx.GraphModule, owner: str, nodes: list[fx.Node]) -> nn.Module | None:
    """The layer for all calls of one owner, with that owner's own tensors."""
    first = nodes[0]
    same = all(n.target == first.target and n.args[1:] == first.args[1:] and n.kwargs == first.kwargs for n in nodes)
    holder = graph.get_submodule(owner)
    if not same or first.kwargs or any(True for _ in holder.children()):
        return None
    tensors = {**dict(holder.named_parameters(recurse=False)), **dict(holder.named_buffers(recurse=False))}
    used = {n.target for node in nodes for n in node.args if isinstance(n, fx.Node) and n.op == "get_attr"}
    left = {name for name in tensors if f"{owner}.{name}" not in used} - {"num_batches_tracked"}
    if left or not set(tensors) <= {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}:
        return None
    if first.target in _CONVS:
        return _filled(_conv(_CONVS[first.target], first, tensors), tensors)
    if first.target == _aten.linear.default:
        out, into = tensors["weight"].shape
        return _filled(lambda: nn.Linear(into, out, "bias" in tensors, device="meta"), tensors)
    still = "running_mean" in tensors and first.args[5] is False  # not training
    return _filled(_norm(first, tensors), tensors) if still else None


def _conv(kind: Any, node: fx.Node, tensors: dict[str, Any]) -> Callable[[], nn.Module]:
    weight = tensors["weight"]
    dims = weight.dim() - 2
    defaults: list[Any] = [[1], [0], [1], 1]
    given: list[Any] = list(node.args[3:])
    stride, padding, dilation, groups = given + defaults[len(given) :]

    def make() -> nn.Module:
        sizes = {
            name: tuple(value) if len(value) == dims else tuple(value) * dims
            for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
        }
        into, out = weight.shape[1] * groups, weight.shape[0]
        bias = "bias" in tensors
        layer: nn.Module = kind(into, out, tuple(weight.shape[2:]), groups=groups, bias=bias, device="meta", **sizes)
        return layer

    return make


def _norm(node: fx.Node, tensors: dict[str, Any]) -> Callable[[], nn.Module]:
    value = node.meta.get("val")
    kind: Any = _NORM_OF_DIMS[value.dim() if value is not None else 4]
    channels = len(tensors["running_mean"])
    eps: Any = node.args[7]
    return lambda: kind(channels, eps=eps, affine="weight" in tensors, device="meta")


def _filled(make: Callable[[], nn.Module], tensors: dict[str, Any]) -> nn.Module:
    """A layer in evaluation mode that holds these very tensors."""
    layer = make()
    for name, tensor in tensors.items():
        if name in layer._buffers:
            layer._buffers[name] = tensor
        else:
            layer._parameters[name] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            )
    if "num_batches_tracked" in layer._buffers and "num_batches_tracked" not in tensors:
        layer._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    return layer.eval()
