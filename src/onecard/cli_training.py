"""The commands that train: ``onecard qat`` and ``onecard prune``, and how they show what is going on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from onecard.models.model import Model
    from onecard.training.data import TrainingData
    from onecard.training.loop import TrainOptions, TrainProgress
    from onecard.training.qat import Figure, QatResult
    from onecard.verify.data import Dataset

_MODEL_HELP = (
    "file.py:callable, package.module:callable, torchvision:NAME, timm:NAME, hf:DIR_OR_ID, or a .pt, .pt2 or .onnx file"
)
_PIPE_WIDTH = 120
_EVERY_S = 30.0  # between two lines where nobody watches
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True, highlight=False)

ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP)]
InputOption = Annotated[
    list[str] | None, typer.Option("--input", help="An input: 'image: float32[B,3,224,224], B=1..64'. Repeat it.")
]
WeightsOption = Annotated[Path | None, typer.Option(help="State dict: .safetensors, .pt or .pth.")]
TrainOption = Annotated[
    str,
    typer.Option("--train", help="Training data: .npz, .safetensors, file.py:callable or module:callable."),
]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training data.")]
BatchOption = Annotated[int, typer.Option(help="Rows a step.")]
RateOption = Annotated[float, typer.Option("--lr", help="The highest learning rate.")]
LossOption = Annotated[
    str,
    typer.Option(
        help="file.py:callable or module:callable, f(outputs, labels) -> scalar; by default the labels' and the "
        "original's."
    ),
]
DataOption = Annotated[str | None, typer.Option(help="Rows to judge by; by default a tenth of --train is put aside.")]
MetricOption = Annotated[
    str, typer.Option(help="accuracy, top5, f1, recall@5 ..., file.py:callable or module:callable.")
]
SeedOption = Annotated[int, typer.Option(help="Of the order of rows.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda:0.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted training left.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(qat)


def qat(  # noqa: PLR0913, PLR0917 - the options are the interface
    model: ModelArgument,
    train: TrainOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .pt2 file to write.")],
    inputs: InputOption = None,
    weights: WeightsOption = None,
    epochs: EpochsOption = 3,
    batch: BatchOption = 32,
    lr: RateOption = 1e-4,
    loss: LossOption = "",
    bits: Annotated[int, typer.Option(help="Of the weights: 8 or 4.")] = 8,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="One scale for all channels of a weight.")] = False,
    data: DataOption = None,
    metric: MetricOption = "",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    fresh: FreshOption = False,
) -> None:
    """Train MODEL while it computes as its INT8 self, and write it as a program for 'optimize --qat'."""
    from onecard.training.qat import QatOptions, check_output, train_qat

    settled = train_options(epochs, batch, lr, loss, seed, device)
    options = QatOptions(settled, bits, per_tensor, absolute(metric), fresh)
    options.check()
    check_output(output)
    loaded, rows, judged = material(model, inputs, weights, train, (data, options.metric))
    with TrainingView(_err) as view:
        result = train_qat(loaded, rows, options, output=output, judged=judged, observe=view.update, say=view.say)
    _print_result(result)
    _out.print(use_with(model, inputs, weights, ("--qat", output), (data, metric or result.metric)), soft_wrap=True)


def use_with(
    model: str,
    inputs: list[str] | None,
    weights: Path | None,
    program: tuple[str, Path],
    judge: tuple[str | None, str],
) -> str:
    """The command that tries a written program beside the original, as markup for a console."""
    words = ["onecard", "optimize", model, *(part for text in inputs or () for part in ("--input", text))]
    words += ["--weights", str(weights)] if weights else []
    words += [program[0], str(program[1]), "--data", judge[0] or "FILE", "--metric", judge[1] or "NAME"]
    return f"Use it: {escape(shlex.join(words))}"


def train_options(epochs: int, batch: int, lr: float, loss: str, seed: int, device: str) -> TrainOptions:
    """The options of the loop, checked before anything is loaded."""
    from onecard.environment import resolve_device
    from onecard.training.loop import TrainOptions

    options = TrainOptions(epochs, batch, lr, absolute(loss), seed, resolve_device(device))
    options.check()
    return options


def material(
    model: str, inputs: list[str] | None, weights: Path | None, train: str, judge: tuple[str | None, str]
) -> tuple[Model, TrainingData, Dataset | None]:
    """Load the model, the rows to train on, and those to judge by (``--data`` and ``--metric``), if any are named."""
    from onecard.models.load import load_model
    from onecard.training.data import load_training_data
    from onecard.training.qat import judged_rows

    _err.print(f"Loading [bold]{escape(model)}[/] ...")
    loaded = load_model(model, inputs=inputs or (), weights=weights)
    _err.print(f"Inputs: {escape(str(loaded.spec))}")
    rows = load_training_data(train, loaded.spec)
    _err.print(f"Training data: {rows.rows} rows, {'labelled' if rows.labelled else 'without labels'}")
    data, metric = judge
    return loaded, rows, judged_rows(data, metric, loaded.spec) if data else None


def absolute(reference: str) -> str:
    """A ``file.py:callable`` whose file is found from any folder, so that a training can be taken up from anywhere."""
    path, colon, name = reference.rpartition(":")
    return f"{Path(path).absolute()}:{name}" if colon and path.endswith(".py") else reference


class TrainingView:
    """Progress on a terminal, and a line now and then where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._shown = 0.0

    def __enter__(self) -> TrainingView:
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None, what="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """What is going on beside the steps."""
        if self._bar is None:
            self._console.print(f"{escape(text)} ...")
        else:
            self._bar.update(self._task, description=text, total=None, what="")

    def update(self, progress: TrainProgress) -> None:
        """One step is done."""
        what = f"loss {progress.loss:.4g}, lr {progress.learning_rate:.1e}"
        where = f"epoch {progress.epoch}/{progress.epochs}"
        if self._bar is not None:
            self._bar.update(self._task, description=where, total=progress.steps, completed=progress.step, what=what)
        elif progress.seconds - self._shown > _EVERY_S or progress.step == progress.steps:
            self._shown = progress.seconds
            left = f"{progress.remaining_s:.0f} s left"
            self._console.print(f"{where}, step {progress.step}/{progress.steps}, {what}, {left}")


def _print_result(result: QatResult) -> None:
    from rich.table import Table

    weights = f"{result.bits}-bit, one scale a {'layer' if result.per_tensor else 'channel'}"
    _out.print(f"{escape(result.model)}: {result.layers} layers, {weights}; {result.judged_rows} rows judged")
    table = Table()
    table.add_column("", no_wrap=True)
    for heading in (result.metric or "metric", "same class", "error"):
        table.add_column(heading, justify="right")
    rows = (("fp32", result.fp32), ("post-training", result.post_training), ("trained", result.qat))
    for name, figure in rows:
        table.add_row(name, *_cells(figure))
    _out.print(table)
    if not result.is_better:
        _out.print(
            "The training gained nothing over post-training quantisation: 'onecard optimize' alone does as well."
        )
    _out.print(f"Wrote {escape(result.path)}", soft_wrap=True)


def _cells(figure: Figure) -> tuple[str, str, str]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    return share(figure.metric), share(figure.agreement), f"{figure.error:.4f}"
