"""2:4 sparsity: of every four weights along the inputs the two largest stay, which tensor cores can skip over.

The pattern and the magnitude rule: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks". Without
fine-tuning it costs accuracy, and whether that is bearable is for the gate to say. On a card with cuSPARSELt the
products are sparse; elsewhere the weights have the same zeros and are stored densely: same numbers, no gain.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from onecard.calibration.bench import Bench
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.transforms.low_precision import Gemm, Scheme, compress, constant, require_capability

_ALIGNMENT = 16  # of K and N in fp16 and bf16, which cuSPARSELt asks for
_ROW_ALIGNMENT = 8  # of M
_LOWEST_CAPABILITY = (8, 0)  # Ampere
_KEPT, _OF = 2, 4


def sparse24(module: FlatModule, bench: Bench) -> FlatModule:
    """Prune linear layers and 1x1 convolutions to 2:4.

    Raises:
        Unsupported: no layer is of a size that the kernels take, the card is too old, cuSPARSELt is missing, or
            the model is not in half precision on a card.
    """
    on_card = bench.device.startswith("cuda")
    require_capability(bench, _LOWEST_CAPABILITY, "2:4 sparsity")
    if on_card and not torch.backends.cusparselt.is_available():
        raise Unsupported("this build of PyTorch has no cuSPARSELt", "Install a CUDA build of PyTorch that has it.")

    def fits(gemm: Gemm) -> bool:
        is_half = gemm.weight.dtype in (torch.float16, torch.bfloat16)
        return gemm.is_aligned(_ALIGNMENT, _ALIGNMENT) and (is_half or not on_card)

    def make(gemm: Gemm, bound: float) -> nn.Module:
        return Sparse24Product(gemm) if on_card else MaskedProduct(gemm)

    # What half of the weights cost, fine-tuning must win back; rounding errors do not tell which layers to spare.
    return compress(module, bench, Scheme("sparse24", fits, make, mixes=False))


class Sparse24Product(nn.Module):
    """``[M, K] -> [M, N]`` with weights compressed by cuSPARSELt, for one kind of card.

    Args:
        gemm: the layer, in fp16 or bf16 on a card.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, gemm: Gemm) -> None:
        super().__init__()
        self.register_buffer("weight", constant(torch._cslt_compress(prune24(gemm.weight).contiguous())))
        self.register_buffer("bias", None if gemm.bias is None else constant(gemm.bias))  # [N]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[M, K]`` in the weights' dtype to ``[M, N]``."""
        count = rows.shape[0]
        x = rows.to(self.weight.dtype)
        if not statically_known_true(count % _ROW_ALIGNMENT == 0):
            x = F.pad(x, (0, 0, 0, -count % _ROW_ALIGNMENT))
        # The sparse matrix comes first: [N, K] times [K, M], and the transposed result is [M, N] again.
        answer = torch._cslt_sparse_mm(self.weight, x.t(), bias=self.bias, transpose_result=True)
        return answer[:count]


class MaskedProduct(nn.Module):
    """``[M, K] -> [M, N]`` with the same zeros in dense weights.

    Args:
        gemm: the layer.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, gemm: Gemm) -> None:
        super().__init__()
        self.register_buffer("weight", constant(prune24(gemm.weight)))  # [N, K]
        self.register_buffer("bias", None if gemm.bias is None else constant(gemm.bias))  # [N]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[M, K]`` in the weights' dtype to ``[M, N]``."""
        return F.linear(rows, self.weight, self.bias)


def prune24(weight: Tensor) -> Tensor:
    """Zero all but the two largest magnitudes of every four weights.

    Args:
        weight: ``[N, K]``, K a multiple of 4.

    Returns:
        A new tensor of the same shape and dtype; of equal magnitudes the first stay.
    """
    fours = weight.detach().reshape(len(weight), -1, _OF)  # [N, K / 4, 4]
    order = fours.float().abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(fours).scatter(-1, order[..., :_KEPT], fours.gather(-1, order[..., :_KEPT])).flatten(1)
