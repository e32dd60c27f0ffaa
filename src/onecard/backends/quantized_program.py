"""A program that quantises and dequantises (pt2e's form), rewritten so that OpenVINO's converter reads it rightly.

The converter makes a FakeQuantize of each pair of ``quantized_decomposed`` operators, but takes a weight that is
int8 already for its codes alone, without their scale. So such a weight becomes float again, followed by the pair.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from onecard.backends.base import Target, Tensors
from onecard.backends.export import export_program
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional

_PREFIX = "quantized_decomposed."
_KNOWN = {"quantize_per_tensor", "quantize_per_channel"}


def float_weights(program: ExportedProgram, inputs: Tensors, target: Target) -> ExportedProgram:
    """The same program with float weights; itself where it has no quantised ones.

    Args:
        program: takes the spec's inputs by position.
        inputs: example inputs by name.
        target: as for :func:`onecard.backends.export.export_program`.

    Raises:
        Unsupported: it quantises in a way that OpenVINO does not know.
    """
    if not any(str(node.target).startswith(_PREFIX) for node in program.graph.nodes):
        return program
    module: Any = program.module()
    for node in list(module.graph.nodes):
        if str(node.target).startswith(_PREFIX):
            _pair(node)
            if "dequantize" in str(node.target) and node.args[0].op == "get_attr":
                _float_weight(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()
    names = tuple(t.name for t in target.spec.inputs)
    return export_program(FlatModule(module, positional(names)), inputs, target)


def _pair(node: fx.Node) -> str:
    """The quantising operator that belongs to one of either kind."""
    name, _, overload = str(node.target).removeprefix(_PREFIX).removeprefix("de").partition(".")
    if name not in _KNOWN or overload != "default":
        raise Unsupported(f"OpenVINO knows no {node.target}: only scales that are known in advance")
    return name


def _float_weight(module: Any, node: fx.Node) -> None:
    codes, *scales = node.args
    assert isinstance(codes, fx.Node)
    values = [_value(module, argument) for argument in node.args]
    name = f"float_{node.name}"
    module.register_buffer(name, node.target(*values, **node.kwargs))  # type: ignore[operator]
    with module.graph.inserting_before(node):
        weight = module.graph.get_attr(name)
        quantize = getattr(torch.ops.quantized_decomposed, _pair(node)).default
        quantized = module.graph.call_function(quantize, (weight, *scales))
    node.replace_input_with(codes, quantized)


def _value(module: Any, argument: Any) -> Any:
    return operator.attrgetter(str(argument.target))(module) if isinstance(argument, fx.Node) else argument
