"""The layers of an OpenVINO model: its nodes with weights, under the names that the torch module gives them.

Conversion keeps no module paths, and folding a batch norm renames the convolution before it. So a layer is known by
its weight: whatever was folded into it has scaled whole rows, which leaves their directions as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from onecard.calibration.sensitivity import quantisable_layers
from onecard.models.flat import FlatModule

_CONVOLUTIONS = {"Convolution", "GroupConvolution"}
_TRANSPOSED = {"ConvolutionBackpropData", "GroupConvolutionBackpropData"}
_PASSING = {"Convert", "Reshape", "Transpose", "Unsqueeze", "FakeQuantize", "Multiply", "Subtract"}
"""What may stand between a node and its constant weight."""
_CLOSE = 1e-3  # of projections of unit rows: fp32 rounding is far below it, another layer's rows far above


@dataclass(frozen=True)
class LayerNode:
    """A convolution or a product with a constant weight.

    Args:
        name: the node's friendly name.
        is_convolution: or else it is a matrix product.
        fan_in: input channels of a matrix product, 0 for a convolution.
        weight: float32 ``[out, in]``, or None where it cannot be read as that.
    """

    name: str
    is_convolution: bool
    fan_in: int
    weight: Any


def layer_nodes(model: Any) -> list[LayerNode]:
    """All nodes with weights, in topological order.

    Args:
        model: an ``openvino.Model``.
    """
    found = (_layer_node(op) for op in model.get_ordered_ops())
    return [node for node in found if node is not None]


def name_layers(nodes: list[LayerNode], module: FlatModule) -> dict[str, tuple[str, ...]]:
    """The nodes of each layer.

    Args:
        nodes: of the converted model.
        module: what was converted.

    Returns:
        Layer to its nodes' names. The torch layers that were recognised come first, as ``named_modules`` of the
        inner module names them (a layer that is called twice may have two nodes); then, under their own names, the
        nodes that belong to none.
    """
    prints = {node.name: _print(node.weight) for node in nodes if node.weight is not None}
    names: dict[str, tuple[str, ...]] = {}
    for layer in quantisable_layers(module):
        mark = _print(_matrix(module.inner.get_submodule(layer)))
        own = tuple(name for name, other in prints.items() if _same(mark, other))
        if own:
            names[layer] = own
    known = {node for own in names.values() for node in own}
    return {**names, **{node.name: (node.name,) for node in nodes if node.name not in known}}


def has_attention(model: Any) -> bool:
    """True where two activations are multiplied as matrices."""
    return any(
        op.get_type_name() == "ScaledDotProductAttention"
        or (op.get_type_name() == "MatMul" and not any(_constant(op, port)[0] for port in (0, 1)))
        for op in model.get_ordered_ops()
    )


def _layer_node(op: Any) -> LayerNode | None:
    kind, name = op.get_type_name(), op.get_friendly_name()
    if kind in _CONVOLUTIONS or kind in _TRANSPOSED:
        constant, plain = _constant(op, 1)
        if constant is None:
            return None
        rows = 2 if kind == "GroupConvolution" else 1  # [G, out/G, in/G, ...] or [out, in, ...]
        data = constant.data if plain and kind in _CONVOLUTIONS else None
        weight = None if data is None else data.reshape(int(np.prod(data.shape[:rows])), -1).astype(np.float32)
        return LayerNode(name, True, 0, weight)
    if kind != "MatMul":
        return None
    for port, flag in ((1, "transpose_b"), (0, "transpose_a")):
        constant, plain = _constant(op, port)
        if constant is not None:
            out_first = op.get_attributes()[flag] == (port == 1)
            return _product(name, op.input_value(port).get_partial_shape(), constant if plain else None, out_first)
    return None


def _product(name: str, shape: Any, constant: Any, out_first: bool) -> LayerNode:
    axis = -1 if out_first else -2
    fan_in = shape[len(shape) + axis].get_length() if len(shape) > 1 else shape[0].get_length()
    weight = None
    if constant is not None and constant.data.ndim > 1 and constant.data.size == np.prod(constant.data.shape[-2:]):
        matrix = constant.data.reshape(constant.data.shape[-2:]).astype(np.float32)
        weight = matrix if out_first else matrix.T
    return LayerNode(name, False, fan_in, weight)


def _constant(op: Any, port: int) -> tuple[Any, bool]:
    """The constant behind an input, or None, and whether it is the weight as it stands."""
    node, plain = op.input_value(port).get_node(), True
    while node.get_type_name() in _PASSING:
        plain = plain and node.get_type_name() == "Convert"
        node = node.input_value(0).get_node()
    return (node if node.get_type_name() == "Constant" else None), plain


def _matrix(layer: nn.Module) -> Any:
    """A layer's weight as ``[out, in]``."""
    weight = layer.get_parameter("weight").detach().cpu().float().numpy()
    is_transposed = weight.ndim == 2 and not isinstance(layer, nn.Linear)  # noqa: PLR2004 - transformers' Conv1D
    return weight.T if is_transposed else weight.reshape(weight.shape[0], -1)


def _print(matrix: Any) -> Any:
    """``[out, in]`` to ``[out]``: a random projection of each row's direction, NaN where the row is zero."""
    norm = np.linalg.norm(matrix, axis=1)
    probe = np.random.default_rng(0).standard_normal(matrix.shape[1]).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(matrix @ probe / norm)


def _same(one: Any, other: Any) -> bool:
    if one.shape != other.shape:
        return False
    apart = np.abs(one - other)
    known = np.isfinite(apart)  # a channel that folding has set to zero has no direction
    return bool(known.any() and apart[known].max() <= _CLOSE)
