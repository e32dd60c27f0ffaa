"""PyTorch itself: rebuilt from the source where code can do that, else an exported program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onecard.backends.base import Target
from onecard.backends.eager import EagerBackend
from onecard.models.load import load_model
from onecard.models.model import Model
from onecard.models.source import save_source
from onecard.recipe import Recipe
from onecard.transforms import apply_transforms
from tests.conftest import INPUT

BACKEND = EagerBackend()


class Own(nn.Module):
    """A live module that no installed code can build again."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        y = self.body(image)
        return {"map": y, "mean": y.mean((2, 3))}


@pytest.fixture(params=["factory", "live"])
def model(request: pytest.FixtureRequest, model_file: Path) -> Model:
    if request.param == "live":
        torch.manual_seed(0)
        return load_model(Own(), inputs=[INPUT])
    return load_model(f"{model_file}:small", inputs=[INPUT])


def make(model: Model, tmp_path: Path, *transforms: str) -> tuple[Path, Target]:
    save_source(model, tmp_path / "source")
    recipe = Recipe("eager", "", transforms)
    target = Target(recipe, model.spec, "cpu", None, tmp_path / "source", tmp_path / "shared")
    folder = tmp_path / "made"
    folder.mkdir()
    example = images(2)
    BACKEND.build(apply_transforms(model.flat, transforms, example), example, folder, target)
    return folder, target


def images(rows: int) -> dict[str, Tensor]:
    return {"image": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))}


@torch.inference_mode()
def expected(model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip((t.name for t in model.spec.outputs), model.flat(inputs["image"]), strict=True))


def test_the_original_comes_back_at_every_size(model, tmp_path):
    wanted = {rows: expected(model, images(rows)) for rows in (1, 3, 4)}
    folder, target = make(model, tmp_path)
    runner = BACKEND.load(folder, target)
    for rows, answer in wanted.items():
        torch.testing.assert_close(runner(images(rows)), answer, rtol=1e-5, atol=1e-5)


def test_transforms_are_applied_when_it_is_loaded(model, tmp_path):
    wanted = expected(model, images(3))
    folder, target = make(model, tmp_path, "fold_bn", "bf16")
    answer = BACKEND.load(folder, target)(images(3))
    assert all(t.dtype == torch.float32 for t in answer.values())
    torch.testing.assert_close(answer, wanted, rtol=0.05, atol=0.05)
    assert any(not torch.equal(answer[name], wanted[name]) for name in wanted)


def test_the_artifact_is_a_note_where_code_builds_the_model(model, tmp_path):
    folder, _ = make(model, tmp_path)
    program = {"program.pt2"} if model.origin.kind == "live" else set()
    assert {p.name for p in folder.iterdir()} == {"eager.json", *program}


def test_buckets_of_one_variant_share_one_module(model_file, tmp_path):
    model = load_model(f"{model_file}:small", inputs=[INPUT])
    folder, target = make(model, tmp_path)
    BACKEND.load(folder, target)
    module = target.memo["eager module"]
    BACKEND.load(folder, target)
    assert target.memo["eager module"] is module


def test_a_closed_runner_says_so(model, tmp_path):
    folder, target = make(model, tmp_path)
    runner = BACKEND.load(folder, target)
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner(images(1))


def test_it_is_always_available(model, tmp_path):
    _, target = make(model, tmp_path)
    assert BACKEND.available(target) is None
