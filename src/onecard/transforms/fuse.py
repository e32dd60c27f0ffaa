"""Folding batch normalisation into the convolution or linear layer before it.

A batch norm in evaluation mode is an affine map with constant coefficients, so it can be multiplied into
the weights of the layer that feeds it (Jacob et al. 2018, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.transforms import watch

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Fold every batch norm that directly follows a convolution or linear layer.

    The pairs are found by watching one run, so that any module works, also those that cannot be traced.
    A layer whose answer is used elsewhere too is caught by comparing the answers before and after.

    Args:
        module: a module that the caller gives up.
        inputs: example inputs by name, on the module's device; they stay as they are.

    Raises:
        Unsupported: there is nothing to fold, or folding would change the answers.
    """
    with watch.exact_run():  # TF32 would drown the comparison
        pairs = _find_pairs(module, inputs)
        if not pairs:
            raise Unsupported("the model has no batch normalisation right behind a convolution or linear layer")

        def change() -> None:
            for layer, norm in pairs:
                _fold(layer, norm)
            watch.replace(module, {norm: nn.Identity() for _, norm in pairs})

        return watch.rewrite(module, inputs, change, "folding batch norms")


def _find_pairs(module: FlatModule, inputs: dict[str, Tensor]) -> list[tuple[nn.Module, nn.Module]]:
    """Layers and the norms whose input is their output, each called just once in the run and in one pair only."""
    layers = [m for m in module.modules() if isinstance(m, _LAYERS) and watch.is_plain(m)]
    norms = [m for m in module.modules() if _is_constant(m)]
    produced: dict[int, tuple[nn.Module, Tensor, int]] = {}  # the tensor is kept so that its id is not used again
    pairs: list[tuple[nn.Module, nn.Module]] = []
    calls: Counter[nn.Module] = Counter()

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[layer] += 1
        if isinstance(output, Tensor):
            produced[id(output)] = (layer, output, watch.version(output))

    def meet(norm: nn.Module, args: tuple[Any, ...]) -> None:
        calls[norm] += 1
        layer, output, version = produced.get(id(args[0]), (None, None, 0)) if args else (None, None, 0)
        # What was changed in place since is the same tensor, but no more the layer's answer.
        if layer is not None and output is not None and watch.version(output) == version and _fit(layer, norm, output):
            pairs.append((layer, norm))

    def hooks(stack: ExitStack) -> None:
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(meet).remove)

    watch.watch(module, inputs, hooks)
    partners = Counter(layer for layer, _ in pairs)
    return [(layer, norm) for layer, norm in pairs if calls[layer] == calls[norm] == partners[layer] == 1]


def _is_constant(module: nn.Module) -> bool:
    """True for a batch norm, and no class of its own, that is an affine map with constant coefficients."""
    if type(module) not in _NORMS or module.training or module._forward_hooks or module._forward_pre_hooks:
        return False
    return module.running_mean is not None and module.running_var is not None


def _fit(layer: Any, norm: Any, output: Tensor) -> bool:
    """Whether the channels that the norm scales, dimension 1 of its input, are the layer's output channels."""
    dims = 2 if isinstance(layer, nn.Linear) else layer.weight.dim()
    return bool(output.dim() == dims and norm.num_features == layer.weight.shape[0])


def _fold(layer: Any, norm: Any) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
