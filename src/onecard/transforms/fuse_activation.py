"""Fusing an activation into the linear or convolution layer before it, for engines that run operator by operator.

One kernel writes the activated answer, where two would write it, read it and write it again. On a GPU those are
cuBLASLt's epilogues and cuDNN's convolution-bias-activation; on a CPU oneDNN's post-operations.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.transforms import watch
from onecard.transforms.graph import restore_activations

_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_SAME = 1e-9  # in fp64; exact and tanh GELU are 5e-4 apart
_CLOSE = 1e-3  # in fp32, a kernel against layer and activation apart

_POST_OPERATIONS: dict[str, tuple[str, list[float], str]] = {
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "tanh": ("tanh", [], ""),
}
"""Kind to the attribute, scalars and algorithm of oneDNN's pointwise operators."""

_MARK = "_onecard_activated"
"""The attribute of a tensor that is activated already: the mark of the activation that may be left out."""


def fuse_activation(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Compute activations inside the linear and 2-D convolution layers that feed them.

    The pairs are found by watching one run, and each is tried there. The layer becomes an
    :class:`ActivatedLayer`, its activation a :class:`SkippedActivation`, which passes through what is activated
    already and activates everything else, so one ``nn.ReLU`` may serve a whole block.

    Args:
        module: a module that the caller gives up.
        inputs: example inputs by name, on the module's device.

    Raises:
        Unsupported: no activation stands right behind a layer, this device has no kernel for those that
            do, or the answers would change.
    """
    restore_activations(module)
    with watch.exact_run():
        pairs, refused = _find_pairs(module, inputs)
        if not pairs:
            raise _none(module, refused)
        names = {child: name for name, child in module.named_modules()}

        def change() -> None:
            made: dict[nn.Module, nn.Module] = {}
            for pair in pairs:
                mark = names[pair.activation]
                made[pair.layer] = ActivatedLayer(pair.layer, pair.kind, mark)
                made[pair.activation] = SkippedActivation(pair.activation, mark)
            watch.replace(module, made)

        return watch.rewrite(module, inputs, change, "fusing activations")


class ActivatedLayer(nn.Module):
    """A layer that computes its activation too, and marks its answer as activated.

    Where there is no kernel for the dtype at hand, the layer was quantised or is observed, or the call is
    exported or traced, the layer is just called, and the activation behind it does its work.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``; a quantiser may put another in its place.
        kind: a key of the table of activations.
        mark: of the activation that is left out.
    """

    def __init__(self, layer: nn.Module, kind: str, mark: str) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind
        self.mark = mark
        self._type = type(layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if type(self.layer) is not self._type or not watch.is_plain(self.layer) or not _can_run(self.layer, x):
            y = self.layer(x)
            return y
        y = _activated(self.layer, self.kind, x)
        setattr(y, _MARK, self.mark)
        return y


class SkippedActivation(nn.Module):
    """An activation that leaves out what the layer before it has done."""

    def __init__(self, activation: nn.Module, mark: str) -> None:
        super().__init__()
        self.activation = activation
        self.mark = mark

    def forward(self, x: Tensor) -> Tensor:
        if getattr(x, _MARK, None) == self.mark:
            delattr(x, _MARK)
            return x
        y: Tensor = self.activation(x)
        return y


@dataclass(frozen=True)
class _Pair:
    """A layer and the activation that its answer went into; ``refused`` says why they cannot be one kernel."""

    layer: nn.Module
    activation: nn.Module
    kind: str
    refused: str = ""


def _find_pairs(module: FlatModule, inputs: dict[str, Tensor]) -> tuple[list[_Pair], list[_Pair]]:
    """The pairs that one kernel can compute, and those it cannot."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d) and watch.is_plain(m)]
    kinds = {m: kind for m in module.modules() if (kind := _kind_of(m))}
    produced: dict[int, tuple[nn.Module, Tensor, Tensor, tuple[int, int]]] = {}  # tensors kept, so that ids stay theirs
    calls: Counter[nn.Module] = Counter()
    found: list[_Pair] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[layer] += 1
        if len(args) == 1 and isinstance(output, Tensor):
            produced[id(output)] = (layer, args[0], output, (watch.version(args[0]), watch.version(output)))

    def meet(activation: nn.Module, args: tuple[Any, ...]) -> None:
        layer, x, y, versions = produced.get(id(args[0]), (None, None, None, None)) if args else (None,) * 4
        # A sum in place (y += shortcut) is the same tensor, but no more the layer's answer.
        if layer is not None and x is not None and y is not None and versions == (watch.version(x), watch.version(y)):
            found.append(_Pair(layer, activation, kinds[activation], _refusal(layer, kinds[activation], x, y)))

    def hooks(stack: ExitStack) -> None:
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        for activation in kinds:
            stack.callback(activation.register_forward_pre_hook(meet).remove)

    watch.watch(module, inputs, hooks)
    met = Counter(pair.layer for pair in found)
    always = [pair for pair in dict.fromkeys(found) if met[pair.layer] == calls[pair.layer]]
    partners = Counter(pair.layer for pair in always)
    good = [pair for pair in always if not pair.refused and partners[pair.layer] == 1]
    return good, [pair for pair in always if pair.refused]


@torch.no_grad()
def _kind_of(module: nn.Module) -> str:
    """Which activation a module is, known by what it does to numbers, not by its class; empty if none."""
    if next(module.children(), None) or next(module.parameters(), None) is not None or list(module.buffers()):
        return ""
    grid = torch.cat([torch.linspace(-12, 12, 193), torch.linspace(-1, 1, 64)]).double()
    try:
        answer = module.forward(grid.clone())
    except Exception:  # a module that wants other inputs is no activation
        return ""
    if not isinstance(answer, Tensor) or answer.shape != grid.shape or answer.dtype != grid.dtype:
        return ""
    return next((name for name, f in _KINDS.items() if float((answer - f(grid)).abs().max()) < _SAME), "")


def _refusal(layer: Any, kind: str, x: Tensor, y: Tensor) -> str:
    """Why layer and activation cannot be one kernel here, tried on the tensors of the run; empty if they can."""
    what = f"{type(layer).__name__} with {kind}"
    if not _has_kernel(layer, kind, x.device.type) or not _can_run(layer, x):
        return what
    expected = _KINDS[kind](y)
    try:
        fused = _activated(layer, kind, x)
    except Exception:  # the libraries refuse shapes and types in many ways
        return what
    if fused.shape != expected.shape:
        return what
    return "" if watch.relative_l2(fused, expected) <= _CLOSE else what


def _none(module: nn.Module, refused: list[_Pair]) -> Unsupported:
    if refused:
        return Unsupported(f"there is no fused kernel here for {', '.join(sorted({pair.refused for pair in refused}))}")
    norms = any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in module.modules())
    return Unsupported(
        "the model has no activation module right behind a linear or 2-D convolution layer",
        "Put fold_bn before fuse_activation in the recipe." if norms else "",
    )


