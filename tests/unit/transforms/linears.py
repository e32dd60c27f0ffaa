"""What the tests of low-precision layers share: small models, a bench, and the round trip through a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from onecard.backends.export import quiet_export
from onecard.calibration.bench import Bench, Judgement
from onecard.models.exported import flat_program, load_exported, save_exported
from onecard.models.flat import FlatModule, positional
from onecard.spec import TensorSpec, parse_spec
from onecard.transforms import apply_transforms
from onecard.transforms.low_precision import Gemm, GemmLayer


class Attention(nn.Module):
    """Three projections of one input, and a feed-forward part: the linears of an encoder layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 10)  # 10 is a multiple of neither 8 nor 16

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(x + self.down(nn.functional.gelu(self.up(mixed))))


TOKENS = ("x: float32[B,6,32], B=2..8",)
LINEARS = ("query", "key", "value", "up", "down", "head")
ALIGNED = LINEARS[:-1]


class Pixels(nn.Module):
    """1x1 convolutions of every kind, of which only ``narrow`` and ``wide`` are matrix products over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.narrow, self.wide = nn.Conv2d(32, 16, 1, bias=False), nn.Conv2d(16, 32, 1)
        self.strided, self.grouped = nn.Conv2d(32, 32, 1, stride=2), nn.Conv2d(32, 32, 1, groups=2)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.grouped(self.strided(x + self.wide(self.narrow(x).relu())))
        return self.head(x.mean((2, 3)))


IMAGES = ("x: float32[B,3,8,8], B=2..8",)


def flat(model: type[nn.Module] | Callable[[], nn.Module] = Attention) -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(model(), positional(("x",))).eval().requires_grad_(False)


def bench(specs: tuple[str, ...] = TOKENS, **more: Any) -> Bench:
    """A bench with 12 random calibration rows and no judge."""
    spec = msgspec.structs.replace(parse_spec(specs), outputs=(TensorSpec("y", "float32", ("B",)),))
    shape = [16 if isinstance(dim, str) else dim for dim in spec.inputs[0].shape]
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return Bench(spec, "cpu", {"x": rows[:2]}, **{"calibration": {"x": rows[:12]}, **more})


def rows(specs: tuple[str, ...] = TOKENS, count: int = 4) -> Tensor:
    shape = [count if isinstance(dim, str) else dim for dim in parse_spec(specs).inputs[0].shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def compressed(name: str, module: FlatModule, place: Bench, before: tuple[str, ...] = ()) -> FlatModule:
    return apply_transforms(module, [*before, name], dict(place.inputs), place)


def swapped(module: FlatModule) -> tuple[str, ...]:
    """The names of the layers that were compressed."""
    return tuple(name for name, layer in module.inner.named_modules() if isinstance(layer, GemmLayer))


def gemm(outputs: int = 48, inputs: int = 256, dtype: torch.dtype = torch.float32, bias: bool = True) -> Gemm:
    """A layer whose output channels have weights of very different size."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-2, 0, outputs).unsqueeze(1)
    weight = torch.randn(outputs, inputs, generator=generator) * sizes
    return Gemm(weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype) if bias else None)


def activations(count: int = 200, inputs: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(4)
    return (torch.randn(count, inputs, generator=generator) * torch.logspace(-0.5, 0.5, count).unsqueeze(1)).to(dtype)


def channel_errors(product: nn.Module, layer: Gemm, x: Tensor) -> Tensor:
    """Relative L2 of each output channel's products against fp64, without the bias: ``[N]``."""
    bias = 0 if layer.bias is None else layer.bias.double()
    wanted = x.double() @ layer.weight.double().t()
    found = product(x).double() - bias
    return (found - wanted).norm(dim=0) / wanted.norm(dim=0)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def through_a_file(module: FlatModule, x: Tensor, folder: Path, *, dynamic: bool = False) -> nn.Module:
    """Export, save, vet, load: what an artifact goes through."""
    shapes = (({0: torch.export.Dim("B", min=2, max=8)},),) if dynamic else None
    with quiet_export():
        program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
    save_exported(program, folder / "program.pt2")
    return flat_program(load_exported(folder / "program.pt2"))


def strict_judge(module: FlatModule, limit: float) -> Callable[[Any], Judgement]:
    """A judge by the relative error on rows of its own."""
    x = rows()
    wanted = module(x)[0].clone()

    def judge(run: Any) -> Judgement:
        found = error(next(iter(run({"x": x}).values())), wanted)
        return Judgement(found, None, found <= limit)

    return judge
