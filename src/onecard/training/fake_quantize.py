"""Graphs that compute in fp32 what a quantised one would: prepared for training, calibrated, and converted.

Simulated quantisation with a straight-through gradient: Jacob et al. 2018 (https://arxiv.org/abs/1712.05877). Weights
have symmetric scales, per output channel or per tensor; activations one asymmetric 8-bit scale each, per tensor.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from onecard.errors import MissingDependencyError, ModelError, Unsupported
from onecard.inputs import make_inputs
from onecard.models.exported import export_flat
from onecard.models.flat import FlatModule, positional
from onecard.models.wording import first_line
from onecard.quiet import TORCHAO, muted
from onecard.spec import Spec
from onecard.transforms.fuse import fold_batch_norm

BITS = (8, 4)
_ACTIVATION_MOMENTUM = 0.01  # of the moving minimum and maximum, as in torch's own recipes
_WEIGHT_INDEX = 1
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AFTER_TRANSPOSED = 1  # a transposed convolution's output channels are its weight's second dimension


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised: in 8 or 4 bits, with one scale for each output channel or one for all."""

    bits: int = 8
    per_tensor: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest quantised weight."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1


def export_for_training(flat: FlatModule, spec: Spec, batch: int) -> ExportedProgram:
    """Export a copy of a model, batch normalisation folded into the layers before it.

    What cannot be folded keeps the statistics it has, and its scale and shift are trained. Folding before training
    gives the layers the very weights that are quantised in the end.

    Args:
        flat: the original in evaluation mode on the CPU.
        spec: of the model.
        batch: the training's rows a step; the program takes as many even where the spec allows fewer.

    Raises:
        ModelError: the model cannot be exported for all its sizes.
    """
    module = _folded(flat, spec)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        program, _, notes = export_flat(module, widened(spec, batch))
    except Unsupported as error:
        raise ModelError(f"the model cannot be exported for training: {error.detail}.") from error
    if notes:
        raise ModelError(
            f"the model cannot be trained: {notes[0]}.",
            "Give that dimension a fixed size in --input, for example 'image: float32[1,3,224,224]'.",
        )
    return program


def widened(spec: Spec, batch: int) -> Spec:
    """The spec with room for ``batch`` rows a step."""
    import msgspec

    symbol = spec.batch_symbol
    if symbol is None or batch in spec.symbols[symbol]:
        return spec
    known = spec.symbols[symbol]
    wide = msgspec.structs.replace(known, low=min(known.low, batch), high=max(known.high, batch))
    return msgspec.structs.replace(spec, symbols={**spec.symbols, symbol: wide})


def prepare(program: ExportedProgram, scheme: Scheme, device: str = "cpu") -> fx.GraphModule:
    """A graph with fake quantisation around every convolution and linear layer; inputs by position.

    Raises:
        MissingDependencyError: torchao is not installed.
        ModelError: there is no layer to quantise.
    """
    require_torchao()
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    graph = _graph_of(program, device)
    quantizer = _quantizer(scheme)
    with muted(*TORCHAO):
        quantizer.annotate(graph)
        _annotate_rest(graph, quantizer.global_config)
        try:
            prepared: fx.GraphModule = prepare_qat_pt2e(graph, quantizer)
        except Exception as error:  # torchao's passes raise what they like on graphs they do not know
            raise ModelError(f"the model cannot be prepared for quantisation: {first_line(error)}.") from error
    if not quantised_layers(prepared):
        raise ModelError("the model has no convolution or linear layer with weights to quantise.")
    return prepared.to(device)


def quantised_layers(prepared: fx.GraphModule) -> int:
    """How many layers have a quantised weight."""
    modules = dict(prepared.named_modules())
    weights = (n.args[_WEIGHT_INDEX] for n in prepared.graph.nodes if _is_layer(n))
    return sum(isinstance(w, fx.Node) and w.op == "call_module" and _is_fake(modules[str(w.target)]) for w in weights)


@torch.no_grad()
def calibrate(prepared: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> None:
    """Give every scale its start: the mean over the batches of the smallest and largest value.

    Quantisation is simulated only behind it, so that no layer is calibrated on the errors of another.

    Args:
        prepared: what :func:`prepare` gave.
        batches: inputs by position, on its device.
    """
    set_observing(prepared, True)
    _set_quantising(prepared, False)
    for index, batch in enumerate(batches):
        for fake in _activations(prepared):
            fake.activation_post_process.averaging_constant = 1.0 / (index + 1)
        prepared(*batch)
    for fake in _activations(prepared):
        fake.activation_post_process.averaging_constant = _ACTIVATION_MOMENTUM
    _set_quantising(prepared, True)


def set_observing(prepared: nn.Module, on: bool) -> None:
    """Let scales follow what passes through, or hold them."""
    for fake in _fakes(prepared):
        fake.enable_observer(on)


def convert(program: ExportedProgram, scheme: Scheme, trained: nn.Module, flat: FlatModule) -> FlatModule:
    """The quantised model on the CPU: integer weights, and quantise and dequantise operators between the layers.

    Args:
        program: what ``trained`` was prepared from.
        scheme: likewise.
        trained: prepared, calibrated and perhaps trained; it is not changed.
        flat: the original, for the names of inputs and outputs.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    twin = prepare(program, scheme)
    twin.load_state_dict({n: t.cpu() if isinstance(t, Tensor) else t for n, t in trained.state_dict().items()})
    twin.requires_grad_(False)
    with muted(*TORCHAO), torch.no_grad():
        graph = convert_pt2e(twin)
    plan = positional(flat.plan.inputs)
    # What convert returns refuses eval(); the same graph in a module of its own does not.
    inner = fx.GraphModule(graph, graph.graph).eval()
    return FlatModule(inner, type(plan)(plan.inputs, plan.args, plan.kwargs, flat.plan.outputs)).eval()


def require_torchao() -> None:
    """Import torchao without its remarks on kernels of other cards.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with muted(*TORCHAO):
            import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "quantisation-aware training needs torchao.", "pip install 'onecard[quantize]'"
        ) from error


