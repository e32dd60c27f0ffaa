"""How much each layer suffers from 8 bits: each alone is rounded as INT8 would round it, and the answers compared.

The rounding is simulated on the original in its own precision, so that one ranking serves every INT8 backend
(the layer-wise analysis of Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 5.1).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onecard.calibration.bench import NO_ROWS_CURE, Bench
from onecard.errors import Unsupported
from onecard.evidence import INCOMPARABLE, LayerError
from onecard.models.flat import FlatModule
from onecard.verify.compare import compare

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_ROWS = 16  # the ranking settles with few rows; it costs one run over them for every layer
_LEVELS, _LARGEST = 255, 127  # of an affine 8-bit input, and of a symmetric 8-bit weight

_Answers = list[dict[str, Tensor]]
_Ranges = dict[str, tuple[float, float]]


def quantisable_layers(module: FlatModule) -> tuple[str, ...]:
    """The convolutions and linear layers with floating-point weights of their own.

    Args:
        module: any flat module.

    Returns:
        Names as ``module.inner.named_modules()`` gives them, each layer once, in that order. Besides torch's
        layers this counts the ``Conv1D`` of transformers, a linear layer with a transposed weight.
    """
    return tuple(name for name, layer in module.inner.named_modules() if _is_quantisable(layer))


@torch.no_grad()
def rank_layers(module: FlatModule, bench: Bench, layers: Sequence[str] = ()) -> tuple[LayerError, ...]:
    """Measure what rounding one layer alone to 8 bits does to the model's answers.

    A layer's input is rounded to 256 steps over the range that the calibration rows show (affine, per tensor), its
    weight to -127..127 with one scale for each output channel.

    Args:
        module: the original on the bench's device; afterwards it is as it was, whatever happens.
        bench: calibration rows, of which the first few are used, and progress.
        layers: names as of :func:`quantisable_layers`; by default all of them.

    Returns:
        One error for each layer (relative L2, the mean over the batches, of the output that moves most), the worst
        layer first. A layer that the model does not call has error 0. Past the bench's deadline the rest is left out.

    Raises:
        Unsupported: there are no calibration rows.
    """
    names = tuple(layers) or quantisable_layers(module)
    batches = _first_rows(bench)
    answers, ranges = _watch(module, names, batches)
    found = []
    for index, name in enumerate(names, 1):
        if bench.is_late:
            break
        bench.progress(f"measuring the sensitivity of layers {index}/{len(names)}")
        with _rounded(module, name, ranges.get(name)):
            found.append(LayerError(name, _distance(module, batches, answers)))
    return tuple(sorted(found, key=lambda layer: -layer.error))


def _is_quantisable(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    # Other tensor classes are weights that something has compressed already.
    plain = type(weight) is nn.Parameter and weight.is_floating_point()
    return plain and (isinstance(layer, _LAYERS) or _is_transposed(layer))


def _is_transposed(layer: nn.Module) -> bool:
    """True for transformers' Conv1D, without importing it."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def _first_rows(bench: Bench) -> _Answers:
    batches: _Answers = []
    rows = 0
    for batch in bench.batches(max(_ROWS, bench.smallest_batch)):
        batches.append(batch)
        rows += len(next(iter(batch.values())))
        if rows >= _ROWS:
            break
    if not batches:
        raise Unsupported(f"the calibration rows do not fill one batch of {bench.smallest_batch}", NO_ROWS_CURE)
    return batches


def _watch(module: FlatModule, names: Sequence[str], batches: _Answers) -> tuple[_Answers, _Ranges]:
    """The answers of the untouched model, and the range of every layer's input meanwhile."""
    ranges: _Ranges = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs).detach()
        if not x.numel():  # an expert without tokens
            return
        low, high = map(float, x.aminmax())
        before = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(low, before[0]), max(high, before[1])

    hooks = [
        module.inner.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    try:
        return [_run(module, batch) for batch in batches], ranges
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _rounded(module: FlatModule, name: str, span: tuple[float, float] | None) -> Iterator[None]:
    """A layer with its weight and its input rounded to 8 bits; without a span (never called) the weight alone."""
    layer = module.inner.get_submodule(name)
    weights = [(layer, "weight", 1 if _is_transposed(layer) else 0)]
    around = module.inner.get_submodule(name.rpartition(".")[0])
    if isinstance(around, nn.MultiheadAttention) and around.in_proj_weight is not None:
        weights.append((around, "in_proj_weight", 0))  # no layer of its own: it shares the fate of out_proj
    before = [owner._parameters[key] for owner, key, _ in weights]
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: _replaced(args, kwargs, span), with_kwargs=True)
    try:
        for (owner, key, axis), weight in zip(weights, before, strict=True):
            assert weight is not None
            owner._parameters[key] = nn.Parameter(_round_weight(weight, axis), requires_grad=False)
        yield
    finally:
        hook.remove()
        for (owner, key, _), weight in zip(weights, before, strict=True):
            owner._parameters[key] = weight


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], span: tuple[float, float] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with the first of them rounded."""
    if span is None:
        return args, kwargs
    if args:
        return (_round_input(args[0], *span), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: _round_input(kwargs[name], *span)}


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def _round_input(tensor: Tensor, low: float, high: float) -> Tensor:
    scale = (high - low) / _LEVELS
    if not 0 < scale < math.inf:
        return tensor
    zero = round(-low / scale)
    return ((tensor / scale).round() + zero).clamp(0, _LEVELS).sub(zero).mul(scale)


def _round_weight(weight: Tensor, axis: int) -> Tensor:
    """``[out, in, ...]``, or ``[in, out]`` where ``axis`` is 1."""
    others = [dim for dim in range(weight.dim()) if dim != axis]
    scale = weight.abs().amax(dim=others, keepdim=True) / _LARGEST
    scale = scale.clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().clamp(-_LARGEST, _LARGEST) * scale


def _distance(module: FlatModule, batches: _Answers, answers: _Answers) -> float:
    errors = []
    for batch, wanted in zip(batches, answers, strict=True):
        got = _run(module, batch)
        errors.append(max(compare(name, got[name], ref, "").relative_l2 for name, ref in wanted.items()))
    return min(sum(errors) / len(errors), INCOMPARABLE)


def _run(module: FlatModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    answer = module(*(batch[name] for name in module.plan.inputs))
    return {str(index): tensor.clone() for index, tensor in enumerate(answer)}
