"""The command that measures how to run a bundle, ``onecard tune``, and what it shows."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onecard.report.machine import user_code_on_stderr
from onecard.units import parse_duration

if TYPE_CHECKING:
    from onecard.runtime.tune import TunePlan, TuneProgress
    from onecard.tuning import LoadPoint, Setting, Tuning

_PIPE_WIDTH = 120
_EVERY_S = 10.0  # between two lines where nobody watches
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="tune")(tune_command)


def tune_command(  # noqa: PLR0913, PLR0917 - the options are the interface
    bundle: Annotated[Path, typer.Argument(help="A folder that 'onecard optimize' wrote.")],
    p99: Annotated[
        list[str] | None, typer.Option("--p99", help="Find the most throughput under this limit: 5ms. Repeat it.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes of the curve. Repeat it.")] = None,
    lanes: Annotated[list[int] | None, typer.Option(help="Copies of the model side by side. Repeat it.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of every request in the search under limits.")] = 1,
    seconds_per_point: Annotated[float, typer.Option(help="For each batch size, at least.")] = 0.5,
    time_limit: Annotated[str, typer.Option(help="After it only what was found is confirmed.")] = "5m",
    ingest: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=DTYPE ...",
            help="Send an input so: 'image=uint8 NHWC mean=.. std=..', 'ids=int32'. Repeat it.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured.")] = False,
    json: Annotated[bool, typer.Option("--json", help="What was found as JSON.")] = False,
) -> None:
    """Measure throughput and latency of BUNDLE over batch sizes, find the best settings, and write them into it."""
    from onecard.api_tuning import plan_tuning, tune
    from onecard.evidence import to_json
    from onecard.runtime.tune import TuneOptions

    options = TuneOptions(
        tuple(parse_duration(text) * 1e3 for text in p99 or ()),
        tuple(batch or ()),
        tuple(lanes or ()),
        rows,
        seconds_per_point,
        parse_duration(time_limit),
        tuple(ingest or ()),
    )
    if dry_run:
        with user_code_on_stderr(json):
            plan = plan_tuning(bundle, device=device, options=options)
        if json:
            sys.stdout.write(to_json(plan).decode() + "\n")
        else:
            _print_plan(plan)
        return
    with user_code_on_stderr(json), _View(_err) as view:
        command = shlex.join(["onecard", *sys.argv[1:]])
        found = tune(bundle, device=device, options=options, observe=view.update, command=command)
    if json:
        sys.stdout.write(to_json(found).decode() + "\n")
        return
    print_tuning(found, _out)
    _out.print(f"Written into {escape(str(bundle))}: tuning.json, report.html", soft_wrap=True)


def print_tuning(found: Tuning, out: Console) -> None:
    """The curve, the settings, and what else there is to know."""
    curve = _table("batch", "lanes", "rows/s", "p50", "p99", "batches", "")
    for point in found.points:
        curve.add_row(*_point_cells(point), "[bold green]the knee[/]" if point == found.knee else escape(point.failed))
    out.print(curve)
    settings = _table("p99 within", "rows/s", "p50", "p99", "batch", "waits", "lanes", "mean batch", "requests")
    for setting in found.settings:
        if setting.rows_per_s:
            settings.add_row(*_setting_cells(setting))
    if settings.row_count:
        rows = "1 row" if found.request_rows == 1 else f"{found.request_rows} rows"
        out.print(f"The most throughput under a limit, requests of {rows} at random times:")
        out.print(settings)
    for setting in found.settings:
        if setting.failed:
            out.print(f"p99 within {setting.p99_limit_ms:g} ms: {escape(setting.failed)}", soft_wrap=True)
    for note in found.notes:
        out.print(escape(note), soft_wrap=True)


class _View:
    """Progress on a terminal, and a line now and then where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._shown_s = -_EVERY_S

    def __enter__(self) -> _View:
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[left]}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("opening the bundle", total=None, left="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: TuneProgress) -> None:
        """Another measurement begins."""
        left = f"about {progress.left_s:.0f} s left"
        if self._bar is not None:
            total = progress.seconds + progress.left_s
            self._bar.update(self._task, description=progress.what, left=left, total=total, completed=progress.seconds)
        elif progress.seconds - self._shown_s >= _EVERY_S:
            self._shown_s = progress.seconds
            self._console.print(f"{escape(progress.what)}, {left}", soft_wrap=True)


def _print_plan(plan: TunePlan) -> None:
    def words(values: tuple[float, ...] | tuple[int, ...]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    _out.print(f"on {plan.device}, about {plan.seconds:.0f} s:")
    if plan.ingest:
        _out.print(f"  sent as     {escape(', '.join(plan.ingest))}", soft_wrap=True)
    _out.print(f"  batches     {words(plan.batches)}", soft_wrap=True)
    _out.print(f"  lanes       {words(plan.lanes)}")
    _out.print(f"  p99 limits  {words(plan.limits_ms)} ms, requests of {plan.rows} row{'s' if plan.rows > 1 else ''}")


def _table(*heads: str) -> Table:
    table = Table()
    for head in heads:
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    return table


def _point_cells(point: LoadPoint) -> tuple[str, ...]:
    from onecard.report.format import count, duration_ms

    if point.failed:
        return str(point.batch), str(point.lanes), "", "", "", ""
    times = duration_ms(point.p50_ms), duration_ms(point.p99_ms)
    return str(point.batch), str(point.lanes), count(point.rows_per_s), *times, str(point.batches)


def _setting_cells(setting: Setting) -> tuple[str, ...]:
    from onecard.report.format import count, duration_ms, significant

    times = duration_ms(setting.p50_ms), duration_ms(setting.p99_ms)
    waits = duration_ms(setting.max_delay_ms) if setting.max_delay_ms else "0"
    batch = str(setting.batch), waits, str(setting.lanes), significant(setting.batch_mean)
    return f"{setting.p99_limit_ms:g} ms", count(setting.rows_per_s), *times, *batch, str(setting.requests)
