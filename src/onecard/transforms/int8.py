"""INT8 weights and activations, with scales from calibration (static) or from each input (dynamic).

On a CPU the model is exported, annotated for oneDNN's int8 kernels, calibrated and converted to a graph of
quantise and dequantise operators (torchao's "pt2e" flow), which a compiler then fuses into those kernels. On a GPU
the layers are replaced, see ``onecard.transforms.int8_linear``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from onecard.calibration.bench import NO_ROWS_CURE, Bench, Run
from onecard.calibration.sensitivity import quantisable_layers, rank_layers
from onecard.calibration.settle import settle
from onecard.errors import MissingDependencyError, Unsupported
from onecard.models.exported import export_flat
from onecard.models.flat import FlatModule, by_name, positional
from onecard.quiet import TORCHAO, muted
from onecard.transforms.observers import METHODS, observer

_aten = torch.ops.aten
_STATIC = (_aten.conv1d.default, _aten.conv2d.default, _aten.linear.default)
_DYNAMIC = (_aten.linear.default,)
_SOURCES = {
    "aten.conv1d": nn.Conv1d,
    "aten.conv2d": nn.Conv2d,
    "aten.linear": nn.Linear,
    "aten.batch_norm": nn.BatchNorm2d,
    "aten.relu": nn.ReLU,
    "aten.relu6": nn.ReLU6,
    "aten.hardtanh": nn.Hardtanh,
    "aten.hardswish": nn.Hardswish,
    "aten.silu": nn.SiLU,
    "aten.leaky_relu": nn.LeakyReLU,
    "aten.tanh": nn.Tanh,
    "aten.gelu": nn.GELU,
}
"""Operators with a kernel of their own, or that a kernel can compute on its way out; in place (``_``) or not."""
_KEPT = "onecard:kept"  # the scope that kept operators are put in; no module can have such a name
_WEIGHT = 1  # argument of a convolution or linear operator


def static_int8(module: FlatModule, bench: Bench) -> FlatModule:
    """Convolutions and linear layers in INT8, activations with fixed scales (Jacob et al. 2018).

    Weights have one symmetric scale for each output channel, activations one affine scale for each tensor. Batch
    norms behind convolutions are folded.

    Args:
        module: in evaluation mode on the bench's device.
        bench: calibration rows, and the judge that settles how ranges are chosen and which layers are kept.

    Returns:
        On a CPU a flat module around a graph of quantise and dequantise operators.

    Raises:
        Unsupported: no calibration rows, nothing to quantise, or a model that cannot be exported for all sizes.
        MissingDependencyError: torchao is not installed.
    """
    if not bench.device.startswith("cpu"):
        from onecard.transforms.int8_linear import static_int8_linear

        on_gpu: Callable[[FlatModule, Bench], FlatModule] = static_int8_linear
        return on_gpu(module, bench)
    return _quantise("int8", METHODS, module, bench)


def dynamic_int8(module: FlatModule, bench: Bench) -> FlatModule:
    """Linear layers in INT8, activations with a scale from each call's own values; needs no calibration rows.

    Args and Returns: see :func:`static_int8`.

    Raises:
        Unsupported: nothing to quantise, or a model that cannot be exported for all sizes.
        MissingDependencyError: torchao is not installed.
    """
    if not bench.device.startswith("cpu"):
        from onecard.transforms.int8_linear import dynamic_int8_linear

        on_gpu: Callable[[FlatModule, Bench], FlatModule] = dynamic_int8_linear
        return on_gpu(module, bench)
    return _quantise("int8_dynamic", ("",), module, bench)


def _quantise(scheme: str, methods: tuple[str, ...], module: FlatModule, bench: Bench) -> FlatModule:
    """Export once, settle, and build what was settled on."""
    if methods != ("",) and next(bench.batches(), None) is None:
        raise Unsupported(f"the calibration rows do not fill one batch of {bench.smallest_batch}", NO_ROWS_CURE)
    _require_torchao()
    program, _, notes = export_flat(module, bench.spec)
    if notes:
        raise Unsupported(f"INT8 needs a graph for every size: {notes[0]}")
    names = _quantised(program, module, _DYNAMIC if methods == ("",) else _STATIC)

    def convert(method: str, kept: tuple[str, ...]) -> FlatModule:
        weights = {weight for weight, layer in names.items() if layer in kept}
        graph = _convert(_graph_of(program), method, weights, bench)
        return FlatModule(graph, _plan(module)).eval()

    def make(method: str, kept: tuple[str, ...]) -> Run:
        return partial(by_name, convert(method, kept), bench.spec)

    layers = tuple(dict.fromkeys(layer for layer in names.values() if layer))
    found = settle(scheme, layers, methods, make, bench, rank=lambda: rank_layers(module, bench, layers))
    if set(found.kept) >= set(layers):
        raise Unsupported(f"{scheme} is within the tolerance only where no layer is quantised")
    return convert(found.method, found.kept)


def _quantised(program: ExportedProgram, module: FlatModule, operators: tuple[Any, ...]) -> dict[str, str]:
    """The weight of every operator that will be quantised, and the layer it belongs to.

    The projection of queries, keys and values in ``nn.MultiheadAttention`` is no layer of its own; it is kept
    whenever the layer behind the attention is.
    """
    layers = {f"inner.{name}.weight": name for name in quantisable_layers(module)}
    inner = {w.removesuffix("out_proj.weight") + "in_proj_weight": n for w, n in layers.items()}
    # A weight that is shared, as with an embedding, goes by one of its names only: not by the layer's, maybe.
    owners = {id(module.get_parameter(weight)): name for weight, name in layers.items()}
    known = {w: owners[id(t)] for w, t in module.named_parameters(remove_duplicate=False) if id(t) in owners}
    graph = program.module(check_guards=False).graph
    weights = [_weight_of(n) for n in graph.nodes if n.op == "call_function" and n.target in operators]
    return {weight: (inner | known).get(weight, "") for weight in weights if weight}


def _weight_of(node: fx.Node) -> str:
    weight = node.args[_WEIGHT]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""


def _convert(graph: fx.GraphModule, method: str, kept: set[str], bench: Bench) -> fx.GraphModule:
    """Annotate, calibrate and convert a fresh graph."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    for node in list(graph.graph.nodes):
        if node.op == "call_function":
            _prepare(node, keep=_weight_of(node) in {*kept, ""} if node.target in _STATIC else True)
    with muted(*TORCHAO), torch.inference_mode(False), torch.no_grad():
        prepared = prepare_pt2e(graph, _quantizer(method))
        # Dynamic scales need one run too, for the weights are observed in it.
        for batch in bench.batches() if method else (bench.inputs,):
            prepared(*(batch[t.name].clone() for t in bench.spec.inputs))
        converted = convert_pt2e(prepared)
    # What convert returns refuses eval(); the same graph in a module of its own does not.
    return fx.GraphModule(converted, converted.graph).eval()


