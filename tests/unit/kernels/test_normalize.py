"""Normalising pictures: the reference against plain arithmetic, the kernel (interpreted here) against the reference."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.kernels import normalize as module

SHAPES = [(2, 5, 7), (1, 1, 1), (3, 1, 33), (2, 31, 67), (0, 4, 4), (1, 64, 32)]  # [B, H, W]
CHANNELS = (1, 3, 4)
MEAN, STD = (123.675, 116.28, 103.53, 0.0), (58.395, 57.12, 57.375, 255.0)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """The module once more, with its kernel run by Triton's interpreter."""
    pytest.importorskip("triton", reason="needs triton (pip install triton)")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("normalize_interpreted", module.__file__)
    assert spec and spec.loader
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    yield fresh
    patch.undo()


def pictures(shape: tuple[int, int, int], channels: int, layout: str) -> Tensor:
    """Random bytes [B, C, H, W], lying in memory as the layout says."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(batch * height * width)
    order = (batch, height, width, channels) if layout == "NHWC" else (batch, channels, height, width)
    raw = torch.randint(0, 256, order, dtype=torch.uint8, generator=generator)
    return raw.permute(0, 3, 1, 2) if layout == "NHWC" else raw


def plain(raw: Tensor, dtype: torch.dtype) -> Tensor:
    channels = raw.shape[1]
    mean = torch.tensor(MEAN[:channels]).view(-1, 1, 1)
    inverse = torch.tensor([1 / s for s in STD[:channels]]).view(-1, 1, 1)
    return ((raw.float() - mean) * inverse).to(dtype)


def outputs(raw: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Where the answer may go: each layout, and a part of something larger."""
    batch, channels, height, width = raw.shape
    empty = torch.empty(raw.shape, dtype=dtype)
    return {
        "contiguous": empty,
        "channels_last": torch.empty(raw.shape, dtype=dtype).to(memory_format=torch.channels_last),
        "part": torch.zeros(batch + 2, channels, height + 1, width + 3, dtype=dtype)[1:-1, :, :height, :width],
    }


CASES = list(itertools.product(SHAPES, CHANNELS, ("NHWC", "NCHW"), module.FLOATS))


@pytest.mark.parametrize(("shape", "channels", "layout", "dtype"), CASES)
def test_the_reference_is_plain_arithmetic(shape: tuple, channels: int, layout: str, dtype: torch.dtype) -> None:
    raw = pictures(shape, channels, layout)
    for normalize in (module.normalize, module.normalize_reference):  # small pictures take another way on a CPU
        for out in outputs(raw, dtype).values():
            normalize(raw, MEAN[:channels], STD[:channels], out)
            assert torch.equal(out, plain(raw, dtype))


@pytest.mark.parametrize(("shape", "channels", "layout", "dtype"), CASES)
def test_the_kernel_gives_the_reference_to_the_bit(
    interpreted: Any, shape: tuple, channels: int, layout: str, dtype: torch.dtype
) -> None:
    raw = pictures(shape, channels, layout)
    expected = plain(raw, dtype)
    if dtype == torch.bfloat16:  # the interpreter cuts off what a GPU rounds
        expected = (plain(raw, torch.float32).view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    for name, out in outputs(raw, dtype).items():
        interpreted.launch(raw, MEAN[:channels], STD[:channels], out)
        assert torch.equal(out, expected), name


def test_the_kernel_writes_nothing_beside_its_part(interpreted: Any) -> None:
    whole = torch.full((3, 3, 40, 40), 9.0)
    raw = pictures((1, 31, 37), 3, "NHWC")
    interpreted.launch(raw, MEAN[:3], STD[:3], whole[1:2, :, :31, :37])
    whole[1:2, :, :31, :37] = 9.0
    assert whole.eq(9.0).all()


@pytest.mark.parametrize(
    ("raw", "out", "values", "message"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), 3, "takes uint8"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2, dtype=torch.float64), 3, "float64"),
        (torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.zeros(1, 3, 2, 2), 3, "one shape"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2), 2, "3 channels want as many"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2, device="meta"), 3, "raw is on cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(raw: Tensor, out: Tensor, values: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.normalize(raw, MEAN[:values], STD[:values], out)
