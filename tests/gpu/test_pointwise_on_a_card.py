"""Respelled elementwise operators as kernels on a real card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onecard.backends.pointwise import respell_pointwise

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

FP8 = torch.float8_e4m3fn


class Cast(nn.Module):
    """The cast of static FP8 layers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * 2.0).clamp(-448.0, 448.0).to(FP8)


def compiled(module: nn.Module, x: Tensor) -> Tensor:
    program = torch.export.export(module, (x,))
    answer: Tensor = torch.compile(respell_pointwise(program.module()))(x)
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_without_its_clamp_saturates_and_keeps_nan(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a card with FP8")
    edges = [224.0, -224.0, 230.0, 232.0, 240.0, -260.0, 3e4, -3e4, float("inf"), float("-inf"), float("nan")]
    x = torch.cat([torch.tensor(edges), torch.randn(1013) * 200]).to("cuda", dtype)
    found, wanted = compiled(Cast(), x), Cast()(x)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)
    assert found.float()[6:8].tolist() == [448.0, -448.0]
    assert found.float()[10].isnan()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_is_as_exact_as_its_rounding(dtype: torch.dtype, approximate: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.randn(100_000)]).to("cuda", dtype)
    wanted = nn.functional.gelu(x.double(), approximate=approximate)
    found = compiled(nn.GELU(approximate), x)
    rounding = (wanted.to(dtype).double() - wanted).norm()
    assert (found.double() - wanted).norm() <= 1.1 * rounding
