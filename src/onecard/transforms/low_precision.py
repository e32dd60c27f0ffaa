"""Layers as matrix products in low precision: finding them, watching their inputs, and swapping them.

A linear layer, and a 1x1 convolution over channels-last pixels, is ``y[M, N] = x[M, K] @ weight[N, K].T + bias[N]``.
What takes its place is a plain module with plain buffers, so that it can be exported, compiled, captured in a CUDA
graph and saved without pickles, and needs nothing but PyTorch where it is loaded.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onecard.calibration.bench import Bench, Run
from onecard.calibration.sensitivity import rank_layers
from onecard.calibration.settle import settle
from onecard.errors import Unsupported
from onecard.evidence import LayerError
from onecard.models.flat import FlatModule, by_name
from onecard.transforms import watch
from onecard.transforms.open_attention import leave_fast_path, open_attention

MINMAX, PERCENTILE = "minmax", "percentile"
"""How a static scale is found: the largest magnitude of all rows, or what all but one value in 10,000 stay below."""

SMALLEST_AMAX = 1e-12
"""Floor of a range, so that rows and channels of zeros have a scale."""

_ABOVE_PERCENTILE = 1e-4


@dataclass(frozen=True)
class Gemm:
    """A layer as a matrix product.

    Args:
        weight: ``[N, K]`` in the layer's own dtype.
        bias: ``[N]`` in the layer's own dtype, or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """K."""
        return self.weight.shape[1]

    def is_aligned(self, outputs: int, inputs: int) -> bool:
        """True where N and K are multiples of these."""
        return self.outputs % outputs == 0 and self.inputs % inputs == 0


@dataclass(frozen=True)
class Range:
    """The magnitudes that a layer's input has over the calibration rows."""

    amax: float
    percentile: float

    def bound(self, method: str) -> float:
        """The magnitude that a static scale maps to the largest code."""
        return max(self.percentile if method == PERCENTILE else self.amax, SMALLEST_AMAX)


@dataclass(frozen=True)
class Scheme:
    """One way to compress layers.

    Args:
        name: the transform's name.
        fits: whether the kernels take a layer; others are left as they are.
        make: the module ``[M, K] -> [M, N]`` of a layer, given the bound of its inputs' magnitudes (0 if dynamic).
        methods: calibration methods; none where the inputs need no static scale.
        convolutions: whether 1x1 convolutions are taken too.
        mixes: whether keeping the worst layers is worth trying where all of them together do not pass.
    """

    name: str
    fits: Callable[[Gemm], bool]
    make: Callable[[Gemm, float], nn.Module]
    methods: tuple[str, ...] = ()
    convolutions: bool = True
    mixes: bool = True


class GemmLayer(nn.Module):
    """A product of rows where a layer was: inputs of any leading shape, or images ``[B, C, H, W]``.

    Args:
        product: ``[M, K] -> [M, N]``.
        inputs: K.
        outputs: N.
        is_image: the channels are the third dimension from the end, not the last.
    """

    def __init__(self, product: nn.Module, inputs: int, outputs: int, is_image: bool) -> None:
        super().__init__()
        self.product = product
        self.in_features, self.out_features = inputs, outputs  # the names that models ask a linear layer for
        self.is_image = is_image

    def forward(self, input: Tensor) -> Tensor:
        """The layer's answer, in the dtype of its input; an image comes out channels-last."""
        x = input.movedim(-3, -1) if self.is_image else input  # of a channels-last image this is a view
        rows = x.reshape(-1, x.shape[-1])  # [M, K]
        answer: Tensor = self.product(rows).to(input.dtype).reshape(*x.shape[:-1], self.out_features)
        return answer.movedim(-1, -3) if self.is_image else answer


