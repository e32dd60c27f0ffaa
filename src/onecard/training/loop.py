"""The fine-tuning loop that compressions share: AdamW, cosine decay, distillation, checkpoints, clean interruption.

A training that was interrupted goes on from its checkpoint and, on a CPU, ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import msgspec
import torch
from torch import Tensor, nn

from onecard.errors import InterruptedSearch, ModelError, OnecardError, UsageError
from onecard.models.flat import FlatModule, by_name
from onecard.models.wording import first_line
from onecard.spec import Spec
from onecard.training.checkpoint import (
    EpochRecord,
    Position,
    check_checkpoint,
    load_checkpoint,
    run_key,
    save_checkpoint,
)
from onecard.training.data import TrainingData, step_seed
from onecard.training.losses import Loss, get_loss
from onecard.verify.data import Dataset, Labels
from onecard.verify.reference import to_device

_WARM_UP_SHARE = 0.05  # of all steps
_WEIGHT_DECAY = 1e-4
_GRADIENT_NORM = 1.0
_SAVE_EVERY_S = 300.0  # what a power cut may cost within a long epoch


@dataclass(frozen=True)
class TrainOptions:
    """How to fine-tune.

    Args:
        epochs: passes over the data; 0 trains nothing.
        batch: rows a step, unless the model takes just one size.
        learning_rate: AdamW's, at its highest.
        loss: ``module:callable`` of a function ``f(outputs: dict, labels) -> scalar tensor``, or empty for the loss
            that :func:`onecard.training.losses.get_loss` picks.
        seed: of the order of rows and of all random numbers.
        device: ``cpu`` or ``cuda:0``.
        max_steps: end after so many steps altogether; 0 means that the epochs decide.
    """

    epochs: int = 1
    batch: int = 32
    learning_rate: float = 1e-4
    loss: str = ""
    seed: int = 0
    device: str = "cpu"
    max_steps: int = 0

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: a figure is out of its range.
        """
        if self.epochs < 0:
            raise UsageError(f"--epochs is {self.epochs}, expected 0 or more.")
        if self.batch < 1:
            raise UsageError(f"--batch is {self.batch}, expected 1 or more.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"--lr is {self.learning_rate}, expected a positive number.", "Try 1e-4.")
        if self.max_steps < 0:
            raise UsageError(f"max_steps is {self.max_steps}, expected 0 or more.")


@dataclass(frozen=True)
class TrainProgress:
    """Where the training is.

    Args:
        epoch: the one under way, from 1 to ``epochs``.
        epochs: how many there will be.
        step: steps done, of all epochs.
        steps: how many there will be.
        loss: of this step.
        learning_rate: of this step.
        seconds: since the training was started or taken up.
        remaining_s: at the pace so far.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    remaining_s: float


class TrainHistory(msgspec.Struct, frozen=True):
    """What a training came to: its epochs, its steps, and the step it was taken up at (0 if it was not)."""

    epochs: tuple[EpochRecord, ...]
    steps: int
    resumed_at: int = 0


Observe = Callable[[TrainProgress], None]
BeforeEpoch = Callable[[int, nn.Module], None]


def fine_tune(  # noqa: PLR0913 - all of it differs from caller to caller
    student: nn.Module,
    teacher: FlatModule | None,
    data: TrainingData,
    options: TrainOptions,
    *,
    spec: Spec,
    checkpoint: Path | None,
    observe: Observe = lambda progress: None,
    before_epoch: BeforeEpoch | None = None,
) -> TrainHistory:
    """Train a module in place.

    Args:
        student: takes the spec's inputs by position and gives a tuple in the order of its outputs. Parameters that
            require a gradient are trained. The mode (``train`` or ``eval``) is the caller's to set. It is left on
            the options' device.
        teacher: the fp32 original, to distil from, or None.
        data: what to train on.
        options: see :class:`TrainOptions`.
        spec: names of inputs and outputs.
        checkpoint: the file that the state is kept in and taken up from; the caller removes it when all is done.
            One that another run left is ignored and overwritten.
        observe: called after every step.
        before_epoch: called with the epoch, from 0, and the student before each epoch and again when one is taken up
            in its middle: what it does may depend on the epoch alone.

    Returns:
        What happened.

    Raises:
        UsageError: an option makes no sense, the loss is not finite, or the user's loss function fails.
        DataError: the labels fit no output.
        ModelError: the student or its gradient cannot be computed.
        InterruptedSearch: Ctrl-C; the state was kept, if there is a ``checkpoint``.
        StorageError: the checkpoint cannot be written.
    """
    options.check()
    loss = get_loss(options.loss, data.labelled, teacher is not None)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    student.to(options.device)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError("the model has no parameter that could be trained.")
    key = run_key(student, replace(options, device=""), data.digest, spec, data.rows)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=_WEIGHT_DECAY)
    found = load_checkpoint(checkpoint, student, optimizer, key) if checkpoint else None
    answers = None if options.loss else _answers(teacher, spec, options.device)  # the user's loss does not ask for it
    run = _Run(student, answers, data, options, loss, optimizer, spec)
    with _seeded(options.device), _interruptions() as stop:
        position = _train(run, found or Position(key), checkpoint, observe, before_epoch, stop)
    return TrainHistory(position.epochs, position.step, found.step if found else 0)


@dataclass(frozen=True)
class _Run:
    """What stays the same throughout one training."""

    student: nn.Module
    teacher: Callable[[Dataset], dict[str, Tensor]] | None
    data: TrainingData
    options: TrainOptions
    loss: Loss
    optimizer: torch.optim.Optimizer
    spec: Spec

    @property
    def steps_per_epoch(self) -> int:
        return self.data.steps(self.options.batch)

    @property
    def steps(self) -> int:
        planned = self.options.epochs * self.steps_per_epoch
        return min(planned, self.options.max_steps) if self.options.max_steps else planned


def _train(
    run: _Run,
    start: Position,
    checkpoint: Path | None,
    observe: Observe,
    before_epoch: BeforeEpoch | None,
    stop: threading.Event,
) -> Position:
    """All epochs from a position on; the position behind the last step."""
    position = start
    watch = _Watch(time.monotonic(), position.step)
    while position.epoch < run.options.epochs and position.step < run.steps:
        if before_epoch is not None:
            before_epoch(position.epoch, run.student)
        for step in _epoch(run, position, watch):
            position, progress = step
            observe(progress)
            if stop.is_set():
                raise _interrupted(run, position, checkpoint)
            if checkpoint is not None and watch.is_due():
                save_checkpoint(checkpoint, run.student, run.optimizer, position)
        position = _next_epoch(run, position)
        if checkpoint is not None:
            save_checkpoint(checkpoint, run.student, run.optimizer, position)
            watch.saved()
    return position


class _Watch:
    """The clock of one training: its pace, and when it is time for another checkpoint."""

    def __init__(self, now: float, step: int) -> None:
        self._began, self._first, self._saved_at = now, step, now

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """True once every five minutes; a checkpoint is taken for written then."""
        due = time.monotonic() - self._saved_at > _SAVE_EVERY_S
        if due:
            self.saved()
        return due

    def progress(self, run: _Run, position: Position, loss: float, rate: float) -> TrainProgress:
        seconds = time.monotonic() - self._began
        remaining = seconds / max(1, position.step - self._first) * (run.steps - position.step)
        epochs = run.options.epochs
        return TrainProgress(
            position.epoch + 1, epochs, position.step, run.steps, loss, rate, seconds, max(0.0, remaining)
        )


def _epoch(run: _Run, position: Position, watch: _Watch) -> Iterator[tuple[Position, TrainProgress]]:
    """The steps of one epoch that are still to be done."""
    options = run.options
    began = time.monotonic() - position.seconds
    for batch in run.data.batches(position.epoch, options.batch, options.seed, position.batch):
        if position.step >= run.steps:
            return
        rate = learning_rate_at(position.step, run.steps, options.learning_rate)
        torch.manual_seed(step_seed(options.seed, position.epoch, position.batch))
        loss = _step(run, batch, rate, position.step)
        position = msgspec.structs.replace(
            position,
            batch=position.batch + 1,
            step=position.step + 1,
            loss_sum=position.loss_sum + loss,
            seconds=time.monotonic() - began,
        )
        yield position, watch.progress(run, position, loss, rate)


def _next_epoch(run: _Run, position: Position) -> Position:
    rate = learning_rate_at(max(0, position.step - 1), run.steps, run.options.learning_rate)
    mean = position.loss_sum / max(1, position.batch)
    record = EpochRecord(position.epoch + 1, mean, rate, position.seconds)
    return Position(position.key, position.epoch + 1, 0, position.step, epochs=(*position.epochs, record))


def _step(run: _Run, batch: Dataset, rate: float, step: int) -> float:
    """One step of the optimiser; nothing is changed where the loss is not finite."""
    device = run.options.device
    inputs = [batch.inputs[t.name].to(device) for t in run.spec.inputs]
    labels = _to(batch.labels, device)
    wanted = run.teacher(batch) if run.teacher is not None else None
    run.optimizer.zero_grad(set_to_none=True)
    try:
        outputs = run.student(*inputs)
        names = (t.name for t in run.spec.outputs)
        loss = run.loss(dict(zip(names, outputs, strict=True)), labels, wanted)
        loss.backward()  # type: ignore[no-untyped-call]
    except OnecardError:
        raise
    except Exception as error:  # the model's own code, and that of observers, which assert that they see no NaN
        if step and "nan" in str(error).lower():  # it worked a step before
            raise _diverged(run, "answer holds NaN", step) from error
        raise ModelError(
            f"the model cannot be trained on {batch.rows} rows: {first_line(error)}.",
            "Try a smaller --batch; an operator without a gradient cannot be trained.",
        ) from error
    value = float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_([p for g in run.optimizer.param_groups for p in g["params"]], _GRADIENT_NORM))
    if not (math.isfinite(value) and math.isfinite(norm)):
        what = f"loss is {value}" if not math.isfinite(value) else f"gradient is {norm}"
        raise _diverged(run, what, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    return value


def _diverged(run: _Run, what: str, step: int) -> UsageError:
    return UsageError(
        f"the {what} at step {step + 1} of {run.steps}; nothing was written.",
        f"Try a smaller --lr than {run.options.learning_rate:g}, and check the labels and the --loss.",
    )


def learning_rate_at(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over a twentieth of the steps, then half a cosine down to zero (Loshchilov and Hutter 2017)."""
    warm_up = max(1, int(steps * _WARM_UP_SHARE))
    if step < warm_up:
        return highest * (step + 1) / warm_up
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _answers(teacher: FlatModule | None, spec: Spec, device: str) -> Callable[[Dataset], dict[str, Tensor]] | None:
    if teacher is None:
        return None
    teacher.to(device).eval()

    def answers(batch: Dataset) -> dict[str, Tensor]:
        with torch.no_grad():
            return by_name(teacher, spec, to_device(batch.inputs, device))

    return answers


def _to(labels: Labels, device: str) -> Labels:
    if isinstance(labels, dict):
        return {name: tensor.to(device) for name, tensor in labels.items()}
    return None if labels is None else labels.to(device)


def _interrupted(run: _Run, position: Position, checkpoint: Path | None) -> InterruptedSearch:
    where = f"the training was stopped at step {position.step} of {run.steps}"
    if checkpoint is None:
        return InterruptedSearch(f"{where}; nothing was kept.")
    if position.batch >= run.steps_per_epoch:
        position = _next_epoch(run, position)
    save_checkpoint(checkpoint, run.student, run.optimizer, position)
    return InterruptedSearch(f"{where}; its state is kept.", "Run the same command again to go on from there.")


@contextmanager
def _seeded(device: str) -> Iterator[None]:
    """The caller's random numbers are as they were when the block ends."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """The event is set by Ctrl-C, so that a step is never cut in two; a second Ctrl-C ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
