"""TorchScript, exported programs, ONNX files and transformers directories."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from onecard.errors import ModelError, SpecError
from onecard.models.load import load_model
from onecard.models.onnx_module import OnnxModule
from onecard.spec import Range

IMAGE = "image: float32[B,3,8,8], B=1..8"


def test_torchscript_needs_inputs(files: dict[str, Path], small: nn.Module) -> None:
    with pytest.raises(SpecError, match="--input 'image: float32"):
        load_model(str(files[".pt"]))
    model = load_model(str(files[".pt"]), inputs=[IMAGE])
    image = torch.randn(3, 3, 8, 8)
    assert torch.equal(model.flat(image)[0], small(image)[0])
    assert model.origin.kind == "torchscript"


def test_a_checkpoint_is_no_torchscript(tmp_path: Path, small: nn.Module) -> None:
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="pass it as --weights"):
        load_model(str(tmp_path / "weights.pt"), inputs=[IMAGE])


def test_exported_program_has_its_own_spec(files: dict[str, Path], small: nn.Module) -> None:
    model = load_model(str(files[".pt2"]))
    assert str(model.spec) == "image: float32[B,3,8,8], B=1..16"
    assert [t.shape for t in model.spec.outputs] == [("B", 4), ("B",)]
    image = torch.randn(5, 3, 8, 8)
    assert torch.equal(model.flat(image)[0], small(image)[0])
    copy.deepcopy(model.flat).eval()
    assert load_model(str(files[".pt2"]), inputs=[IMAGE]).spec.symbols == {"B": Range(1, 8)}
    with pytest.raises(SpecError, match=r"inputs are \['image'\]"):
        load_model(str(files[".pt2"]), inputs=["picture: float32[1,3,8,8]"])


def test_onnx_file_runs_as_it_is(files: dict[str, Path], small: nn.Module) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = load_model(str(files[".onnx"]))
    assert str(model.spec) == "image: float32[batch,3,8,8], batch=1..8"
    assert [(t.name, t.shape) for t in model.spec.outputs] == [("logits", ("batch", 4)), ("label", ("batch",))]
    assert isinstance(model.flat.inner, OnnxModule) and model.flat.inner.path == files[".onnx"]
    assert model.flat.plan.is_plain
    image = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(model.flat(image)[0], small(image)[0])
    assert torch.equal(copy.deepcopy(model.flat)(image)[0], model.flat(image)[0])
    (files[".onnx"].parent / "bad.onnx").write_bytes(b"not protobuf")
    with pytest.raises(ModelError, match="cannot open"):
        load_model(str(files[".onnx"].parent / "bad.onnx"))


def test_minilm_directory(minilm: str) -> None:
    model = load_model(f"hf:{minilm}", batch=Range(1, 4))
    assert str(model.spec) == (
        "input_ids: int64[B,S] in 0..30521, attention_mask: int64[B,S] in 0..1, "
        "token_type_ids: int64[B,S] in 0..1, B=1..4, S=1..512"
    )
    assert {t.name: t.shape for t in model.spec.outputs} == {
        "last_hidden_state": ("B", "S", 384),
        "pooler_output": ("B", 384),
    }
    assert "notes" not in model.extra


def test_config_without_weights_gets_random_ones(minilm: str, tmp_path: Path) -> None:
    config = json.loads(Path(minilm, "config.json").read_text()) | {"num_hidden_layers": 1, "type_vocab_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(f"hf:{tmp_path}")
    assert [t.name for t in model.spec.inputs] == ["input_ids", "attention_mask"]
    assert "random" in model.extra["notes"][0]


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (
            {"architectures": ["ViTForImageClassification"], "model_type": "vit", "image_size": 32, "patch_size": 16},
            "pixel_values: float32[B,3,32,32], B=1..8",
        ),
        (
            {"model_type": "roberta", "max_position_embeddings": 40, "vocab_size": 99, "pad_token_id": 1},
            "input_ids: int64[B,S] in 0..98, attention_mask: int64[B,S] in 0..1, B=1..8, S=1..38",
        ),
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 1},
            "input_ids: int64[B,S] in 0..98, attention_mask: int64[B,S] in 0..1, B=1..8, S=1..512",
        ),
    ],
)
def test_inputs_of_other_architectures(config: dict[str, object], inputs: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"n_head": 2, "type_vocab_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(small | sizes | config))
    assert str(load_model(f"hf:{tmp_path}").spec) == inputs


def test_directories_that_are_no_model(tmp_path: Path, minilm: str) -> None:
    with pytest.raises(ModelError, match=r"no config.json"):
        load_model(f"hf:{tmp_path}")
    shutil.copy(Path(minilm, "config.json"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(f"hf:{tmp_path}")