def compress(module: FlatModule, bench: Bench, scheme: Scheme) -> FlatModule:
    """Swap the layers that a scheme fits, but those that have to be kept for the answers' sake.

    The projections of ``nn.MultiheadAttention`` are made layers first (:func:`open_attention`).

    Args:
        module: after any cast; the caller gives it up.
        bench: rows and judge; its record gets what came of it.
        scheme: what to put in the layers' place.

    Returns:
        The module with its layers swapped.

    Raises:
        Unsupported: no layer fits, or a static scale lacks calibration rows.
    """
    module = open_attention(module, bench.inputs)
    layers = _leave_read(module, find_layers(module, scheme), bench)
    ranges: Mapping[str, Range] = watch_ranges(module, layers, bench) if layers and scheme.methods else {}
    if scheme.methods:
        layers = {name: layer for name, layer in layers.items() if name in ranges}
    if not layers:
        raise Unsupported(f"the model has no layer that {scheme.name} applies to", _cure(module, scheme))

    def swapped(target: FlatModule, method: str, kept: Sequence[str]) -> FlatModule:
        bounds = {n: ranges[n].bound(method) if n in ranges else 0.0 for n in layers if n not in set(kept)}
        swap(target, {name: scheme.make(as_gemm(layers[name]), bound) for name, bound in bounds.items()})
        return target

    def attempt(method: str, kept: tuple[str, ...]) -> Run:
        return partial(by_name, swapped(copy_module(module), method, kept), bench.spec)

    def rank() -> tuple[LayerError, ...]:
        return rank_layers(module, bench, tuple(layers))

    ranked = rank if scheme.mixes and bench.rows else None
    found = settle(scheme.name, tuple(layers), scheme.methods or ("",), attempt, bench, ranked)
    return swapped(module, found.method, found.kept)


def find_layers(module: FlatModule, scheme: Scheme) -> dict[str, nn.Module]:
    """The layers that a scheme fits by their names in ``module.inner``, each once.

    Subclasses of ``nn.Linear`` are left alone: their owners read the weight itself (an ``nn.MultiheadAttention``
    that could not be opened does), and would go on without compression or fail. 1x1 convolutions count only in a
    channels-last model, where pixels are rows without a copy.
    """
    return {
        name: layer
        for name, layer in module.inner.named_modules()
        if (type(layer) is nn.Linear or (scheme.convolutions and module.channels_last and _is_pointwise(layer)))
        and isinstance(layer.weight, nn.Parameter)
        and watch.is_plain(layer)
        and layer.weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and scheme.fits(as_gemm(layer))
    }


def as_gemm(layer: nn.Module) -> Gemm:
    """A linear layer's or 1x1 convolution's weight and bias, without a copy."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    return Gemm(weight.detach().reshape(weight.shape[0], -1), None if bias is None else bias.detach())


@torch.no_grad()
def swap(module: FlatModule, products: Mapping[str, nn.Module]) -> None:
    """Put products in the place of layers, in place.

    Args:
        module: where the layers are.
        products: a module ``[M, K] -> [M, N]`` for each name in ``module.inner``.
    """
    inner = module.inner
    made = {inner.get_submodule(name): product for name, product in products.items()}
    made = {layer: _gemm_layer(product, layer) for layer, product in made.items()}
    watch.replace(module, made)
    leave_fast_path(inner)  # it reads the weights of the layers that are gone


def _gemm_layer(product: nn.Module, layer: nn.Module) -> GemmLayer:
    gemm = as_gemm(layer)
    return GemmLayer(product, gemm.inputs, gemm.outputs, _is_image(layer)).eval()


class _Bare(nn.Module):
    """A layer that notes whether anybody asks for what a :class:`GemmLayer` does not have, such as its weight."""

    def __init__(self, layer: nn.Module, note: Callable[[], None]) -> None:
        super().__init__()
        shape = as_gemm(layer)
        self.in_features, self.out_features = shape.inputs, shape.outputs
        self.__dict__.update(_layer=layer, _note=note)  # no child, which would be found beside it

    def forward(self, input: Tensor) -> Tensor:
        answer: Tensor = self.__dict__["_layer"](input)
        return answer

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self.__dict__["_layer"], name)
        self.__dict__["_note"]()
        return answer


@torch.inference_mode()
def _leave_read(module: FlatModule, layers: dict[str, nn.Module], bench: Bench) -> dict[str, nn.Module]:
    """The layers but those of which the model itself reads the weight, as T5 does for its dtype: seen in one run."""
    if not layers:
        return layers
    read: set[str] = set()
    copied = copy_module(module)
    bare: dict[nn.Module, nn.Module] = {}
    for name in layers:
        layer = copied.inner.get_submodule(name)
        bare[layer] = _Bare(layer, partial(read.add, name)).eval()
    watch.replace(copied, bare)
    leave_fast_path(copied)
    copied(*(bench.inputs[name].clone() for name in copied.plan.inputs))
    return {name: layer for name, layer in layers.items() if name not in read}


def copy_module(module: FlatModule) -> FlatModule:
    """A copy whose layers can be swapped; it shares all tensors with the module, so it costs no memory."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


