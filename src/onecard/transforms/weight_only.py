"""Weight-only quantisation: weights of 8 or 4 bits, arithmetic in the activations' own precision.

It saves memory, and time where few rows share the reading of the weights. Four bits have an offset and a scale for
each group of inputs, as in GPTQ and AWQ files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from onecard.calibration.bench import Bench
from onecard.models.flat import FlatModule
from onecard.transforms.low_precision import (
    SMALLEST_AMAX,
    Gemm,
    Scheme,
    channel_scales,
    compress,
    constant,
    require_capability,
)

GROUP = 128
"""Weights of one row that share a scale and an offset in int4, where the row's length is a multiple of it."""

_GROUPS = (GROUP, 64, 32)
_LARGEST_INT8 = 127
_LEVELS, _MIDDLE = 15, 8  # int4 codes are 0..15, and code 8 stands for the offset
_INT4_CAPABILITY = (8, 0)  # Ampere: bf16 tensor cores
_INT4_OUTPUTS = {"cuda": 8, "cpu": 16}  # what N must be a multiple of
_FEW_ROWS = 4  # up to here a reduction that reads the codes beats a product that reads widened weights


def int8_weights(module: FlatModule, bench: Bench) -> FlatModule:
    """Weights as 8-bit integers with a scale for each output channel.

    Raises:
        Unsupported: the model has no linear layer.
    """
    scheme = Scheme("int8_weights", lambda gemm: True, lambda gemm, _: Int8WeightProduct(gemm), convolutions=False)
    return compress(module, bench, scheme)


def int4_weights(module: FlatModule, bench: Bench) -> FlatModule:
    """Weights as 4-bit integers with a scale and an offset for each group of inputs.

    Raises:
        Unsupported: no linear layer is of a size that the kernels take, or the card is too old.
    """
    require_capability(bench, _INT4_CAPABILITY, "INT4")
    outputs = _INT4_OUTPUTS[torch.device(bench.device).type]
    scheme = Scheme(
        "int4_weights",
        lambda gemm: gemm.is_aligned(outputs, _GROUPS[-1]),
        lambda gemm, _: Int4WeightProduct(gemm),
        convolutions=False,
    )
    return compress(module, bench, scheme)


class Int8WeightProduct(nn.Module):
    """``[M, K] -> [M, N]`` with 8-bit weights.

    Args:
        gemm: the layer.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, gemm: Gemm) -> None:
        super().__init__()
        scales = channel_scales(gemm.weight, _LARGEST_INT8)
        codes = (gemm.weight.float() / scales).round().clamp(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8)
        self.register_buffer("weight", constant(codes))  # [N, K]
        self.register_buffer("scales", constant(scales.squeeze(1)))  # [N]
        self.register_buffer("bias", None if gemm.bias is None else constant(gemm.bias))  # [N]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[M, K]`` of any floating dtype to ``[M, N]`` in that dtype."""
        if rows.is_cuda and statically_known_true(rows.shape[0] <= _FEW_ROWS):
            answer = few_rows_product(rows, self.weight) * self.scales
        elif rows.dtype == torch.float16:
            # The codes alone would overflow fp16, so the scales go in first. The two steps between the codes and
            # fp16 keep a compiler from folding all of it into fp16 constants, twice as large: TorchInductor
            # leaves just this conversion, int8 to bf16 (which is exact), where it stands.
            weight = (self.weight.to(torch.bfloat16).t().float() * self.scales).half()
            answer = rows @ weight
        else:
            answer = (rows @ self.weight.to(torch.bfloat16).t().to(rows.dtype)) * self.scales
        return (answer if self.bias is None else answer + self.bias).to(rows.dtype)


def few_rows_product(rows: Tensor, weight: Tensor) -> Tensor:
    """``[M, K]`` times int8 ``[N, K]`` transposed, fp32 ``[M, N]``: compiled, one kernel that reads the codes."""
    return (rows.float().unsqueeze(1) * weight).sum(-1)


class Int4WeightProduct(nn.Module):
    """``[M, K] -> [M, N]`` with 4-bit weights, packed for the device that they are on.

    Args:
        gemm: the layer.
    """

    weight: Tensor
    scales_and_offsets: Tensor
    bias: Tensor | None

    def __init__(self, gemm: Gemm) -> None:
        super().__init__()
        self.group = next(size for size in _GROUPS if gemm.inputs % size == 0)
        codes, scales, offsets = to_int4(gemm.weight, self.group)
        self.register_buffer("weight", constant(_packed(codes)))
        pairs = torch.stack([scales, offsets], -1).transpose(0, 1)  # [K / group, N, 2]
        self.register_buffer("scales_and_offsets", constant(pairs.bfloat16()))
        self.register_buffer("bias", None if gemm.bias is None else constant(gemm.bias))  # [N]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[M, K]`` of any floating dtype to ``[M, N]`` in that dtype; the arithmetic is bf16."""
        multiply = torch._weight_int4pack_mm if rows.is_cuda else torch._weight_int4pack_mm_for_cpu
        answer = multiply(rows.bfloat16(), self.weight, self.group, self.scales_and_offsets).to(rows.dtype)
        return answer if self.bias is None else answer + self.bias


def to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offsets: a weight is ``(code - 8) * scale + offset``.

    The scales and offsets are rounded to bf16, as the kernels have them, before the codes are chosen.

    Args:
        weight: ``[N, K]``.
        group: weights of one row that share a scale; divides K.

    Returns:
        Codes 0..15, int32 ``[N, K]``; scales and offsets, fp32 ``[N, K / group]``.
    """
    groups = weight.float().reshape(len(weight), -1, group)  # [N, K / group, group]
    low, high = groups.aminmax(dim=-1)
    scales = ((high - low).clamp_min(SMALLEST_AMAX) / _LEVELS).bfloat16().float()
    offsets = (low + scales * _MIDDLE).bfloat16().float()
    codes = ((groups - offsets.unsqueeze(-1)) / scales.unsqueeze(-1)).round().add(_MIDDLE).clamp(0, _LEVELS)
    return codes.to(torch.int32).flatten(1), scales, offsets


def _packed(codes: Tensor) -> Tensor:
    """Codes ``[N, K]`` as the kernel of their device wants them."""
    if not codes.is_cuda:
        return torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # [N, K / 2]
    inner_tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (tiles * 16) == 0)
    return torch._convert_weight_to_int4pack(pairs.contiguous(), inner_tiles)