def _has_kernel(layer: Any, kind: str, device: str) -> bool:
    """Whether the device's library knows this combination."""
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
        return device == "cpu" or (device == "cuda" and kind == "relu")
    if device == "cuda":
        # The epilogue adds the bias, and its GELU is the tanh form: an exact GELU must stay exact.
        return kind in ("relu", "gelu_tanh") and layer.bias is not None
    return device == "cpu"


def _can_run(layer: Any, x: Tensor) -> bool:
    """Whether the kernel takes this call; under autocast the dtypes are the framework's to choose."""
    weight: Tensor = layer.weight
    dims = x.dim() == 4 if isinstance(layer, nn.Conv2d) else x.dim() >= 2  # noqa: PLR2004 - [B, C, H, W]; [..., F]
    if not dims or x.dtype != weight.dtype or x.device != weight.device:
        return False
    if torch.is_autocast_enabled(x.device.type) or _is_captured():
        return False
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) if x.is_cuda else _onednn_takes(x.dtype)


def _is_captured() -> bool:
    """Whether this call makes a graph, whose engine fuses by itself and may not know these kernels."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch.compiler.is_compiling()


@functools.cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _activated(layer: Any, kind: str, x: Tensor) -> Tensor:
    """Layer and activation by one kernel."""
    if type(layer) is not nn.Conv2d:  # a class of its own may pad first, with a child that only pads
        for child in layer.children():
            x = child(x)
    weight, bias = layer.weight, layer.bias
    y: Tensor
    if isinstance(layer, nn.Conv2d):
        geometry = list(layer.stride), list(layer.padding), list(layer.dilation)
        if x.is_cuda:
            y = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry, layer.groups)
        else:
            stride, padding, dilation = geometry
            shape = (padding, stride, dilation, layer.groups)
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, *_POST_OPERATIONS[kind])
    elif x.is_cuda:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=kind == "gelu_tanh")
        y = y.reshape(*x.shape[:-1], weight.shape[0])
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_POST_OPERATIONS[kind])
    return y
