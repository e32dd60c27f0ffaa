"""Quantisation-aware training: a model that is trained while its layers compute as their int8 or 4-bit selves.

It starts where post-training quantisation ends and is taught by the labels, the fp32 original, or both. What comes out
is an exported program, to be tried by ``onecard optimize --qat`` like any other candidate, and a record of the gain.
"""

from __future__ import annotations

import copy
import itertools
import platform
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from onecard.cache.use import in_use
from onecard.errors import DataError, ModelError, StorageError, Unsupported, UsageError
from onecard.evidence import to_json
from onecard.host import cache_folder
from onecard.models.exported import export_flat, save_exported
from onecard.models.flat import FlatModule, by_name
from onecard.models.model import Model
from onecard.quiet import TORCHAO, muted
from onecard.spec import Spec
from onecard.training import fake_quantize as fake
from onecard.training.checkpoint import run_key
from onecard.training.data import TrainingData, split_rows
from onecard.training.loop import Observe, TrainHistory, TrainOptions, fine_tune
from onecard.verify.compare import compare, looks_like_logits
from onecard.verify.data import Dataset
from onecard.verify.evaluate import answers_of, evaluate

HELD_OUT = 0.1
"""The share of the training rows to judge by where no others are given."""

_CALIBRATION_BATCHES = 16
_FREEZE_AFTER = 0.6  # of the epochs: the last ones are trained on the very scales that ship


