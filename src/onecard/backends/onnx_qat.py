"""A graph trained for INT8 in the form that ONNX Runtime fuses: int32 biases, and 8 bits between all convolutions.

PyTorch's quantiser for x86 leaves biases in floats, and so the answers of convolutions that are added to something.
ONNX Runtime has 8-bit kernels only where every input and the answer pass through a pair of QuantizeLinear and
DequantizeLinear (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from onecard.backends.onnx_graph import constants_of, pool_spatial_means

if TYPE_CHECKING:
    import onnx

Range = tuple[float, float]
Measure = Callable[[set[str]], dict[str, Range]]
"""Operator types to the ranges of the values that they read and give, over calibration rows."""

_JOINTS = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
_FUSED = {"Relu", "Clip"}
_BIAS = 2  # its place among the inputs of Conv and Gemm
_LEVELS = 255


def complete(model: onnx.ModelProto, measure: Measure | None) -> None:
    """Quantise what training left in floats between 8-bit layers.

    Args:
        model: with pairs of QuantizeLinear and DequantizeLinear; changed in place.
        measure: finds the ranges of the values that lack a scale; without it these stay floats.
    """
    pool_spatial_means(model)
    _quantise_biases(model)
    _read_from_pairs(model)
    if measure is None:
        return
    lacking = _lacking(model)
    ranges = measure({"Conv", "ReduceMean", *_JOINTS, *_FUSED}) if lacking else {}
    for value in lacking:
        if value in ranges:
            _insert_pair(model, value, *ranges[value])


def _quantise_biases(model: onnx.ModelProto) -> None:
    """Store float biases as int32 with the scale ``scale of the input x scale of the weight`` and no zero point."""
    import onnx

    constants = constants_of(model)
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in [n for n in model.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > _BIAS]:
        pairs = [made.get(name) for name in node.input[:_BIAS]]
        scales = [constants.get(pair.input[1]) if pair is not None else None for pair in pairs]
        if node.input[_BIAS] not in constants or any(scale is None for scale in scales):
            continue
        scale = onnx.numpy_helper.to_array(scales[0]) * onnx.numpy_helper.to_array(scales[1])
        bias = onnx.numpy_helper.to_array(constants[node.input[_BIAS]])
        if bias.dtype != np.float32 or bias.ndim != 1 or scale.size not in (1, bias.size):
            continue
        limits = np.iinfo(np.int32)
        whole = np.clip(np.rint(bias.astype(np.float64) / scale), limits.min, limits.max).astype(np.int32)
        name = f"{node.output[0]}_bias"
        zero_point = np.zeros_like(scale, dtype=np.int32)
        parts = {f"{name}_quantized": whole, f"{name}_scale": scale, f"{name}_zero_point": zero_point}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(value, key) for key, value in parts.items())
        pair = onnx.helper.make_node("DequantizeLinear", list(parts), [name], **({"axis": 0} if scale.ndim else {}))
        _insert_before(model, node, [pair])
        node.input[_BIAS] = name


def _read_from_pairs(model: onnx.ModelProto) -> None:
    """Where a value is quantised for one reader, let all others that compute in 8 bits read the same pair."""
    readers = _readers(model)
    for quantizer in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:
        pair = next((n for n in readers.get(quantizer.output[0], ()) if n.op_type == "DequantizeLinear"), None)
        others = [n for n in readers[quantizer.input[0]] if n.op_type in _JOINTS]
        if pair is None or not others:
            continue
        for node in others:
            _replace(node.input, quantizer.input[0], pair.output[0])
        both = [quantizer, pair]
        for node in both:
            model.graph.node.remove(node)
        made_by = next((n for n in model.graph.node if quantizer.input[0] in n.output), None)
        place = list(model.graph.node).index(made_by) + 1 if made_by is not None else 0
        for offset, node in enumerate(both):
            model.graph.node.insert(place + offset, node)


def _lacking(model: onnx.ModelProto) -> list[str]:
    """The values that no pair follows though what makes them reads 8 bits only."""
    readers, constants = _readers(model), constants_of(model)
    eight_bit: set[str] = set()
    found: list[str] = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            eight_bit.add(node.output[0])
        moving = [name for name in node.input if name and name not in constants]
        if node.op_type not in ("Conv", *_JOINTS) or not moving or not eight_bit.issuperset(moving):
            continue
        value = node.output[0]
        after = readers.get(value, [])
        if len(after) == 1 and after[0].op_type in _FUSED:
            value = after[0].output[0]
            after = readers.get(value, [])
        last = not after and node.op_type != "Conv"
        if not last and not any(reader.op_type == "QuantizeLinear" for reader in after):
            found.append(value)
            eight_bit.add(value)  # its readers will read the pair
    return found


def _insert_pair(model: onnx.ModelProto, value: str, low: float, high: float) -> None:
    """Let all readers of a value read it through a pair of u8 whose range holds zero; an output keeps its name."""
    import onnx

    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, 1e-8) / _LEVELS)
    zero_point = np.uint8(np.clip(np.rint(-low / scale), 0, _LEVELS))
    parts = {f"{value}_scale": np.array(scale), f"{value}_zero_point": np.array(zero_point)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(part, name) for name, part in parts.items())
    maker = next(node for node in model.graph.node if value in node.output)
    source, answer = value, f"{value}_pair"
    if any(value == output.name for output in model.graph.output):
        source, answer = f"{value}_float", value
        _replace(maker.output, value, source)
    else:
        for node in model.graph.node:
            _replace(node.input, value, answer)
    whole = f"{value}_quantized"
    pair = [
        onnx.helper.make_node("QuantizeLinear", [source, *parts], [whole]),
        onnx.helper.make_node("DequantizeLinear", [whole, *parts], [answer]),
    ]
    place = list(model.graph.node).index(maker) + 1
    for offset, node in enumerate(pair):
        model.graph.node.insert(place + offset, node)


def _readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _replace(names: Any, old: str, new: str) -> None:
    for place, name in enumerate(names):
        if name == old:
            names[place] = new


def _insert_before(model: onnx.ModelProto, node: onnx.NodeProto, made: Iterable[onnx.NodeProto]) -> None:
    place = list(model.graph.node).index(node)
    for offset, new in enumerate(made):
        model.graph.node.insert(place + offset, new)
