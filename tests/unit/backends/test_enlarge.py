"""An answer that is enlarged at the end is cast and laid out while it is small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

from onecard.backends.enlarge import enlarge_last

aten = torch.ops.aten
BILINEAR = aten.upsample_bilinear2d.vec


class Segmenter(nn.Module):
    """Small pictures of classes, enlarged; what follows is given."""

    def __init__(self, after, mode: str = "bilinear", scale: float = 8.0) -> None:
        super().__init__()
        self.classes = nn.Conv2d(3, 5, 3, stride=8, padding=1).half().to(memory_format=torch.channels_last)
        self.after, self.mode, self.scale = after, mode, scale

    def forward(self, image: Tensor) -> Tensor:
        small = self.classes(image.half().contiguous(memory_format=torch.channels_last))
        align = None if self.mode == "nearest" else False
        return self.after(F.interpolate(small, scale_factor=self.scale, mode=self.mode, align_corners=align))


class Bytes(nn.Module):
    """Small pictures of bytes, enlarged and cast."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate((image * 255).to(torch.uint8), scale_factor=4.0, mode=self.mode).float()


class Pooled(nn.Module):
    """Pictures of one pixel, as in DeepLabV3's pooling branch, enlarged and read as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Conv2d(3, 5, 1).to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        pixel = F.adaptive_avg_pool2d(self.classes(image.contiguous(memory_format=torch.channels_last)), 1)
        return F.interpolate(pixel, size=(8, 8), mode="bilinear").contiguous()


def as_an_answer(x: Tensor) -> Tensor:
    return x.contiguous().to(torch.float32)


def rewritten(model: nn.Module, batch: int = 2, *, dynamic: bool = False) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    image = torch.randn(batch, 3, 32, 40)
    dims = {"image": {0: Dim("B", min=1, max=8)}} if dynamic else None
    program = torch.export.export(model.eval(), (image,), dynamic_shapes=dims)
    return enlarge_last(program.module()), image


def order(module: fx.GraphModule) -> list:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_the_picture_is_made_once_in_the_dtype_of_the_answer(mode, dynamic):
    model = Segmenter(as_an_answer, mode)
    module, image = rewritten(model, dynamic=dynamic)
    assert str(order(module)[-1]).startswith("aten.upsample_")
    with torch.inference_mode():
        found, wanted = module(image), model(image)
    assert found.dtype == torch.float32
    assert found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_the_answer_is_nearer_to_the_exact_one_than_before():
    model = Segmenter(as_an_answer)
    module, image = rewritten(model)
    with torch.inference_mode():
        small = model.classes(image.half().contiguous(memory_format=torch.channels_last))
        exact = F.interpolate(small.double(), scale_factor=8.0, mode="bilinear", align_corners=False)
        before, after = ((x(image).double() - exact).norm() for x in (model, module))
    assert after < before / 10


@pytest.mark.parametrize(
    "model",
    [
        Segmenter(lambda x: x.to(torch.bfloat16)),  # not all of fp16's numbers are bf16's
        Segmenter(lambda x: x.to(torch.int32)),
        Segmenter(lambda x: x.relu().float()),
        Segmenter(lambda x: x.float() + x.abs()),  # read twice
        Segmenter(as_an_answer, scale=0.5),  # here the cast is the smaller one behind it
        Bytes("bilinear"),  # rounds
        Bytes("bicubic"),  # and saturates
    ],
)
def test_what_would_change_or_not_pay_stays(model):
    module, image = rewritten(model)
    assert order(module)[-1] is not BILINEAR
    with torch.inference_mode():
        torch.testing.assert_close(module(image), model(image), rtol=0, atol=0)


def test_bytes_are_cast_before_they_are_repeated():
    module, image = rewritten(Bytes("nearest"))
    assert order(module)[-1] is aten.upsample_nearest2d.vec
    with torch.inference_mode():
        assert torch.equal(module(image), Bytes("nearest")(image))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layout_that_one_pixel_does_not_tell_is_kept(dynamic):
    model = Pooled()
    module, image = rewritten(model, dynamic=dynamic)
    with torch.inference_mode():
        found, wanted = module(image), model(image)
    assert found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