@torch.inference_mode()
def watch_ranges(module: FlatModule, layers: Mapping[str, nn.Module], bench: Bench) -> dict[str, Range]:
    """Run the calibration rows and note the magnitudes of the layers' inputs.

    Args:
        module: runs the rows.
        layers: those to watch, by name.
        bench: the rows.

    Returns:
        The range of every layer that was called with finite values. The percentile is the mean over the batches.

    Raises:
        Unsupported: there are no rows.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}  # [2] each: on the device until the end

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if not x.numel():  # an expert without tokens
            return
        magnitudes = x.detach().flatten().abs().float()
        above = max(1, int(magnitudes.numel() * _ABOVE_PERCENTILE))
        seen[name].append(torch.topk(magnitudes, above).values[[0, -1]])

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, n=name: note(n, args, kwargs), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        for number, batch in enumerate(bench.batches(), 1):
            bench.progress(f"watching the layers' inputs, batch {number}")
            module(*(batch[name] for name in module.plan.inputs))
    finally:
        for hook in hooks:
            hook.remove()
    ranges: dict[str, Range] = {}
    for name, pairs in seen.items():
        if pairs and bool(torch.stack(pairs).isfinite().all()):
            stacked = torch.stack(pairs)
            ranges[name] = Range(float(stacked[:, 0].max()), float(stacked[:, 1].mean()))
    return ranges


def require_capability(bench: Bench, lowest: tuple[int, int], what: str) -> None:
    """Refuse a card that lacks the instructions.

    Raises:
        Unsupported: the device is a card of a lower compute capability.
    """
    if not bench.device.startswith("cuda"):
        return
    found = torch.cuda.get_device_capability(bench.device)
    if found < lowest:
        needed, there = (".".join(map(str, version)) for version in (lowest, found))
        raise Unsupported(f"{what} needs a card of compute capability {needed}, and this one has {there}")


def constant(tensor: Tensor) -> Tensor:
    """A tensor as a module's buffer: of its own, contiguous, and no inference tensor, which cannot be traced."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def channel_scales(weight: Tensor, largest: float) -> Tensor:
    """The scale of each output channel, fp32 ``[N, 1]``, that maps its largest magnitude to the largest code."""
    return weight.float().abs().amax(1, keepdim=True).clamp_min(SMALLEST_AMAX) / largest


def row_scales(rows: Tensor, largest: float) -> Tensor:
    """The scale of each row of activations, fp32 ``[M, 1]``.

    Layers that share an input compute it by the same operators, so that a compiler finds it once.
    """
    return rows.abs().amax(-1, keepdim=True).float().clamp_min(SMALLEST_AMAX) / largest


def _is_image(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def _is_pointwise(layer: nn.Module) -> bool:
    """A 1x1 convolution that is a matrix product over pixels."""
    return type(layer) is nn.Conv2d and (
        layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding in ((0, 0), 0, "valid", "same")
        and layer.groups == 1
    )


def _cure(module: FlatModule, scheme: Scheme) -> str:
    if scheme.convolutions and not module.channels_last and any(map(_is_pointwise, module.inner.modules())):
        return "Put channels_last before it in the recipe: then 1x1 convolutions count too."
    return ""
