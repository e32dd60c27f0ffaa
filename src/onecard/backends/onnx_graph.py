"""Reading and editing ONNX graphs for quantisation: layers, the region that pays in 8 bits, sizes, thin constants.

Graphs are ``onnx.ModelProto``; :func:`name_nodes` alone works on the exporter's own representation.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onecard.models.flat import FlatModule
from onecard.spec import Bucket, Spec

if TYPE_CHECKING:
    import onnx

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Above this the weights go into a file of their own: one protobuf message holds at most 2 GiB."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHTED = ("Conv", "Gemm", "MatMul")
_MATRIX = 2
_IMAGE = 4  # [B, C, H, W]
_UNKNOWN = np.ones(1)
_ZERO_POINT = 2  # its place among the inputs of DequantizeLinear: value, scale, zero point

_CARRIERS = {
    *("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize"),
}
"""What ONNX Runtime computes on 8-bit values on a CPU, so that nothing is widened between two convolutions."""

_ENDS = {"Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"}
"""Carriers worth it even where a float follows: they are fused away, or leave less to widen."""


def name_nodes(graph: Any, module: FlatModule) -> None:
    """Name each node ``LAYER/OPERATOR_N`` after the module that it came from, and forget all other metadata.

    The metadata holds stack traces with the paths of the author's machine. A layer's name is that of
    ``module.inner.named_modules()``.

    Args:
        graph: of ``torch.onnx.ONNXProgram.model``.
        module: what was exported.
    """
    owners = {n.rpartition(".")[0] for n, p in module.named_parameters() if p.dim() >= _MATRIX}
    known = {name for name, _ in module.named_modules()}
    for index, node in enumerate(graph.all_nodes()):
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        scope = next((s for s in reversed(scopes[:-1]) if s in known), "")
        layer = _layer(scope, [v.name for v in node.inputs if v is not None], owners)
        node.name = f"{layer.removeprefix('inner').removeprefix('.')}/{node.op_type}_{index}"
        node.metadata_props.clear()


def _layer(scope: str, inputs: Iterable[str | None], owners: Collection[str]) -> str:
    """The module whose weight a node uses; a folded batch norm leaves its own scope on the convolution.

    Where modules share a weight the tensor bears the first one's name, so the scope goes before it.
    """
    used = [(name or "").rpartition(".")[0] for name in inputs]
    below = (o for o in used if o in owners and (o.startswith(scope) or scope not in owners))
    return next(below, scope)


def constants_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initialisers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def weighted_nodes(
    model: onnx.ModelProto, operators: Collection[str], layer_of: Callable[[str], str]
) -> dict[str, tuple[str, ...]]:
    """The nodes that multiply by a constant float32 matrix or kernel, under the name of their layer.

    Args:
        model: every node has a name.
        operators: which of ``Conv``, ``Gemm`` and ``MatMul``.
        layer_of: a node's name to its layer's.
    """
    import onnx

    constants = constants_of(model)
    found: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        weight = constants.get(node.input[1]) if node.op_type in _WEIGHTED and node.op_type in operators else None
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT or len(weight.dims) < _MATRIX:
            continue
        if node.op_type == "MatMul" and len(weight.dims) > _MATRIX:
            continue  # a batch of matrices has no 8-bit kernel with a scale for each column
        layer = layer_of(node.name)
        found[layer] = (*found.get(layer, ()), node.name)
    return found


def eight_bit_region(model: onnx.ModelProto, roots: Collection[str]) -> list[str]:
    """The nodes to quantise: the roots, and between convolutions whatever can stay in 8 bits.

    A carrier is taken where all it reads is in 8 bits already and a root reads its answer; the tail of a
    detector (boxes decoded from the last convolution) so stays in floats, which it needs.

    Args:
        model: in topological order.
        roots: names of the weighted nodes to quantise.
    """
    constants = constants_of(model)
    floats = _float_values(model)
    eight_bit: set[str] = set()  # values that are there in 8 bits
    taken: list[onnx.NodeProto] = []
    for node in model.graph.node:
        moving = [name for name in node.input if name in floats and name not in constants]
        if node.name in roots:
            taken.append(node)
            # The matrix products answer in floats: theirs is the last word or goes to a norm.
            eight_bit.update(node.output if node.op_type == "Conv" else ())
        elif node.op_type in _CARRIERS and moving and eight_bit.issuperset(moving):
            taken.append(node)
            eight_bit.update(node.output)
    wanted: set[str] = set()  # values that a root reads, if through carriers
    kept: list[str] = []
    for node in reversed(taken):
        if node.name in roots or node.op_type in _ENDS or not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            kept.append(node.name)
    return kept[::-1]


def read_floats(model: onnx.ModelProto, region: Collection[str]) -> None:
    """Let float nodes read a float value itself, which the quantiser has them read through the pair made for others.

    Args:
        model: quantised.
        region: the nodes that were quantised; only convolutions and what carries between them give 8 bits.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    sources: dict[str, str] = {}  # answer of a pair: what went in
    for pair in [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in makers]:
        source = makers[pair.input[0]].input[0]
        maker = makers.get(source)
        if maker is None or maker.name not in region or maker.op_type in ("MatMul", "Gemm"):
            sources[pair.output[0]] = source
    for node in model.graph.node:
        if node.name not in region:
            for place, name in enumerate(node.input):
                node.input[place] = sources.get(name, name)


