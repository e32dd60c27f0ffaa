"""Weight-only layers: as exact as their bits allow and not more, and whole again behind a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.transforms.weight_only import Int4WeightProduct, Int8WeightProduct, few_rows_product, to_int4
from tests.unit.transforms.linears import (
    LINEARS,
    activations,
    bench,
    channel_errors,
    compressed,
    error,
    flat,
    gemm,
    rows,
    swapped,
    through_a_file,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_as_exact_as_eight_bits(dtype: torch.dtype) -> None:
    layer, x = gemm(dtype=dtype, bias=dtype == torch.float32), activations(dtype=dtype)
    errors = channel_errors(Int8WeightProduct(layer), layer, x)
    assert errors.max() < 0.015
    assert errors.median() > 0.003


def test_int8_codes_do_not_overflow_fp16() -> None:
    layer = gemm(48, 256, torch.float16, bias=False)
    x = torch.full((3, 256), 60.0, dtype=torch.float16)
    found = Int8WeightProduct(layer)(x)
    assert found.isfinite().all()
    assert error(found, x.double() @ layer.weight.double().t()) < 0.01


def test_the_reduction_for_few_rows_gives_the_same() -> None:
    product, x = Int8WeightProduct(gemm(bias=False)), activations(3)
    torch.testing.assert_close(few_rows_product(x, product.weight) * product.scales, product(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [256, 192, 96])  # groups of 128, 64 and 32
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_is_as_exact_as_four_bits(dtype: torch.dtype, inputs: int) -> None:
    layer, x = gemm(48, inputs, dtype, bias=dtype == torch.float32), activations(inputs=inputs, dtype=dtype)
    errors = channel_errors(Int4WeightProduct(layer), layer, x)
    assert errors.max() < 0.15
    assert errors.median() > 0.04


@pytest.mark.parametrize("group", [32, 128])
def test_int4_codes_mean_what_the_kernel_computes(group: int) -> None:
    layer = gemm(32, 128, bias=False)
    codes, scales, offsets = to_int4(layer.weight, group)
    assert (int(codes.amin()), int(codes.amax())) == (0, 15)
    weight = ((codes.reshape(32, -1, group) - 8) * scales[..., None] + offsets[..., None]).flatten(1)
    assert ((weight - layer.weight).abs() <= 0.56 * scales.repeat_interleave(group, 1) + 1e-3).all()
    if group == 128:
        x = activations(inputs=128).bfloat16()
        found = Int4WeightProduct(layer)(x)
        assert error(found, F.linear(x.float(), weight)) < ROUNDING[torch.bfloat16]


def test_int4_of_a_constant_row_is_that_row() -> None:
    layer = gemm(16, 128, bias=False)
    layer.weight.fill_(0.5)
    torch.testing.assert_close(Int4WeightProduct(layer)(torch.ones(2, 128)), torch.full((2, 16), 64.0))


@pytest.mark.parametrize("before", [(), ("fp16",), ("bf16",)])
@pytest.mark.parametrize("name", ["int8_weights", "int4_weights"])
def test_layers_are_swapped_and_survive_a_file(name: str, before: tuple[str, ...], tmp_path: Path) -> None:
    x, module = rows(), flat()
    wanted = module(x)[0]
    module = compressed(name, module, bench(calibration=None), before)
    assert swapped(module) == (LINEARS if name == "int8_weights" else LINEARS[:-1])
    found = module(x)[0]
    assert 0.001 < error(found, wanted) < (0.02 if name == "int8_weights" else 0.2)
    loaded = through_a_file(module, x, tmp_path, dynamic=True)
    assert torch.equal(loaded(x)[0], found)
    coded = [t for t in loaded.state_dict().values() if t.dtype in (torch.int8, torch.uint8)]
    assert len(coded) == len(swapped(module))


def test_nothing_of_a_fitting_size() -> None:
    module = FlatModule(nn.Conv2d(3, 8, 3), positional(("x",))).eval()
    with pytest.raises(Unsupported, match="no layer that int8_weights applies to"):
        compressed("int8_weights", module, bench())
    module = FlatModule(nn.Linear(20, 16), positional(("x",))).eval()
    with pytest.raises(Unsupported, match="no layer that int4_weights applies to"):
        compressed("int4_weights", module, bench())
