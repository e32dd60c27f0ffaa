"""The transforms, by name: each takes a flat module and returns it changed, and works on its own copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from onecard.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from onecard.models.flat import FlatModule

    Transform = Callable[[FlatModule, dict[str, Tensor]], FlatModule]

TRANSFORMS = {
    "fp32": "onecard.transforms.precision:to_fp32",
    "tf32": "onecard.transforms.precision:to_tf32",
    "fp16": "onecard.transforms.precision:to_fp16",
    "bf16": "onecard.transforms.precision:to_bf16",
    "autocast_fp16": "onecard.transforms.precision:autocast_fp16",
    "autocast_bf16": "onecard.transforms.precision:autocast_bf16",
    "channels_last": "onecard.transforms.layout:channels_last",
    "fold_bn": "onecard.transforms.fuse:fold_batch_norm",
}


def get_transform(name: str) -> Transform:
    """Import one transform.

    Raises:
        UsageError: there is no transform of that name.
    """
    if name not in TRANSFORMS:
        raise UsageError(f"unknown transform '{name}': expected one of {', '.join(TRANSFORMS)}.")
    module, _, attribute = TRANSFORMS[name].partition(":")
    transform: Transform = getattr(importlib.import_module(module), attribute)
    return transform


def apply_transforms(module: FlatModule, names: Iterable[str], inputs: dict[str, Tensor]) -> FlatModule:
    """Apply transforms from left to right.

    Args:
        module: a module that the caller gives up: transforms may change it.
        names: keys of :data:`TRANSFORMS`.
        inputs: example inputs on the module's device, for transforms that look at a run.

    Raises:
        onecard.backends.base.Unsupported: a transform does not apply to this model.
    """
    for name in names:
        module = get_transform(name)(module, inputs)
    return module
