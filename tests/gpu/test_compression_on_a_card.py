"""Low-precision layers on a real card: each scheme eager, compiled and captured, against fp16."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from onecard.backends import get_backend
from onecard.backends.base import Target
from onecard.calibration.bench import Bench, Judgement
from onecard.errors import Unsupported
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, positional
from onecard.recipe import Recipe
from onecard.spec import TensorSpec, parse_spec
from onecard.transforms import apply_transforms
from onecard.transforms.int8_linear import dynamic_int8_linear, static_int8_linear
from onecard.transforms.low_precision import GemmLayer

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

DEVICE = "cuda:0"
LIMITS = {
    "fp8": 0.08,
    "fp8_tensor": 0.08,
    "fp8_static": 0.08,
    "int8_dynamic": 0.03,
    "int8": 0.05,
    "int8_weights": 0.02,
    "int4_weights": 0.2,
    "sparse24": 0.7,
}
"""Relative error that each scheme may have beside fp16; a wrong kernel is off by 1 and more."""
LOWEST = 1e-4  # below it nothing was rounded
INT8 = {"int8": static_int8_linear, "int8_dynamic": dynamic_int8_linear}


class Block(nn.Module):
    """Attention and feed-forward part over tokens, 1x1 convolutions over the same as an image."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)
        self.narrow, self.wide = nn.Conv2d(width, width // 2, 1, bias=False), nn.Conv2d(width // 2, width, 1)
        self.pooler = nn.Linear(width, width)  # one row an image: the fewest that products meet
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        image = image + self.wide(self.narrow(image).relu())  # [B, C, H, W]
        x = self.norm(image.flatten(2).transpose(1, 2))  # [B, HW, C]
        x = x + nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        answer: Tensor = self.head(self.pooler(x.mean(1)).tanh())
        return answer


def make_module() -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(Block(), positional(("image",))).eval().requires_grad_(False).to(DEVICE)


def make_images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 128, 4, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_bench(found: list[Compression] | None = None, wanted: Tensor | None = None) -> Bench:
    spec = parse_spec(["image: float32[B,128,4,4], B=1..8"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("logits", "float32", ("B", 10)),))

    def judge(run) -> Judgement:
        assert wanted is not None
        error = distance(run({"image": make_images(8)})["logits"], wanted)
        return Judgement(error, None, error < 0.1)

    return Bench(
        spec,
        DEVICE,
        {"image": make_images(2)},
        calibration={"image": make_images(64, 5).cpu()},
        judge=None if wanted is None else judge,
        record=(found if found is not None else []).append,
    )


def compress(name: str, half: str, bench: Bench) -> FlatModule:
    module = apply_transforms(make_module(), ["channels_last", half], dict(bench.inputs))
    return INT8[name](module, bench) if name in INT8 else apply_transforms(module, [name], dict(bench.inputs), bench)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("name", LIMITS)
def test_eager_answers_are_as_exact_as_the_scheme(name: str, half: str) -> None:
    bench = make_bench()
    module = compress(name, half, bench)
    assert any(isinstance(layer, GemmLayer) for layer in module.inner.modules())
    for count in (1, 3, 8):  # odd rows: the products pad where their kernels ask for it
        images = make_images(count)
        found = module(images)[0]
        assert found.dtype == torch.float32
        assert LOWEST < distance(found, make_module()(images)[0]) < LIMITS[name]


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", LIMITS)
def test_compiled_and_captured_answers_are_those_of_eager(name: str, rows: int, tmp_path: Path) -> None:
    half = "bf16" if name == "int4_weights" else "fp16"
    bench = make_bench()
    module = compress(name, half, bench)
    images = make_images(rows)
    wanted = module(images)[0]
    recipe = Recipe("cudagraph", "inductor", ("channels_last", half, name), True)
    target = Target(recipe, bench.spec, DEVICE, {"B": rows}, tmp_path, tmp_path / "shared")
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    backend = get_backend("cudagraph")
    backend.build(module, {"image": images}, artifact, target)
    runner = backend.load(artifact, target)
    first = runner({"image": images})["logits"]
    runner({"image": make_images(rows, 9)})
    # One other rounding of an activation moves it by a whole step of the format.
    assert distance(first, wanted) < max(LIMITS[name] / 2, 5e-3)
    runner.close()


@pytest.mark.parametrize("name", ["fp8_static", "int8"])
def test_static_schemes_choose_among_methods_on_the_card(name: str) -> None:
    found: list[Compression] = []
    bench = make_bench(found, make_module()(make_images(8))[0])
    compress(name, "fp16", bench)
    assert {trial.method for trial in found[0].trials} == {"minmax", "percentile"}
    assert found[0].trials[-1].passed
    assert found[0].rows == 64


def test_trials_leave_no_copies_on_the_card() -> None:
    bench = make_bench([], make_module()(make_images(8))[0])
    compress("fp8", "fp16", bench)  # kernels and workspaces are there now
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    module = compress("fp8_static", "fp16", make_bench([], make_module()(make_images(8))[0]))
    left = torch.cuda.memory_allocated() - before
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    assert left < 2 * size + (1 << 20)


def test_sparse24_wants_half_precision_on_a_card() -> None:
    with pytest.raises(Unsupported, match="no layer that sparse24 applies to"):
        apply_transforms(make_module(), ["sparse24"], {}, make_bench())


def test_the_products_on_the_card_are_those_on_the_cpu() -> None:
    """The CPU runs the same operators, which is what the unit tests rely on."""
    images = make_images(4)
    newer = torch.torch_version.TorchVersion(torch.__version__) >= (2, 12)  # before, the CPU scaled no rows
    for name in ("fp8_tensor", "int8_dynamic", *(["fp8"] if newer else [])):
        module = compress(name, "bf16", make_bench())
        on_card = module(images)[0].cpu()
        on_cpu = module.cpu()(images.cpu())[0]
        assert distance(on_card, on_cpu) < LIMITS[name] / 2