@dataclass(frozen=True)
class QatOptions:
    """How to quantise and train.

    Args:
        train: epochs, batch, learning rate ...
        bits: of the weights, 8 or 4; activations have 8.
        per_tensor: one scale for a layer's weight instead of one for each output channel.
        metric: to judge by (:func:`onecard.verify.metrics.get_metric`), or empty: accuracy where labels are classes.
        fresh: forget what an interrupted training left.
    """

    train: TrainOptions = field(default_factory=TrainOptions)
    bits: int = 8
    per_tensor: bool = False
    metric: str = ""
    fresh: bool = False

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: a figure is out of its range, or the metric is unknown.
        """
        self.train.check()
        if self.bits not in fake.BITS:
            raise UsageError(f"--bits is {self.bits}, expected {' or '.join(map(str, fake.BITS))}.")
        if self.metric:
            from onecard.verify.metrics import get_metric

            get_metric(self.metric)


class Figure(msgspec.Struct, frozen=True):
    """How good a model is on the judged rows.

    ``error`` is the largest relative L2 of its outputs against the fp32 original's, ``agreement`` the share of rows
    with the same class (None where no output looks like logits), ``metric`` the task's figure (None without labels).
    """

    error: float
    agreement: float | None = None
    metric: float | None = None


class QatResult(msgspec.Struct, frozen=True):
    """What came of a training; written as JSON beside the program.

    Args:
        path: of the program.
        model: its name.
        spec: its inputs in text form.
        bits: of the weights.
        per_tensor: whether a layer's weight has one scale.
        layers: how many were quantised.
        rows: trained on.
        judged_rows: the figures' rows.
        metric: the metric's name, or empty.
        fp32: of the original.
        post_training: quantised alike, but not trained.
        qat: quantised and trained.
        history: epochs and steps.
        options: of the training.
        versions: of what made it.
    """

    path: str
    model: str
    spec: str
    bits: int
    per_tensor: bool
    layers: int
    rows: int
    judged_rows: int
    metric: str
    fp32: Figure
    post_training: Figure
    qat: Figure
    history: TrainHistory
    options: dict[str, int | float | str]
    versions: dict[str, str]

    @property
    def is_better(self) -> bool:
        """True where the training gained something over quantising alone."""
        before, after = self.post_training, self.qat
        if before.metric is not None and after.metric is not None:
            return after.metric > before.metric
        return after.error < before.error


def train_qat(  # noqa: PLR0913 - keywords only
    model: Model,
    data: TrainingData,
    options: QatOptions,
    *,
    output: Path,
    judged: Dataset | None = None,
    observe: Observe = lambda progress: None,
    say: Callable[[str], None] = lambda text: None,
) -> QatResult:
    """Quantise a model, train it so, and write it as a program.

    Args:
        model: the fp32 original.
        data: what to train on. Without labels, and without a loss of the user's, the original is the teacher.
        options: see :class:`QatOptions`.
        output: the ``.pt2`` file to write, with a ``.json`` of the same name beside it.
        judged: rows to measure by, that are not trained on; by default a tenth of ``data`` is put aside.
        observe: called after every step.
        say: called with a few words on what is going on.

    Returns:
        What was done and gained.

    Raises:
        UsageError: an option makes no sense, or the loss is not finite.
        DataError: the rows or labels do not fit.
        ModelError: the model cannot be exported, has no layer to quantise, or cannot be trained.
        MissingDependencyError: torchao is not installed.
        StorageError: the output or the checkpoint cannot be written.
        InterruptedSearch: Ctrl-C; the state is kept, and the same call goes on from there.
    """
    options.check()
    check_output(output)
    fake.require_torchao()
    if judged is None:
        data, judged = split_rows(data, HELD_OUT)
    if options.metric and judged.labels is None:
        raise UsageError(f"--metric {options.metric} needs labels, and the rows to judge by have none.")
    say("measuring the original")
    judge = _Judge.of(model, judged, options.metric)
    work = _Work(model, data, options, judge, say)
    state = work.checkpoint.parent
    with in_use(state):
        outcome = work.train(observe)
        result = work.result(output, outcome)
        say("writing the program")
        _write(outcome.quantised, model.spec, result, output)
        shutil.rmtree(state, ignore_errors=True)
    return result


def check_output(output: Path) -> None:
    """Find out before hours of training whether the program could be written.

    Raises:
        UsageError: the file's name does not end in ``.pt2``.
        StorageError: the folder cannot be written.
    """
    if output.suffix != ".pt2":
        raise UsageError(f"the output {output} must end in .pt2.", "Pass -o NAME.pt2.")
    if output.is_dir():
        raise StorageError(f"{output} is a folder.", "Choose another name with -o.")
    probe = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.probe")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror}.", "Choose another with -o.") from error


@dataclass(frozen=True)
class _Judge:
    """The rows to judge by, the original's answers to them, and the metric that fits."""

    spec: Spec
    rows: Dataset
    wanted: dict[str, Tensor]
    metric: str

    @staticmethod
    def of(model: Model, rows: Dataset, metric: str) -> _Judge:
        wanted = _answers(model.flat, model.spec, rows)
        broken = [n for n, t in wanted.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if broken:
            raise ModelError(
                f"the original answers with NaN or infinity in '{broken[0]}', from which no scale can be found.",
                "Check its weights, and how the rows are normalised.",
            )
        return _Judge(model.spec, rows, wanted, metric or _metric_for(rows, wanted))

    def figure(self, module: FlatModule) -> Figure:
        answers = _answers(module, self.spec, self.rows)
        errors = [compare(name, answers[name], wanted, "judged rows") for name, wanted in self.wanted.items()]
        agreements = [e.top1_agreement for e in errors if e.top1_agreement is not None]
        metric = evaluate(answers, self.rows, self.metric) if self.metric else None
        return Figure(max(e.relative_l2 for e in errors), min(agreements, default=None), metric)


@dataclass(frozen=True)
class _Outcome:
    quantised: FlatModule
    layers: int
    post_training: Figure
    history: TrainHistory


@dataclass(frozen=True)
class _Work:
    """One training: what goes into it."""

    model: Model
    data: TrainingData
    options: QatOptions
    judge: _Judge
    say: Callable[[str], None]

    @property
    def scheme(self) -> fake.Scheme:
        return fake.Scheme(self.options.bits, self.options.per_tensor)

    @property
    def checkpoint(self) -> Path:
        """A file in a folder of this model, these rows and these options alone."""
        train = replace(self.options.train, device="")
        key = run_key(self.model.flat, self.model.spec, self.scheme, train, self.data.digest, self.data.rows)
        return cache_folder() / "training" / key[:32] / "qat.safetensors"

    def train(self, observe: Observe) -> _Outcome:
        train = self.options.train
        self.say("exporting the model")
        size = self.data.batch_size(train.batch)
        program = fake.export_for_training(self.model.flat, self.model.spec, size)
        student = fake.prepare(program, self.scheme, train.device)
        self.say("calibrating")
        fake.calibrate(student, self._calibration())
        before = self.judge.figure(fake.convert(program, self.scheme, student, self.model.flat))
        checkpoint = self.checkpoint
        if self.options.fresh:
            checkpoint.unlink(missing_ok=True)
        # A teacher of its own on a GPU: the caller's model stays where it is.
        teacher = self.model.flat if train.device == "cpu" else copy.deepcopy(self.model.flat)
        history = fine_tune(
            student,
            teacher,
            self.data,
            train,
            spec=self.model.spec,
            checkpoint=checkpoint,
            observe=observe,
            before_epoch=self._freeze_late,
        )
        self.say("quantising")
        quantised = fake.convert(program, self.scheme, student, self.model.flat)
        return _Outcome(quantised, fake.quantised_layers(student), before, history)

    def result(self, output: Path, outcome: _Outcome) -> QatResult:
        judge, options = self.judge, self.options
        train = options.train
        return QatResult(
            str(output),
            self.model.name,
            str(self.model.spec),
            options.bits,
            options.per_tensor,
            outcome.layers,
            self.data.rows,
            judge.rows.rows,
            judge.metric,
            judge.figure(self.model.flat),
            outcome.post_training,
            judge.figure(outcome.quantised),
            outcome.history,
            {name: getattr(train, name) for name in train.__dataclass_fields__},
            _versions(),
        )

    def _calibration(self) -> list[tuple[Tensor, ...]]:
        train = self.options.train
        first = itertools.islice(self.data.batches(0, train.batch, train.seed), _CALIBRATION_BATCHES)
        with torch.random.fork_rng(devices=[]):
            return [tuple(b.inputs[t.name].to(train.device) for t in self.model.spec.inputs) for b in first]

    def _freeze_late(self, epoch: int, student: nn.Module) -> None:
        epochs = self.options.train.epochs
        fake.set_observing(student, epochs == 1 or epoch < max(1, round(epochs * _FREEZE_AFTER)))


@torch.no_grad()
def _answers(module: FlatModule, spec: Spec, rows: Dataset) -> dict[str, Tensor]:
    return answers_of(partial(by_name, module, spec), spec, rows, "cpu")


def _metric_for(rows: Dataset, wanted: dict[str, Tensor]) -> str:
    """Accuracy, where every row has one class and an output looks like its scores."""
    labels = rows.labels
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        return ""
    first = next((t for t in wanted.values() if looks_like_logits(t)), None)
    return "accuracy" if first is not None and 0 <= int(labels.max()) < first.shape[1] else ""


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchao": version("torchao")}


def _write(module: FlatModule, spec: Spec, result: QatResult, output: Path) -> None:
    """Program and record aside, then into place; neither is left where one fails."""
    aside = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    record = aside.with_suffix(".json.tmp")
    try:
        with muted(*TORCHAO):
            program, _, notes = export_flat(module, spec)
        if notes:
            raise ModelError(f"the trained model cannot be exported for all its sizes: {notes[0]}.")
        save_exported(program, aside)
        record.write_bytes(to_json(result))
        record.replace(output.with_suffix(".json"))
        aside.replace(output)
    except OSError as error:
        raise StorageError(f"{output} was not written: {error}.", "Free some space or choose another -o.") from error
    except Unsupported as error:
        if isinstance(error.__cause__, OSError):
            raise StorageError(f"{output} was not written: {error.__cause__}.", "Free some space.") from error
        raise ModelError(f"the trained model cannot be written: {error.detail}.") from error
    finally:
        aside.unlink(missing_ok=True)
        record.unlink(missing_ok=True)


def judged_rows(text: str, metric: str, spec: Spec) -> Dataset:
    """The rows that ``--data`` names, with labels where there is a metric.

    Raises:
        DataError: they cannot be read, or lack labels.
    """
    from onecard.verify.data import load_data

    rows = load_data(text, spec)
    if metric and rows.labels is None:
        raise DataError(f"--metric {metric} needs labels, and {text} holds none.", "Add an array 'label'.")
    return rows
