"""FP8 linear layers: weights and activations as e4m3, products summed in fp32 on the tensor cores.

The format and its use in inference: Micikevicius et al. 2022, "FP8 Formats for Deep Learning". On a CPU the same
operators run, slowly: that is for testing, and no recipe offers it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from onecard.calibration.bench import Bench
from onecard.models.flat import FlatModule
from onecard.transforms.low_precision import (
    MINMAX,
    PERCENTILE,
    SMALLEST_AMAX,
    Gemm,
    Scheme,
    channel_scales,
    compress,
    constant,
    require_capability,
    row_scales,
)

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite number of e4m3."""

_ALIGNMENT = 16  # of K and N, which torch._scaled_mm asks for on a card
_LOWEST_CAPABILITY = (8, 9)  # Ada and Hopper


def fp8_rowwise(module: FlatModule, bench: Bench) -> FlatModule:
    """A scale for each row of activations, found while running, and one for each output channel of the weights.

    Raises:
        Unsupported: no layer is of a size that the kernels take, or the card has no FP8.
    """
    return _compress(module, bench, "fp8", lambda gemm, bound: Fp8RowwiseProduct(gemm))


def fp8_tensorwise(module: FlatModule, bench: Bench) -> FlatModule:
    """One scale for all activations of a layer, found while running, and one for its weights.

    Raises:
        Unsupported: no layer is of a size that the kernels take, or the card has no FP8.
    """
    return _compress(module, bench, "fp8_tensor", lambda gemm, bound: Fp8Product(gemm))


def fp8_static(module: FlatModule, bench: Bench) -> FlatModule:
    """One scale for all activations of a layer, from the calibration rows, and one for its weights.

    Raises:
        Unsupported: there are no calibration rows, no layer is of a size that the kernels take, or the card has
            no FP8.
    """
    return _compress(module, bench, "fp8_static", Fp8Product, (MINMAX, PERCENTILE))


class Fp8RowwiseProduct(nn.Module):
    """``[M, K] -> [M, N]`` with dynamic row-wise scales.

    Args:
        gemm: the layer.
    """

    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None

    def __init__(self, gemm: Gemm) -> None:
        super().__init__()
        scales = channel_scales(gemm.weight, LARGEST)  # [N, 1]
        self.register_buffer("weight", constant(to_fp8(gemm.weight, scales)))  # [N, K]
        self.register_buffer("weight_scales", constant(scales.t()))  # [1, N]
        self.answer_dtype = answer_dtype(gemm, rowwise=True)
        self.register_buffer("bias", None if gemm.bias is None else constant(gemm.bias.to(self.answer_dtype)))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[M, K]`` of any floating dtype to ``[M, N]``."""
        if statically_known_true(rows.shape[0] > 0):
            return self._product(rows)
        # An expert without tokens: the operator takes no scales of 0 rows. Two more, not one: where their number is
        # known only while running, an export would have to know whether there is a single scale.
        return self._product(F.pad(rows, (0, 0, 0, 2)))[:-2]

    def _product(self, rows: Tensor) -> Tensor:
        scales = row_scales(rows, LARGEST)  # [M, 1]
        return torch._scaled_mm(
            to_fp8(rows, scales),
            self.weight.t(),
            scale_a=scales,
            scale_b=self.weight_scales,
            bias=self.bias,
            out_dtype=self.answer_dtype,
            use_fast_accum=True,
        )


class Fp8Product(nn.Module):
    """``[M, K] -> [M, N]`` with one scale for the activations and one for the weights.

    A static scale is a number in the graph and not a tensor, so that layers which share an input quantise it by
    the same operator, and a compiler does it once.

    Args:
        gemm: the layer.
        bound: the magnitude that becomes the largest code; 0 finds it anew for every call.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(self, gemm: Gemm, bound: float = 0.0) -> None:
        super().__init__()
        scale = _tensor_scale(gemm.weight)
        self.register_buffer("weight", constant(to_fp8(gemm.weight, scale)))  # [N, K]
        self.register_buffer("weight_scale", constant(scale))  # []
        self.answer_dtype = answer_dtype(gemm, rowwise=False)
        self.register_buffer("bias", None if gemm.bias is None else constant(gemm.bias.to(self.answer_dtype)))
        self.static_scale = bound / LARGEST
        self.register_buffer("input_scale", constant(torch.full_like(scale, self.static_scale)))  # []

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[M, K]`` of any floating dtype to ``[M, N]``."""
        if self.static_scale:
            scale = self.input_scale
            codes = (rows.float() * (1.0 / self.static_scale)).clamp(-LARGEST, LARGEST).to(FP8)
        else:
            scale = _tensor_scale(rows)
            codes = to_fp8(rows, scale)
        return torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.answer_dtype,
            use_fast_accum=True,
        )


def to_fp8(tensor: Tensor, scale: Tensor) -> Tensor:
    """A tensor divided by its scale (fp32, broadcast) and rounded to e4m3, saturating: PyTorch's cast gives NaN."""
    return (tensor.float() * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(FP8)


def answer_dtype(gemm: Gemm, *, rowwise: bool) -> torch.dtype:
    """The layer's own dtype where ``torch._scaled_mm`` gives answers in it here, else bf16.

    Row-wise scales with fp16 answers need cuBLAS 12.9 on Hopper or a recent CUTLASS kernel, and fp32 answers take
    no bias; asking the operator is surer than a table of versions.
    """
    return _answer_dtype(gemm.weight.dtype, str(gemm.weight.device), rowwise, gemm.bias is not None)


@functools.cache
def _answer_dtype(dtype: torch.dtype, device: str, rowwise: bool, has_bias: bool) -> torch.dtype:
    size = 2 * _ALIGNMENT
    codes = torch.ones(size, size, device=device).to(FP8)
    scale = torch.ones((), device=device)
    scales = (torch.ones(size, 1, device=device), torch.ones(1, size, device=device)) if rowwise else (scale, scale)
    bias = torch.ones(size, dtype=dtype, device=device) if has_bias else None
    try:
        torch._scaled_mm(codes, codes.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    except (RuntimeError, ValueError, NotImplementedError):
        return torch.bfloat16
    return dtype


def _tensor_scale(tensor: Tensor) -> Tensor:
    """The scale of a whole ``[M, K]``; M may be 0, as for an expert without tokens, where a maximum is not defined."""
    rows = tensor.abs().amax(-1)  # [M]
    return F.pad(rows, (0, 1)).amax().float().clamp_min(SMALLEST_AMAX) / LARGEST


def _compress(
    module: FlatModule, bench: Bench, name: str, make: Callable[[Gemm, float], nn.Module], methods: tuple[str, ...] = ()
) -> FlatModule:
    require_capability(bench, _LOWEST_CAPABILITY, "FP8")
    return compress(module, bench, Scheme(name, lambda gemm: gemm.is_aligned(_ALIGNMENT, _ALIGNMENT), make, methods))
