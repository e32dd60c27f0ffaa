"""INT8 linear layers: weights and activations as 8-bit integers, products summed exactly in int32.

Symmetric, a scale for each output channel of the weights (Wu et al. 2020, "Integer Quantization for Deep Learning
Inference", section 3). The scales of both sides are applied to the int32 sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from onecard.calibration.bench import Bench
from onecard.models.flat import FlatModule
from onecard.transforms.low_precision import (
    MINMAX,
    PERCENTILE,
    Gemm,
    Scheme,
    channel_scales,
    compress,
    constant,
    require_capability,
    row_scales,
)

LARGEST = 127
"""The largest code; -128 is not used, so that the range is symmetric."""

_ALIGNMENT = 8  # of K and N, which torch._int_mm asks for on a card
_TOO_FEW_ROWS = 16  # torch._int_mm wants more on a card
_PADDED_ROWS = 32
_LOWEST_CAPABILITY = (7, 5)  # Turing: integer tensor cores


def dynamic_int8_linear(module: FlatModule, bench: Bench) -> FlatModule:
    """A scale for each row of activations, found while running.

    Raises:
        Unsupported: no layer is of a size that the kernels take, or the card is too old.
    """
    return _compress(module, bench, "int8_dynamic", ())


def static_int8_linear(module: FlatModule, bench: Bench) -> FlatModule:
    """One scale for all activations of a layer, from the calibration rows.

    Raises:
        Unsupported: there are no calibration rows, no layer is of a size that the kernels take, or the card is too
            old.
    """
    return _compress(module, bench, "int8", (MINMAX, PERCENTILE))


class Int8Product(nn.Module):
    """``[M, K] -> [M, N]`` with integer weights and activations.

    Args:
        gemm: the layer.
        bound: the magnitude of activations that becomes the largest code; 0 finds it for every row of each call.
    """

    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None

    def __init__(self, gemm: Gemm, bound: float = 0.0) -> None:
        super().__init__()
        scales = channel_scales(gemm.weight, LARGEST)  # [N, 1]
        self.static_scale = bound / LARGEST
        self.register_buffer("weight", constant(to_int8(gemm.weight.float() / scales)))  # [N, K]
        self.register_buffer("weight_scales", constant(scales.t() * (self.static_scale or 1.0)))  # [1, N]
        self.register_buffer("bias", None if gemm.bias is None else constant(gemm.bias.float()))  # [N]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[M, K]`` of any floating dtype to ``[M, N]`` in that dtype."""
        if self.static_scale:
            codes = to_int8(rows.float() * (1.0 / self.static_scale))
            answer = int_mm(codes, self.weight).float() * self.weight_scales
        else:
            scales = row_scales(rows, LARGEST)  # [M, 1]
            codes = to_int8(rows.float() * scales.reciprocal())
            answer = int_mm(codes, self.weight).float() * scales * self.weight_scales
        if self.bias is not None:
            answer = answer + self.bias
        return answer.to(rows.dtype)


def to_int8(tensor: Tensor) -> Tensor:
    """A tensor in units of its scale rounded to codes, saturating."""
    return tensor.round().clamp(-LARGEST, LARGEST).to(torch.int8)


def int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """``[M, K]`` times ``[N, K]`` transposed, int8 to int32 ``[M, N]``; few rows are padded on a card."""
    rows = codes.shape[0]
    if codes.is_cuda and not statically_known_true(rows > _TOO_FEW_ROWS):
        return torch._int_mm(F.pad(codes, (0, 0, 0, _PADDED_ROWS)), weight.t())[:rows]
    return torch._int_mm(codes, weight.t())


def _compress(module: FlatModule, bench: Bench, name: str, methods: tuple[str, ...]) -> FlatModule:
    require_capability(bench, _LOWEST_CAPABILITY, "INT8")
    scheme = Scheme(name, lambda gemm: gemm.is_aligned(_ALIGNMENT, _ALIGNMENT), Int8Product, methods)
    return compress(module, bench, scheme)
