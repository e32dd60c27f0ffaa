"""Elementwise operators respelled, so that the kernels generated for them keep up with the card's memory.

Written as libraries have them, these take longer to compute than their tensors take to read and write:

- GELU's tanh form, of which ``0.5 * (1 + tanh(z))`` is ``sigmoid(2 * z)``: a quarter of the time on a CPU.
- GELU itself, in half precision on a card. ``erf`` is some thirty instructions an element, ``x * sigmoid(x * p(x**2))``
  with a fitted polynomial a dozen; its error, 3e-6 at most, is far below what rounding to fp16 or bf16 does. (A CPU's
  vectorised ``erf`` is the faster one there.)
- Saturation before a cast to e4m3. The card's conversion saturates by itself (PTX has ``cvt.rn.satfinite`` only),
  while PyTorch's own gives NaN; a clamp that keeps NaN costs as much as the rest of such a kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_CASTS = (_ATEN.to.dtype, _ATEN._to_copy.default)
_HALF = (torch.float16, torch.bfloat16)
_FP8, _LARGEST = torch.float8_e4m3fn, 448.0

_TANH = (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)
_ERF = (1.59565627, 7.29375818e-2, -2.49723184e-4, -6.11620310e-5, 2.23816548e-6)
"""``log(Phi(x) / Phi(-x)) / x`` as a polynomial of ``x**2``, fitted so that the largest error of GELU is least."""


def respell_pointwise(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Respell GELU, and on a card saturating casts to e4m3.

    Args:
        graph_module: of ``torch.export``, not decomposed yet; changed in place.

    Returns:
        The same module.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        coefficients = _sigmoid_coefficients(node, value)
        if coefficients:
            node.replace_all_uses_with(_sigmoid_gelu(graph, node, coefficients))
        elif node.target in _CASTS and value.dtype == _FP8 and value.is_cuda and _saturates(node.args[0]):
            node.update_arg(0, node.args[0].args[0])
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _sigmoid_coefficients(node: fx.Node, value: Tensor) -> tuple[float, ...]:
    """The polynomial of a GELU that is worth respelling; empty where there is none."""
    if node.target is not _ATEN.gelu.default or value.dtype not in (torch.float32, *_HALF):
        return ()
    if node.kwargs.get("approximate", "none") == "tanh":
        return _TANH
    return _ERF if value.is_cuda and value.dtype in _HALF else ()


def _sigmoid_gelu(graph: fx.Graph, gelu: fx.Node, coefficients: tuple[float, ...]) -> fx.Node:
    """``x * sigmoid(x * (c0 + c1 * x**2 + c2 * x**4 ...))`` in fp32, rounded to the dtype of ``x``."""
    first, *others = reversed(coefficients)

    def put(operator: Any, *args: Any) -> fx.Node:
        node = graph.call_function(operator, args)
        node.meta["val"] = operator(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return node

    with graph.inserting_before(gelu):
        x = put(_ATEN.to.dtype, gelu.args[0], torch.float32)
        square = put(_ATEN.mul.Tensor, x, x)
        factor = put(_ATEN.mul.Scalar, square, first)
        for coefficient in others[:-1]:
            factor = put(_ATEN.mul.Tensor, put(_ATEN.add.Scalar, factor, coefficient), square)
        factor = put(_ATEN.add.Scalar, factor, others[-1])
        share = put(_ATEN.sigmoid.default, put(_ATEN.mul.Tensor, x, factor))
        return put(_ATEN.to.dtype, put(_ATEN.mul.Tensor, x, share), gelu.meta["val"].dtype)


def _saturates(node: Any) -> bool:
    """Whether a node clamps to e4m3's range, in a dtype from which the card's conversion saturates."""
    if not isinstance(node, fx.Node) or node.target is not _ATEN.clamp.default:
        return False
    bounds = (*node.args[1:], *node.kwargs.values())
    return bounds == (-_LARGEST, _LARGEST) and node.meta["val"].dtype == torch.float32
