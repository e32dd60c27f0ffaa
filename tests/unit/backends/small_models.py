"""Two small models, their targets, and a loader in a new process, for the backends' tests."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onecard.backends import get_backend
from onecard.backends.base import Target
from onecard.models.flat import FlatModule, positional
from onecard.recipe import Recipe
from onecard.spec import Spec, TensorSpec, parse_spec


class SmallCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.features(image)).mean((2, 3)))


class SmallEncoder(nn.Module):
    """int64 ids and mask in, a dict of two tensors out, dynamic in both dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.places = nn.Embedding(32, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.encoder(self.words(input_ids) + self.places(places), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1).to(x.dtype)  # [B, S, 1]
        return {"last": x, "pooled": (x * mask).sum(1) / mask.sum(1)}


def cnn() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    model = SmallCnn()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    spec = parse_spec(["image: float32[B,3,32,32], B=1..8"])
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("output", "float32", ("B", 10)),))
    return FlatModule(model, positional(("image",))).eval(), spec


def encoder() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    spec = parse_spec(["input_ids: int64[B,S] in 0..99, B=1..8, S=1..32", "attention_mask: int64[B,S]"])
    outputs = (TensorSpec("last", "float32", ("B", "S", 32)), TensorSpec("pooled", "float32", ("B", 32)))
    spec = msgspec.structs.replace(spec, outputs=outputs)
    return FlatModule(SmallEncoder(), positional(("input_ids", "attention_mask"))).eval(), spec


MODELS = {"cnn": cnn, "encoder": encoder}


def inputs_for(spec: Spec, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for tensor in spec.inputs:
        shape = tensor.concrete(sizes)
        if tensor.is_float:
            made[tensor.name] = torch.randn(shape, generator=generator)
        elif tensor.values:
            made[tensor.name] = torch.randint(tensor.values.low, tensor.values.high + 1, shape, generator=generator)
        else:
            made[tensor.name] = torch.ones(shape, dtype=torch.int64)
            made[tensor.name][:, shape[1] // 2 + 1 :] = 0
    return made


def target_for(recipe: Recipe, spec: Spec, tmp_path: Path, device: str = "cpu", **bucket: int) -> Target:
    shared, work = tmp_path / "shared", tmp_path / "work"
    shared.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    return Target(recipe, spec, device, bucket or None, tmp_path, shared, work)


def sizes_of(spec: Spec) -> list[dict[str, int]]:
    """Smallest, odd, and largest of everything: none of them the example's."""
    if "S" in spec.symbols:
        return [{"B": 1, "S": 1}, {"B": 1, "S": 32}, {"B": 3, "S": 7}, {"B": 8, "S": 32}]
    return [{"B": 1}, {"B": 3}, {"B": 8}]


def eager(module: FlatModule, spec: Spec, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode():
        answer = module(*[inputs[t.name] for t in spec.inputs])
    return dict(zip([t.name for t in spec.outputs], answer, strict=True))


def build(module: FlatModule, target: Target, folder: Path, **example: int) -> None:
    folder.mkdir()
    inputs = inputs_for(target.spec, **(example or target.bucket))
    get_backend(target.recipe.backend).build(module, inputs, folder, target)
    assert not list(folder.rglob("*.pkl"))


def assert_right(module: FlatModule, target: Target, folder: Path, sizes: list[dict[str, int]]) -> None:
    """Run at every size, twice with other values, and compare both answers only at the end."""
    runner = get_backend(target.recipe.backend).load(folder, target)
    cases = [inputs_for(target.spec, seed, **size) for size in sizes for seed in (1, 2)]
    answers = [runner(case) for case in cases]
    for case, answer in zip(cases, answers, strict=True):
        torch.testing.assert_close(answer, eager(module, target.spec, case), rtol=1e-4, atol=1e-4)
    runner.close()


_ELSEWHERE = """
import json, sys, pathlib, msgspec, warnings
warnings.simplefilter("error")
from safetensors.torch import load_file, save_file
from onecard.backends import get_backend
from onecard.backends.base import Target
from onecard.recipe import Recipe
from onecard.spec import Spec
folder, tmp, recipe, spec, bucket = map(json.loads, sys.argv[1:])
tmp = pathlib.Path(tmp)
target = Target(msgspec.convert(recipe, Recipe), msgspec.convert(spec, Spec), "cpu", bucket, tmp, tmp)
runner = get_backend(target.recipe.backend).load(pathlib.Path(folder), target)
save_file(runner(load_file(tmp / "in.safetensors")), tmp / "out.safetensors")
runner.close()
"""


def assert_right_elsewhere(module: FlatModule, target: Target, folder: Path, **sizes: int) -> None:
    """Load in a process that has not seen the model, and compare its answer."""
    inputs = inputs_for(target.spec, 3, **sizes)
    tmp = folder.parent
    save_file(inputs, tmp / "in.safetensors")
    values = (
        str(folder),
        str(tmp),
        msgspec.to_builtins(target.recipe),
        msgspec.to_builtins(target.spec),
        target.bucket,
    )
    command = [sys.executable, "-c", _ELSEWHERE, *map(json.dumps, values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    answer = load_file(tmp / "out.safetensors")
    torch.testing.assert_close(answer, eager(module, target.spec, inputs), rtol=1e-4, atol=1e-4)