class _Affine(nn.Module):
    """A batch norm in evaluation mode: the constant map that it is, with a scale and shift to train.

    Left as it is, a batch norm would have torchao search for training-mode patterns, for minutes and in vain.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        inverse = (norm.running_var + norm.eps).rsqrt()
        scale = inverse if norm.weight is None else norm.weight.detach() * inverse
        shift = -norm.running_mean * scale
        self.scale = nn.Parameter(scale)  # [C]
        self.shift = nn.Parameter(shift if norm.bias is None else shift + norm.bias.detach())  # [C]

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1 for _ in range(x.dim() - 2)))  # x: [B, C, ...]
        return x * self.scale.view(shape) + self.shift.view(shape)


def _folded(flat: FlatModule, spec: Spec) -> FlatModule:
    inputs = make_inputs(spec, spec.smallest())
    try:
        module = fold_batch_norm(copy.deepcopy(flat), inputs)
    except Unsupported:
        module = copy.deepcopy(flat)  # a fold that failed may be half done
    for name, child in list(module.named_modules()):
        if isinstance(child, _NORMS) and child.running_var is not None and not child.training:
            module.set_submodule(name, _Affine(child))
    return module


def _quantizer(scheme: Scheme) -> Any:
    """The annotator of torchao for the patterns that compilers fuse, with this scheme's fake quantisers."""
    from torchao.quantization.pt2e import (
        FakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    # Without VNNI two products are summed in 16 bits, which eight bits times eight would overflow.
    narrow = not torch.cpu._is_vnni_supported()
    default = x86.get_default_x86_inductor_quantization_config(is_qat=True, reduce_range=narrow)
    # The fused fake quantiser is faster, but its symmetric scales are not those that conversion computes: 7 % off
    # at 4 bits. The default smallest scale of 2^-12 is coarser than many a trained weight needs.
    eps = torch.finfo(torch.float32).eps
    low, high = scheme.limits
    weight = dataclasses.replace(
        default.weight,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if scheme.per_tensor else torch.per_channel_symmetric,
        ch_axis=None if scheme.per_tensor else 0,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver if scheme.per_tensor else MovingAveragePerChannelMinMaxObserver,
            averaging_constant=1.0,  # a weight's range is known, not estimated
            eps=eps,
        ),
    )
    activation = dataclasses.replace(
        default.input_activation,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, eps=eps),
    )
    config = dataclasses.replace(default, input_activation=activation, output_activation=activation, weight=weight)
    quantizer = x86.X86InductorQuantizer().set_function_type_qconfig(torch.mul, None)
    return quantizer.set_global(config)


def _annotate_rest(graph: fx.GraphModule, config: Any) -> None:
    """Annotate the layers that torchao's patterns miss: 1-d, 3-d and transposed convolutions, attention's inputs."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    key = "quantization_annotation"
    for node in graph.graph.nodes:
        if not _is_layer(node) or node.meta.get(key) is not None or not _is_weight(node.args[_WEIGHT_INDEX]):
            continue
        weight = config.weight
        if weight.ch_axis is not None and "transpose" in str(node.target):
            weight = dataclasses.replace(weight, ch_axis=_AFTER_TRANSPOSED)
        specs = {node.args[0]: config.input_activation, node.args[_WEIGHT_INDEX]: weight}
        node.meta[key] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith(("aten.conv", "aten.linear"))


def _is_weight(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _graph_of(program: ExportedProgram, device: str) -> fx.GraphModule:
    """A fresh graph: tensors in by position, a tuple of tensors out; weights of its own."""
    with muted(*TORCHAO):
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(copy.deepcopy(program), device)
        module: Any = copy.deepcopy(program.module(check_guards=False))
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.eliminate_dead_code()  # a layer whose answer nobody reads trips the quantizer's pattern search
    return fx.GraphModule(module, module.graph)


def _fakes(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if _is_fake(m)]


def _is_fake(module: nn.Module) -> bool:
    return hasattr(module, "fake_quant_enabled") and hasattr(module, "activation_post_process")


def _activations(module: nn.Module) -> list[Any]:
    return [m for m in _fakes(module) if m.dtype == torch.uint8]


def _set_quantising(prepared: nn.Module, on: bool) -> None:
    for fake in _fakes(prepared):
        fake.enable_fake_quant(on)