def _prepare(node: fx.Node, keep: bool) -> None:
    """Tell the annotator what an operator is, and bring its input into the order that the int8 kernels read."""
    node.meta["source_fn_stack"] = [(node.name, _source(node))]
    if keep and node.target in _STATIC:
        node.meta["nn_module_stack"] = {**node.meta.get("nn_module_stack", {}), _KEPT: (_KEPT, "")}
    elif node.target == _aten.linear.default:
        given: Any = node.args[0]
        if given.meta["val"].is_contiguous():
            return
        with node.graph.inserting_before(node):
            ordered = node.graph.call_function(_aten.contiguous.default, (given,))
        ordered.meta = {**given.meta, "source_fn_stack": [(ordered.name, ordered.target)]}
        ordered.meta["val"] = given.meta["val"].contiguous()
        node.update_arg(0, ordered)


def _source(node: fx.Node) -> Any:
    """What the annotator shall take an operator for.

    Left to itself it goes by the module or function that the operator was traced from: it overlooks attention's
    projections and, before torch 2.13, everything; it fails over a layer that is called twice, and over ``conv + 1``.
    """
    if node.target in (_aten.add.Tensor, _aten.add_.Tensor):
        terms = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in node.args]
        shapes = [t.shape for t in terms if isinstance(t, Tensor) and t.is_floating_point()]
        return operator.add if len(shapes) == len(terms) and shapes[0] == shapes[-1] else node.target
    return _SOURCES.get(str(node.target).removesuffix(".default").removesuffix("_"), node.target)


def _quantizer(method: str) -> Any:
    """The annotator for oneDNN's kernels; an empty method means dynamic scales."""
    from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    # Without VNNI two products are summed in 16 bits, which eight bits times eight would overflow.
    narrow = not torch.cpu._is_vnni_supported()
    default = x86.get_default_x86_inductor_quantization_config(is_dynamic=not method, reduce_range=narrow)
    # The default smallest scale of 2^-12 is coarser than many a trained weight needs.
    eps = torch.finfo(torch.float32).eps
    weight = dataclasses.replace(default.weight, observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=eps))
    quantizer = x86.X86InductorQuantizer().set_module_name_qconfig(_KEPT, None)
    if not method:
        config = dataclasses.replace(default, weight=weight)
        return quantizer.set_function_type_qconfig(torch.nn.functional.linear, config)
    activation = dataclasses.replace(
        default.input_activation, observer_or_fake_quant_ctr=observer(method).with_args(eps=eps)
    )
    config = dataclasses.replace(default, input_activation=activation, output_activation=activation, weight=weight)
    # Products of two activations gain nothing from int8 and are no layer that could be kept.
    return quantizer.set_function_type_qconfig(torch.mul, None).set_global(config)


def _graph_of(program: ExportedProgram) -> fx.GraphModule:
    """A fresh graph of plain operators: tensors in by position, a tuple of tensors out."""
    module: Any = program.module(check_guards=False)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.eliminate_dead_code()  # a layer whose answer nobody reads trips the quantizer's pattern search
    return fx.GraphModule(module, module.graph)


def _plan(module: FlatModule) -> Any:
    plan = positional(module.plan.inputs)
    return type(plan)(plan.inputs, plan.args, plan.kwargs, module.plan.outputs)


def _require_torchao() -> None:
    try:
        with muted(*TORCHAO):
            import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("INT8 on a CPU needs torchao.", "pip install 'onecard[quantize]'") from error
