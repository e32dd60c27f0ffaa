"""Precision: the arithmetic inside changes, the dtypes that go in and come out stay those of the spec."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer per-backend switches are not read by inductor yet
        before = _read_switches()
        _set_switches(_TF32 if precision == "tf32" else _IEEE)
        try:
            yield
        finally:
            _set_switches(before)


class _Switches(NamedTuple):
    """What fp32 arithmetic depends on: the older switches, and the newer ones, which they set and can disagree with."""

    matmul: str
    cudnn: bool
    operators: tuple[str, ...]


_OPERATORS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)
"""The newer switches."""

_IEEE = _Switches("highest", False, ("ieee",) * len(_OPERATORS))
_TF32 = _Switches("high", True, ("tf32",) * len(_OPERATORS))


def _read_switches() -> _Switches:
    """The switches so that setting them brings all back; an older one is inferred where it cannot be read."""
    matmul, convolution, recurrent, on_cpu = operators = tuple(switch.fp32_precision for switch in _OPERATORS)
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # it disagrees with the newer switches
        older = _infer_matmul(matmul, on_cpu)
    try:
        cudnn: bool = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # likewise
        cudnn = convolution != recurrent or convolution != "tf32"
    cuda, cpu = torch.backends.cudnn.fp32_precision, torch.backends.mkldnn.fp32_precision
    # What a switch has from the one above it, it shall go on to have from there.
    own = ("none" if it == above else it for it, above in zip(operators, (cuda, cuda, cuda, cpu), strict=True))
    return _Switches(older, cudnn, tuple(own))


def _infer_matmul(on_cuda: str, on_cpu: str) -> str:
    """The older switch of matrix products, from what it disagrees with."""
    try:
        allows: bool = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        allows = on_cuda != "tf32"
    if not allows:
        return "highest"
    return "high" if on_cpu == "bf16" else "medium"


def _set_switches(switches: _Switches) -> None:
    torch.set_float32_matmul_precision(switches.matmul)
    torch.backends.cudnn.allow_tf32 = switches.cudnn
    for switch, own in zip(_OPERATORS, switches.operators, strict=True):  # last, for the older ones set them too
        switch.fp32_precision = own
