"""The transforms, by name: each takes a flat module and returns it changed, and works on its own copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from onecard.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from onecard.calibration.bench import Bench
    from onecard.models.flat import FlatModule

    Transform = Callable[[FlatModule, dict[str, Tensor]], FlatModule]
    Compressor = Callable[[FlatModule, Bench], FlatModule]

TRANSFORMS = {
    "fp32": "onecard.transforms.precision:to_fp32",
    "tf32": "onecard.transforms.precision:to_tf32",
    "fp16": "onecard.transforms.precision:to_fp16",
    "bf16": "onecard.transforms.precision:to_bf16",
    "autocast_fp16": "onecard.transforms.precision:autocast_fp16",
    "autocast_bf16": "onecard.transforms.precision:autocast_bf16",
    "channels_last": "onecard.transforms.layout:channels_last",
    "fold_bn": "onecard.transforms.fuse:fold_batch_norm",
    "fuse_qkv": "onecard.transforms.fuse_qkv:fuse_qkv",
    "fuse_activation": "onecard.transforms.fuse_activation:fuse_activation",
}
"""Those that change how the model is computed. They can be applied again whenever a bundle is loaded."""

COMPRESSORS = {
    "int8": "onecard.transforms.int8:static_int8",
    "int8_dynamic": "onecard.transforms.int8:dynamic_int8",
    "int8_weights": "onecard.transforms.weight_only:int8_weights",
    "int4_weights": "onecard.transforms.weight_only:int4_weights",
    "fp8": "onecard.transforms.fp8:fp8_rowwise",
    "fp8_tensor": "onecard.transforms.fp8:fp8_tensorwise",
    "fp8_static": "onecard.transforms.fp8:fp8_static",
    "sparse24": "onecard.transforms.sparse24:sparse24",
    "unstructured": "onecard.transforms.unstructured:unstructured",
    "pruned": "onecard.transforms.adopt:pruned",
    "qat": "onecard.transforms.adopt:qat",
}
"""Those that lose something of the model (:data:`onecard.recipe.COMPRESSIONS`). They need a bench and are applied
only while an artifact is built, so the artifact holds their outcome."""


def get_transform(name: str) -> Transform:
    """Import one transform.

    Raises:
        UsageError: there is no transform of that name.
    """
    if name not in TRANSFORMS:
        raise UsageError(f"unknown transform '{name}': expected one of {', '.join((*TRANSFORMS, *COMPRESSORS))}.")
    module, _, attribute = TRANSFORMS[name].partition(":")
    transform: Transform = getattr(importlib.import_module(module), attribute)
    return transform


def get_compressor(name: str) -> Compressor:
    """Import one compressor, a key of :data:`COMPRESSORS`."""
    module, _, attribute = COMPRESSORS[name].partition(":")
    compressor: Compressor = getattr(importlib.import_module(module), attribute)
    return compressor


def apply_transforms(
    module: FlatModule, names: Iterable[str], inputs: dict[str, Tensor], bench: Bench | None = None
) -> FlatModule:
    """Apply transforms from left to right.

    Args:
        module: a module that the caller gives up: transforms may change it.
        names: keys of :data:`TRANSFORMS`, and of :data:`COMPRESSORS` where there is a bench.
        inputs: example inputs on the module's device, for transforms that look at a run.
        bench: what compressors need; None where there is none, as when a bundle is loaded.

    Raises:
        onecard.errors.Unsupported: a transform does not apply to this model.
        UsageError: a compressor without a bench.
    """
    for name in names:
        if name not in COMPRESSORS:
            module = get_transform(name)(module, inputs)
        elif bench is None:
            raise UsageError(f"'{name}' is applied when an artifact is built, and cannot be applied again.")
        else:
            module = get_compressor(name)(module, bench)
    return module
