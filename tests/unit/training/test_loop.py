import copy
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from onecard.errors import DataError, InterruptedSearch, ModelError, StorageError, UsageError
from onecard.models.flat import FlatModule, positional
from onecard.spec import Spec, TensorSpec, parse_spec
from onecard.training.data import TrainingData, in_memory, load_training_data
from onecard.training.loop import TrainHistory, TrainOptions, TrainProgress, fine_tune, learning_rate_at
from onecard.training.losses import distillation_loss, get_loss, label_loss
from onecard.verify.data import Dataset

SPEC = msgspec.structs.replace(
    parse_spec(["x: float32[B,8], B=1..32"]), outputs=(TensorSpec("output", "float32", ("B", 3)),)
)
ROWS = 50  # not a multiple of the batch
OPTIONS = TrainOptions(epochs=3, batch=16, learning_rate=1e-2)


class Net(nn.Module):
    """Dropout and batch norm: random numbers and buffers that a checkpoint must not lose."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.body(x),)


def net() -> Net:
    torch.manual_seed(1)
    return Net().train()


def teacher() -> FlatModule:
    torch.manual_seed(2)
    return FlatModule(Net(), positional(("x",))).eval()


def rows(labelled: bool = True) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 8, generator=generator)
    return in_memory(Dataset({"x": x}, x[:, :3].argmax(1) if labelled else None, ROWS), SPEC)


def train(
    student: nn.Module,
    data: TrainingData,
    options: TrainOptions = OPTIONS,
    checkpoint: Path | None = None,
    **more: object,
) -> TrainHistory:
    taught = more.pop("teacher", None)
    return fine_tune(student, taught, data, options, spec=SPEC, checkpoint=checkpoint, **more)  # type: ignore[arg-type]


def interrupt_at(step: int) -> Callable[[TrainProgress], None]:
    def observe(progress: TrainProgress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return observe


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_labels_are_learnt_and_progress_is_told() -> None:
    student, seen = net(), []
    history = train(student, rows(), replace(OPTIONS, epochs=20), observe=seen.append)
    assert [e.epoch for e in history.epochs] == list(range(1, 21))
    assert history.epochs[-1].loss < 0.6 * history.epochs[0].loss
    assert (history.steps, history.resumed_at, len(seen)) == (60, 0, 60)
    assert [p.step for p in seen] == list(range(1, 61))
    assert {p.steps for p in seen} == {60} and seen[-1].remaining_s == 0
    assert seen[30].epoch == 11


def test_the_original_teaches_where_there_are_no_labels() -> None:
    student, original = net(), teacher()
    before = copy.deepcopy(original.state_dict())
    history = train(student, rows(labelled=False), replace(OPTIONS, epochs=30), teacher=original)
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no labels.*--loss"):
        train(net(), rows(labelled=False))


@pytest.mark.parametrize("step", [1, 3, 4, 8])  # within an epoch, at its end, at the start of another
def test_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, step: int) -> None:
    whole, parts, path = net(), net(), tmp_path / "there" / "state.safetensors"
    expected = train(whole, rows(), teacher=teacher())
    with pytest.raises(InterruptedSearch, match=rf"stopped at step {step} of 9.*same command"):
        train(parts, rows(), checkpoint=path, teacher=teacher(), observe=interrupt_at(step))
    parts = net()  # another process would build it anew
    history = train(parts, rows(), checkpoint=path, teacher=teacher())
    assert_same(whole, parts)
    assert history.resumed_at == step
    assert [e.loss for e in history.epochs] == [e.loss for e in expected.epochs]


def test_a_random_stream_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.py").write_text(
        "import torch\n"
        "def stream():\n"
        "    for _ in range(4):\n"
        "        x = torch.randn(10, 8)\n"
        "        yield {'x': x}, x[:, :3].argmax(1)\n"
    )
    data = load_training_data(f"{tmp_path / 'rows.py'}:stream", SPEC)
    options, path = replace(OPTIONS, batch=6), tmp_path / "state.safetensors"
    whole, parts = net(), net()
    train(whole, data, options)
    with pytest.raises(InterruptedSearch, match="step 11 of 24"):
        train(parts, data, options, path, observe=interrupt_at(11))
    parts = net()
    train(parts, data, options, path)
    assert_same(whole, parts)


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    path, first, second, seen = tmp_path / "state.safetensors", net(), net(), []
    train(first, rows(), checkpoint=path)
    history = train(second, rows(), checkpoint=path, observe=seen.append)
    assert_same(first, second)
    assert (seen, history.resumed_at, len(history.epochs)) == ([], 9, 3)


def test_the_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    student = net()
    torch.manual_seed(7)
    train(student, rows())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("other", ["lr", "rows", "weights"])
def test_the_checkpoint_of_another_run_is_not_taken(tmp_path: Path, other: str) -> None:
    path = tmp_path / "state.safetensors"
    train(net(), rows(), checkpoint=path)
    student, data, options = net(), rows(), OPTIONS
    if other == "lr":
        options = replace(options, learning_rate=2e-2)
    elif other == "rows":
        data.dataset.inputs["x"][0, 0] += 1  # type: ignore[union-attr]
        data = in_memory(data.dataset, SPEC)  # type: ignore[arg-type]
    else:
        student.body[0].bias.data[0] += 1
    assert train(student, data, options, path).resumed_at == 0


@pytest.mark.parametrize("damage", [b"", b"no safetensors", b"\xff" * 64])
def test_a_damaged_checkpoint_is_overwritten(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(damage)
    assert train(net(), rows(), checkpoint=path).resumed_at == 0
    assert train(net(), rows(), checkpoint=path).resumed_at == 9


def test_a_checkpoint_is_one_file_of_tensors_and_json(tmp_path: Path) -> None:
    train(net(), rows(), checkpoint=tmp_path / "state.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        names = set(file.keys())
        header = json.loads(file.metadata()["onecard.training"])
    assert {"module.body.1.running_mean", "optimizer.0.exp_avg_sq"} <= names
    assert (header["epoch"], header["step"], len(header["epochs"])) == (3, 9, 3)


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    seen: list[TrainProgress] = []
    with pytest.raises(StorageError, match=r"checkpoint.*ONECARD_CACHE"):
        train(net(), rows(), checkpoint=tmp_path / "file" / "state.safetensors", observe=seen.append)
    assert not seen


def test_before_epoch_is_called_again_when_an_epoch_is_taken_up(tmp_path: Path) -> None:
    path, calls = tmp_path / "state.safetensors", []

    def before(epoch: int, module: nn.Module) -> None:
        calls.append(epoch)

    with pytest.raises(InterruptedSearch):
        train(net(), rows(), checkpoint=path, observe=interrupt_at(5), before_epoch=before)
    train(net(), rows(), checkpoint=path, before_epoch=before)
    assert calls == [0, 1, 1, 2]


def test_ctrl_c_without_a_checkpoint_and_the_handler_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedSearch, match="nothing was kept"):
        train(net(), rows(), observe=interrupt_at(2))
    assert signal.getsignal(signal.SIGINT) is before


def test_it_trains_outside_of_the_main_thread() -> None:
    found: list[TrainHistory] = []
    thread = threading.Thread(target=lambda: found.append(train(net(), rows())))
    thread.start()
    thread.join(60)
    assert found[0].steps == 9


def test_the_largest_number_of_steps() -> None:
    seen: list[TrainProgress] = []
    history = train(net(), rows(), replace(OPTIONS, max_steps=4), observe=seen.append)
    assert (history.steps, len(history.epochs)) == (4, 2)
    assert seen[-1].learning_rate == learning_rate_at(3, 4, 1e-2)


def test_no_epoch_changes_nothing() -> None:
    student = net()
    history = train(student, rows(), replace(OPTIONS, epochs=0))
    assert_same(student, net())
    assert history.steps == 0


def test_fewer_rows_than_a_batch() -> None:
    assert train(net(), rows(), replace(OPTIONS, batch=64)).steps == 3


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def loss(outputs, labels):\n    return (outputs['output'] * float('nan')).sum()\n"
    )
    student, path = net(), tmp_path / "state.safetensors"
    student.body[1].eval()
    with pytest.raises(UsageError, match=r"loss is nan at step 1 of 9; nothing was written.*smaller --lr than 0.01"):
        train(student, rows(), replace(OPTIONS, loss=f"{tmp_path / 'mine.py'}:loss"), path)
    assert_same(student, net())
    assert not path.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return outputs['output']", r"returned float32\[16, 3\], expected a scalar"),
        ("return 1.0", "returned float, expected a scalar"),
        ("return outputs['output'].argmax()", r"returned int64\[\], expected a scalar"),
        ("return outputs['missing']", "failed with KeyError"),
        ("import torch; return torch.tensor(1.0)", "does not depend on the outputs"),
    ],
)
def test_a_loss_of_ones_own_that_is_none(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"def loss(outputs, labels):\n    {body}\n")
    with pytest.raises(UsageError, match=message):
        train(net(), rows(), replace(OPTIONS, loss=f"{tmp_path / 'mine.py'}:loss"))


def test_a_loss_of_ones_own_takes_the_place_of_all_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(outputs, labels):\n    return outputs['output'].square().mean()\n")
    student = net()
    options = replace(OPTIONS, epochs=30, loss=f"{tmp_path / 'mine.py'}:loss")
    history = train(student, rows(labelled=False), options, teacher=teacher())
    assert history.epochs[-1].loss < 0.3 * history.epochs[0].loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(epochs=-1), "--epochs is -1"),
        (TrainOptions(batch=0), "--batch is 0"),
        (TrainOptions(learning_rate=0.0), "--lr is 0"),
        (TrainOptions(learning_rate=float("nan")), "--lr is nan"),
        (TrainOptions(max_steps=-1), "max_steps is -1"),
    ],
)
def test_options_that_make_no_sense(options: TrainOptions, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        train(net(), rows(), options)


def test_a_module_without_parameters_and_one_without_a_gradient() -> None:
    with pytest.raises(ModelError, match="no parameter"):
        train(nn.ReLU(), rows())

    class Cut(Net):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.body(x).detach(),)

    with pytest.raises(ModelError, match="cannot be trained on 16 rows"):
        train(Cut(), rows())


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(step, 100, 1.0) for step in range(100)]
    assert rates[0] == 0.2 and rates[4] == 1.0 and rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 1e-3


def test_distillation_by_hand() -> None:
    out, wanted = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = (wanted / 2).softmax(1), (out / 2).softmax(1)
    assert distillation_loss({"o": out}, {"o": wanted}) == pytest.approx(4 * float((p * (p / q).log()).sum()))
    maps = torch.randn(2, 3, 4, 4)
    assert distillation_loss({"o": maps + 1, "n": maps.int()}, {"o": maps, "n": maps.int()}) == pytest.approx(
        1 / float(maps.var(unbiased=False)), rel=1e-5
    )
    with pytest.raises(UsageError, match="no floating-point output"):
        distillation_loss({"n": maps.int()}, {"n": maps.int()})


def test_labels_beside_the_original_share_the_loss() -> None:
    out, wanted, labels = {"o": torch.randn(4, 3)}, {"o": torch.randn(4, 3)}, torch.tensor([0, 1, 2, 0])
    both = get_loss("", labelled=True, teacher=True)(out, labels, wanted)
    assert both == pytest.approx(0.5 * float(label_loss(out, labels)) + 0.5 * float(distillation_loss(out, wanted)))


def test_which_labels_go_with_which_output() -> None:
    scores, cross = torch.randn(2, 5, 4, 4), nn.functional.cross_entropy
    label = torch.randint(0, 5, (2, 4, 4))
    assert label_loss({"aux": torch.randn(2, 7), "o": scores}, label) == cross(scores, label)
    assert label_loss({"o": scores.movedim(1, -1)}, label) == pytest.approx(float(cross(scores, label)))
    ignored = label.clone()
    ignored[0] = 255
    ignored[1, 0] = -1
    assert label_loss({"o": scores}, ignored) == pytest.approx(float(cross(scores[1:, :, 1:], label[1:, 1:])))
    spans = {"start_logits": torch.randn(3, 9), "end_logits": torch.randn(3, 9)}
    places = {"start": torch.tensor([1, 2, 3]), "end": torch.tensor([4, 5, 6])}
    expected = (cross(spans["start_logits"], places["start"]) + cross(spans["end_logits"], places["end"])) / 2
    assert label_loss(spans, places) == expected
    target = torch.randn(2, 3)
    assert label_loss({"o": target + 0.1}, target) == pytest.approx(0.01 / float(target.var(unbiased=False)), rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"a label is 3.*classes 0\.\.2"),
        (torch.zeros(2, 2, dtype=torch.int64), r"no output fits the labels int64\[2, 2\].*o: float32\[2, 3\]"),
        ({"a": torch.tensor([0, 1]), "b": torch.tensor([0, 1])}, "no output belongs to the label 'a'"),
    ],
)
def test_labels_that_do_not_fit(labels: Tensor | dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_loss({"o": torch.randn(2, 3)}, labels)


def test_a_spec_of_one_size_sets_the_batch() -> None:
    spec = Spec((TensorSpec("x", "float32", (10, 8)),), (TensorSpec("output", "float32", (10, 3)),))
    data = rows().dataset
    assert data is not None
    fixed = in_memory(data, spec)
    assert fine_tune(net(), None, fixed, OPTIONS, spec=spec, checkpoint=None).steps == 15
