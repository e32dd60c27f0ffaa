"""Folding batch normalisation into the convolution or linear layer before it.

A batch norm in evaluation mode is an affine map with constant coefficients, so it can be multiplied into
the weights of the layer that feeds it (Jacob et al. 2018, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.transforms.precision import precision_scope

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TOLERANCE = 1e-3  # fp32 rounding through a deep network; a wrong pairing is off by orders of magnitude more


@torch.no_grad()
def fold_batch_norm(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Fold every batch norm that directly follows a convolution or linear layer.

    The pairs are found by watching one run, so that any module works, also those that cannot be traced.
    A layer whose answer is used elsewhere too is caught by comparing the answers before and after.

    Raises:
        Unsupported: there is nothing to fold, or folding would change the answers.
    """
    with precision_scope("fp32"):  # TF32 would drown the comparison
        return _fold_all(module, inputs)


def _fold_all(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    pairs = _find_pairs(module, inputs)
    if not pairs:
        raise Unsupported("the model has no batch normalisation right behind a convolution or linear layer")
    arguments = [inputs[name] for name in module.plan.inputs]
    before = [t.double() for t in module(*arguments)]
    names = {child: name for name, child in module.named_modules()}
    for layer, norm in pairs:
        _fold(layer, norm)
        module.set_submodule(names[norm], nn.Identity())
    for old, new in zip(before, module(*arguments), strict=True):
        error = (new.double() - old).norm() / old.norm().clamp_min(1e-30)
        if not error <= _TOLERANCE:
            raise Unsupported(f"folding changes the answers by {error:.1e}: a folded layer's output is used twice")
    return module


def _find_pairs(module: FlatModule, inputs: dict[str, Tensor]) -> list[tuple[nn.Module, nn.Module]]:
    """Layers and the norms whose input is their output, each called just once in the run."""
    produced: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept so that its id is not used again
    pairs: list[tuple[nn.Module, nn.Module]] = []
    calls: Counter[nn.Module] = Counter()

    def watch(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[layer] += 1
        if isinstance(layer, (*_CONVS, nn.Linear)):
            produced[id(output)] = (layer, output)
        elif args and id(args[0]) in produced:
            pairs.append((produced[id(args[0])][0], layer))

    hooks = [
        child.register_forward_hook(watch)
        for child in module.modules()
        if isinstance(child, (*_CONVS, nn.Linear)) or (isinstance(child, _NORMS) and child.track_running_stats)
    ]
    try:
        module(*(inputs[name] for name in module.plan.inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer, norm) for layer, norm in pairs if calls[layer] == calls[norm] == 1]


def _fold(layer: Any, norm: Any) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
