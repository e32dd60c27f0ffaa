"""Precision: the arithmetic inside changes, the dtypes that go in and come out stay those of the spec."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from onecard.models.flat import FlatModule, named_leaves


def to_fp32(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Plain IEEE fp32: nothing to change, named so that a recipe can say it."""
    return module


def to_tf32(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """TF32 tensor cores for fp32 matrix products; a switch of the run, see :func:`precision_scope`."""
    return module


def to_fp16(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Weights and arithmetic in IEEE half precision."""
    return _cast(module, torch.float16, inputs)


def to_bf16(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Weights and arithmetic in bfloat16."""
    return _cast(module, torch.bfloat16, inputs)


def autocast_fp16(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """fp32 weights; ``torch.autocast`` picks the operators that run in half precision."""
    return _autocast(module, torch.float16, inputs)


def autocast_bf16(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """fp32 weights; ``torch.autocast`` picks the operators that run in bfloat16."""
    return _autocast(module, torch.bfloat16, inputs)


def _cast(module: FlatModule, dtype: torch.dtype, inputs: dict[str, Tensor]) -> FlatModule:
    module.output_dtypes = _output_dtypes(module, inputs)
    module.inner.to(dtype)
    module.compute_dtype = dtype
    return module


def _autocast(module: FlatModule, dtype: torch.dtype, inputs: dict[str, Tensor]) -> FlatModule:
    module.output_dtypes = _output_dtypes(module, inputs)
    module.autocast_dtype = dtype
    return module


@torch.inference_mode()
def _output_dtypes(module: FlatModule, inputs: dict[str, Tensor]) -> tuple[torch.dtype, ...]:
    answer = module(*(inputs[name] for name in module.plan.inputs))
    return tuple(leaf.dtype for _, leaf in named_leaves(answer))


@contextlib.contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Set the global switches that fp32 arithmetic on a GPU depends on, and put them back.

    Args:
        precision: ``tf32`` allows TF32 in matrix products and convolutions; anything else forbids it, so
            that fp32 means IEEE fp32 (PyTorch itself allows TF32 in convolutions by default).
    """
    allow = precision == "tf32"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer per-backend switches are not read by inductor yet
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32, cudnn.allow_tf32 = allow, allow
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before
