"""Unstructured pruning, as a baseline only: half of each layer's weights are zero, and nothing is gained by it.

Zeros among dense weights are multiplied and stored like any other number, so it is neither faster nor, uncompressed,
smaller. The report shows that beside ``pruned`` and ``sparse24``, whose zeros are left out.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from onecard.calibration.bench import Bench, Run
from onecard.calibration.settle import settle
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, by_name

SHARE = 0.5
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def unstructured(module: FlatModule, bench: Bench) -> FlatModule:
    """Set the half of every convolution's and linear layer's weights that is smallest in magnitude to zero.

    Magnitude pruning after Han et al. 2015 (https://arxiv.org/abs/1506.02626), by ``torch.nn.utils.prune``, whose masks
    are made permanent.

    Raises:
        Unsupported: the model has no such layer.
    """
    names = tuple(name for name, layer in module.named_modules() if isinstance(layer, _LAYERS) and _is_float(layer))

    def make(method: str, kept: tuple[str, ...]) -> Run:
        trial = _pruned(copy.deepcopy(module), [name for name in names if name not in kept])
        return partial(by_name, trial, bench.spec)

    note = f"a baseline: {SHARE:.0%} of the weights are zero, but they are stored and multiplied like all others"

    def record(found: Compression) -> None:
        bench.record(msgspec.structs.replace(found, notes=(*found.notes, note)))

    found = settle("unstructured", names, ("",), make, replace(bench, record=record))
    return _pruned(module, [name for name in names if name not in found.kept])


def zero_share(module: nn.Module) -> float:
    """The share of zeros among the weights of all convolutions and linear layers."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, _LAYERS) and _is_float(layer)]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def _pruned(module: FlatModule, names: list[str]) -> FlatModule:
    for name in names:
        layer = module.get_submodule(name)
        prune.l1_unstructured(layer, "weight", amount=SHARE)  # type: ignore[no-untyped-call]
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    return module


def _is_float(layer: nn.Module) -> bool:
    """True for a weight that is a plain parameter, as no quantised layer's is."""
    weight = layer._parameters.get("weight")
    return weight is not None and type(weight) in (Tensor, nn.Parameter) and torch.is_floating_point(weight)