def _float_values(model: onnx.ModelProto) -> set[str]:
    import onnx

    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    known = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return known | {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}


def pool_spatial_means(model: onnx.ModelProto) -> None:
    """Write the mean over an image's height and width as a pooling, for which there is an 8-bit kernel."""
    import onnx

    constants = constants_of(model)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}
    index = 0
    while index < len(model.graph.node):
        node = model.graph.node[index]
        if node.op_type == "ReduceMean" and ranks.get(node.input[0]) == _IMAGE and _axes(node, constants) == {2, 3}:
            flat = next((a.i for a in node.attribute if a.name == "keepdims"), 1) == 0
            pooled = f"{node.output[0]}_pooled" if flat else node.output[0]
            pool = onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], f"{node.name}_pool")
            new = [pool, onnx.helper.make_node("Flatten", [pooled], [node.output[0]], node.name)] if flat else [pool]
            if flat:
                model.graph.value_info.append(onnx.helper.make_tensor_value_info(pooled, onnx.TensorProto.FLOAT, None))
            del model.graph.node[index]
            for offset, made in enumerate(new):
                model.graph.node.insert(index + offset, made)
        index += 1
    drop_unused(model)


def _axes(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> set[int]:
    """The axes of a reduction of a rank-4 value, counted from the front; empty if they are not constant."""
    import onnx

    given = next((list(a.ints) for a in node.attribute if a.name == "axes"), [])
    if len(node.input) > 1 and node.input[1] in constants:
        given = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
    return {axis % _IMAGE for axis in given}


def thin(model: onnx.ModelProto) -> None:
    """Drop what a quantised file carries for nothing: constants that are there twice or follow from others, names.

    The scale of a convolution's bias is the product of two scales that are there, and its zero points are zero
    (ONNX, QLinearConv); the session folds the product when it is made.
    """
    constants = constants_of(model)
    same = _same(constants)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
    _thin_convolutions(model, constants)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.ClearField("name")
    drop_unused(model)
    _shorten(model)
    if any(node.op_type == "Conv" for node in model.graph.node):
        del model.graph.value_info[:]  # only what is fused around layer norms needs to know shapes beforehand
    del model.metadata_props[:]


def _same(constants: Mapping[str, onnx.TensorProto]) -> dict[str, str]:
    """Every constant's name to that of the first one with the same content."""
    import onnx

    first: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    for name, tensor in constants.items():
        content = hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).digest()
        same[name] = first.setdefault((tensor.data_type, tuple(tensor.dims), content), name)
    return same


def _thin_convolutions(model: onnx.ModelProto, constants: Mapping[str, onnx.TensorProto]) -> None:
    import onnx

    arrays = {name: onnx.numpy_helper.to_array(t) for name, t in constants.items() if len(t.dims) < _MATRIX}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in [n for n in model.graph.node if n.op_type == "Conv"]:
        pairs = [made[name] for name in node.input if name in made]
        for pair in pairs[1:]:
            if len(pair.input) > _ZERO_POINT and not arrays.get(pair.input[_ZERO_POINT], _UNKNOWN).any():
                del pair.input[_ZERO_POINT]
        scales = [pair.input[1] for pair in pairs]
        if len(pairs) != 3 or not arrays.keys() >= set(scales):  # noqa: PLR2004 - input, weight, bias
            continue
        given, weight, bias = (arrays[name] for name in scales)
        if np.array_equal(given * weight, bias) and bias.size > 1:
            product = onnx.helper.make_node("Mul", scales[:2], [f"{node.input[2]}_s"])
            model.graph.node.insert(list(model.graph.node).index(pairs[2]), product)
            pairs[2].input[1] = product.output[0]


def drop_unused(model: onnx.ModelProto) -> None:
    """Drop the initialisers that nothing reads."""
    if _has_branches(model):
        return
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _shorten(model: onnx.ModelProto) -> None:
    """Number the constants; in a net of many small layers their names weigh more than their scales."""
    if _has_branches(model):
        return
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    short = {t.name: f"c{index}" for index, t in enumerate(model.graph.initializer) if f"c{index}" not in taken}
    kept = {value.name for value in model.graph.output}
    for tensor in model.graph.initializer:
        if tensor.name not in kept:
            tensor.name = short.get(tensor.name, tensor.name)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name not in kept:
                node.input[place] = short.get(name, name)


def _has_branches(model: onnx.ModelProto) -> bool:
    """Whether a node holds a graph of its own, which may read the outer graph's constants."""
    return any(a.HasField("g") for node in model.graph.node for a in node.attribute)


def fix_sizes(model: onnx.ModelProto, spec: Spec, bucket: Bucket) -> None:
    """Give the inputs of a graph with moving sizes those of one bucket; what follows from them is inferred on loading.

    Args:
        model: its inputs are the spec's, in order.
        spec: tells the shapes.
        bucket: a size for each symbol.
    """
    sizes: dict[str, int] = {}
    for value, tensor in zip(model.graph.input, spec.inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, tensor.concrete(bucket), strict=True):
            if dim.HasField("dim_param"):
                sizes[dim.dim_param] = size
            dim.dim_value = size
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param") and dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]
