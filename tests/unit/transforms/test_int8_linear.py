"""INT8 layers: as exact as eight bits allow and not more, exact sums, and whole again behind a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onecard.errors import Unsupported
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, positional
from onecard.transforms.int8_linear import Int8Product, dynamic_int8_linear, int_mm, static_int8_linear
from tests.unit.transforms.linears import (
    ALIGNED,
    IMAGES,
    Pixels,
    activations,
    bench,
    channel_errors,
    error,
    flat,
    gemm,
    rows,
    strict_judge,
    swapped,
    through_a_file,
)

BOTH = (dynamic_int8_linear, static_int8_linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_channel_is_as_exact_as_eight_bits(dtype: torch.dtype) -> None:
    layer, x = gemm(dtype=dtype, bias=dtype == torch.float32), activations(dtype=dtype)
    errors = channel_errors(Int8Product(layer), layer, x)
    assert errors.max() < 0.02
    assert errors.median() > 0.004


def test_the_codes_are_symmetric_whole_numbers_of_full_range() -> None:
    product = Int8Product(gemm())
    assert product.weight.dtype == torch.int8
    assert product.weight.amin() >= -127
    assert (product.weight.int().abs().amax(1) == 127).all()


def test_whole_numbers_come_out_exactly() -> None:
    layer = gemm(16, 32, bias=False)
    layer.weight.copy_(torch.randint(-126, 127, (16, 32)))
    layer.weight[:, 0] = 127
    x = torch.randint(-126, 127, (40, 32)).float()
    x[:, 0] = -127
    for product in (Int8Product(layer), Int8Product(layer, 127.0)):
        torch.testing.assert_close(product(x), x @ layer.weight.t(), rtol=1e-6, atol=0)


def test_a_static_scale_saturates_beyond_its_bound() -> None:
    layer, x = gemm(), activations(4)
    static = Int8Product(layer, 2.0)
    assert torch.equal(static(1e9 * x), static(2.0 * x.sign()))
    assert channel_errors(static, layer, x.clamp(-2, 2)).max() < 0.05


@pytest.mark.parametrize("compress", BOTH)
def test_layers_of_eights_are_swapped_and_answers_stay_close(compress: Any, tmp_path: Path) -> None:
    x, module = rows(), flat()
    wanted = module(x)[0]
    module = compress(module, bench())
    assert swapped(module) == ALIGNED
    found = module(x)[0]
    assert 1e-4 < error(found, wanted) < 0.01
    loaded = through_a_file(module, x, tmp_path, dynamic=True)
    assert torch.equal(loaded(x)[0], found)
    stored = [tensor.dtype for tensor in loaded.state_dict().values()]
    assert stored.count(torch.int8) == len(ALIGNED)


def test_pointwise_convolutions_count_in_channels_last() -> None:
    x, module = rows(IMAGES), flat(Pixels)
    wanted = module(x)[0]
    module.channels_last = True
    assert swapped(dynamic_int8_linear(module, bench(IMAGES))) == ("narrow", "wide", "head")
    assert 1e-4 < error(module(x)[0], wanted) < 0.02


def test_a_percentile_is_kept_where_an_outlier_spoils_the_largest() -> None:
    torch.manual_seed(0)
    module = FlatModule(nn.Linear(32, 32), positional(("x",))).eval().requires_grad_(False)
    calibration = torch.randn(512, 6, 32)
    calibration[0, 0, :3] = 400.0
    found: list[Compression] = []
    static_int8_linear(
        module, bench(calibration={"x": calibration}, judge=strict_judge(module, 0.1), record=found.append)
    )
    assert found[0].method == "percentile"
    assert found[0].trials[0].error > 3 * found[0].trials[1].error


def test_a_layer_that_calibration_never_reaches_is_left_alone() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.used(x)
            return answer

    assert swapped(static_int8_linear(flat(Idle), bench())) == ("used",)
    assert swapped(dynamic_int8_linear(flat(Idle), bench())) == ("used", "idle")


@pytest.mark.parametrize("compress", BOTH)
def test_nothing_of_a_fitting_size(compress: Any) -> None:
    module = FlatModule(nn.Linear(32, 10), positional(("x",))).eval()
    with pytest.raises(Unsupported, match="no layer that int8"):
        compress(module, bench())


@pytest.mark.parametrize("count", [1, 16, 17])
def test_sums_are_exact_for_few_rows(count: int) -> None:
    codes, weight = (
        torch.randint(-127, 128, (count, 64)).to(torch.int8),
        torch.randint(-127, 128, (24, 64)).to(torch.int8),
    )
    assert torch.equal(int_mm(codes, weight).long(), codes.long() @ weight.long().t())
