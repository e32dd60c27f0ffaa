"""The command ``onecard prune``: options in, progress and a table of what pruning cost and gained out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onecard.cli_training import use_with
from onecard.errors import UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from onecard.training.prune_options import PruneProgress
    from onecard.training.prune_result import PruneResult

_MODEL_HELP = "file.py:callable, package.module:callable, torchvision:NAME, timm:NAME or hf:DIR_OR_ID"
_PIPE_WIDTH = 120
_SHOWN_LAYERS = 12


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="prune")(prune)


def prune(  # noqa: PLR0913, PLR0917 - the options are the interface
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    target: Annotated[str, typer.Option(help="flops=0.5, params=0.4, latency=0.6, latency=3ms or size=5MB.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .pt2 program to write.")],
    criterion: Annotated[str, typer.Option(help="magnitude or taylor.")] = "magnitude",
    train: Annotated[
        str | None,
        typer.Option(help="Rows to fine-tune on: .npz, .safetensors, file.py:callable or module:callable."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of the last fine-tuning; each before has a quarter of them.")] = 4,
    batch: Annotated[int, typer.Option(help="Rows a step of the fine-tuning.")] = 32,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-4,
    loss: Annotated[
        str, typer.Option(help="file.py:callable or module:callable, f(outputs, labels) -> scalar tensor.")
    ] = "",
    steps: Annotated[int, typer.Option(help="In how many steps to prune.")] = 3,
    round_to: Annotated[int, typer.Option(help="Leave channels in multiples of it.")] = 8,
    keep: Annotated[list[str] | None, typer.Option(help="Layers that lose no channels: a glob. Repeat it.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to judge by; else the last tenth of --train.")] = None,
    metric: Annotated[str, typer.Option(help="accuracy, top5, f1 ..., file.py:callable or module:callable.")] = "",
    max_drop: Annotated[float | None, typer.Option(help="How far the metric or agreement may fall.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="An input: 'image: float32[B,3,224,224], B=1..64'. Repeat it.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="State dict: .safetensors, .pt or .pth.")] = None,
    accept_closest: Annotated[
        bool, typer.Option("--accept-closest", help="Write the closest where the target cannot be met.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted pruning left.")] = False,
) -> None:
    """Remove channels of MODEL until it is as small as you want, fine-tuning in between."""
    from onecard.environment import resolve_device
    from onecard.models.load import load_model
    from onecard.training.cost import parse_target
    from onecard.training.data import load_training_data
    from onecard.training.loop import TrainOptions
    from onecard.training.prune import prune as run
    from onecard.training.prune_options import PruneOptions
    from onecard.training.prune_result import check_output
    from onecard.verify.data import load_data

    asked = parse_target(target)
    settled = resolve_device(device)
    training = TrainOptions(epochs=epochs, batch=batch, learning_rate=lr, loss=loss, device=settled)
    options = PruneOptions(
        criterion, steps, round_to, tuple(keep or ()), training, metric, max_drop, accept_closest, fresh
    )
    options.check()
    check_output(output)
    if train is None and criterion == "taylor":
        raise UsageError("the criterion taylor needs rows to compute gradients on.", "Pass them with --train.")
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    err = Console(stderr=True, highlight=False)
    err.print(f"Loading [bold]{escape(model)}[/] ...")
    loaded = load_model(model, inputs=inputs or (), weights=weights)
    err.print(f"Inputs: {escape(str(loaded.spec))}", soft_wrap=True)
    rows = load_training_data(train, loaded.spec) if train else None
    judged = load_data(data, loaded.spec) if data else None
    with _Progress(err) as view:
        result = run(loaded, asked, options, output=output, data=rows, judged=judged, observe=view.update)
    print_result(result, out)
    out.print(f"Wrote {escape(str(output))} and {escape(output.with_suffix('.json').name)}", soft_wrap=True)
    out.print(use_with(model, inputs, weights, ("--pruned", output), (data, metric)), soft_wrap=True)


def print_result(result: PruneResult, out: Console) -> None:
    """The table of costs and the yardstick, before and after, and the layers that lost most."""
    from onecard.training.cost import MEASURES, show_amount

    table = Table(title=f"{escape(result.model)} pruned to {result.target}", title_justify="left")
    for name in ("", "before", "after", "share"):
        table.add_column(name, justify="left" if not name else "right")
    for measure in MEASURES:
        before, after = result.before.of(measure), result.after.of(measure)
        share = f"{after / before:.3f}" if before else ""
        table.add_row(measure, show_amount(measure, before), show_amount(measure, after), share)
    if result.score is not None and result.score.after is not None:
        table.add_row(
            f"{result.score.name} ({result.score.rows} rows)",
            f"{result.score.before:.4f}",
            f"{result.score.after:.4f}",
            f"{result.score.after - result.score.before:+.4f}",
        )
    out.print(table)
    most = sorted(result.layers, key=lambda layer: layer.after[1] / layer.before[1])[:_SHOWN_LAYERS]
    lost = [layer for layer in most if layer.after[1] < layer.before[1]]
    for layer in lost:
        out.print(f"  {escape(layer.layer)}: {layer.before[1]} channels -> {layer.after[1]}", soft_wrap=True)
    if len(result.layers) > len(lost):
        out.print(f"  ({len(result.layers)} layers changed; all are in the .json)")
    for note in result.notes:
        out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)


class _Progress:
    """One line that is kept up to date on a terminal; elsewhere a line for each new phase.

    Args:
        console: standard error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._phase = ""

    def __enter__(self) -> _Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: PruneProgress) -> None:
        """Show where the pruning is."""
        head = f"step {progress.step} of {progress.steps}: " if progress.step else ""
        text = head + progress.what
        train = progress.train
        if self._live is None:
            phase = head + progress.what.split(" without ")[0]
            if phase != self._phase:
                self._phase = phase
                self._console.print(escape(phase), soft_wrap=True)
            return
        if train is not None:
            left = f"{int(train.remaining_s) // 60}:{int(train.remaining_s) % 60:02d} left"
            text += f" · epoch {train.epoch} of {train.epochs} · batch {train.step} of {train.steps}"
            text += f" · loss {train.loss:.4g} · {left} · Ctrl-C keeps the state"
        self._live.update(Text(text))
