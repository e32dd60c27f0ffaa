"""The command that runs MLPerf's LoadGen on a bundle, ``onecard mlperf``, and what it shows."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onecard.units import parse_duration

if TYPE_CHECKING:
    from onecard.bench.mlperf import MlperfResult
    from onecard.bench.mlperf_job import Mode, Scenario

INVALID_EXIT_CODE = 11
"""LoadGen ran to its end and calls the run INVALID: no error of onecard's, and no result for MLPerf either."""

_PIPE_WIDTH = 120
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="mlperf")(mlperf_command)


def mlperf_command(  # noqa: PLR0913, PLR0917 - the options are the interface
    bundle: Annotated[Path, typer.Argument(help="A folder that 'onecard optimize' wrote.")],
    scenario: Annotated[str, typer.Option(help="SingleStream, MultiStream, Server or Offline.")],
    data: Annotated[
        str,
        typer.Option(help="The samples: .npz, .safetensors, file.py:callable or module:callable; labels for accuracy."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for LoadGen's files and the result.")],
    mode: Annotated[str, typer.Option(help="performance, or accuracy: each sample once.")] = "performance",
    qps: Annotated[
        float | None, typer.Option(help="Server: queries a second to send. Offline: samples a second to expect.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="Server: the bound, 15ms. SingleStream, MultiStream: the latency to expect.")
    ] = None,
    percentile: Annotated[float | None, typer.Option(help="Of the latencies: 0.9 in SingleStream, else 0.99.")] = None,
    min_duration: Annotated[str, typer.Option(help="Run for at least so long.")] = "60s",
    min_queries: Annotated[int, typer.Option(help="Send at least so many queries; in Offline, samples.")] = 100,
    samples_per_query: Annotated[int, typer.Option(help="In MultiStream.")] = 8,
    metric: Annotated[
        str, typer.Option(help="For accuracy: accuracy, top5, f1 ..., file.py:callable or module:callable.")
    ] = "accuracy",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Measure BUNDLE with MLPerf's own load generator; what it calls INVALID ends with exit code 11."""
    from onecard.bench.mlperf import run_mlperf
    from onecard.bench.mlperf_job import MlperfJob, MlperfSettings
    from onecard.evidence import to_json

    settings = MlperfSettings(
        cast("Scenario", scenario),
        cast("Mode", mode),
        qps,
        parse_duration(latency) if latency else None,
        percentile,
        parse_duration(min_duration),
        min_queries,
        samples_per_query,
    )
    command = shlex.join(["onecard", *sys.argv[1:]])
    with _View(_err) as view:
        result = run_mlperf(MlperfJob(bundle, data, output, settings, metric, device, command), view.update)
    if json:
        sys.stdout.write(to_json(result).decode() + "\n")
    else:
        print_result(result, output, _out)
    if result.summary.valid is False:
        raise typer.Exit(INVALID_EXIT_CODE)


def print_result(result: MlperfResult, folder: Path, out: Console) -> None:
    """What LoadGen found, its verdict, and what to change if it is INVALID."""
    from onecard.bench.mlperf_summary import advise

    settings, summary = result.settings, result.summary
    table = Table(show_header=False)
    table.add_row("scenario", f"{settings.scenario}, {settings.mode}")
    table.add_row("model", f"{escape(result.bundle)} on {result.environment.device}, {result.samples} samples")
    for name, value in _figures(result):
        table.add_row(name, value)
    if summary.valid is not None:
        table.add_row("LoadGen says", "[bold green]VALID[/]" if summary.valid else "[bold red]INVALID[/]")
    if summary.errors or summary.warnings:
        table.add_row("it logged", f"{summary.errors} errors, {summary.warnings} warnings")
    out.print(table)
    for line in advise(summary, settings):
        out.print(escape(line), soft_wrap=True)
    out.print(f"Written to {escape(str(folder))}: mlperf.json and LoadGen's own files", soft_wrap=True)


def _figures(result: MlperfResult) -> list[tuple[str, str]]:
    from onecard.report.format import duration_ms, significant

    summary, latency = result.summary, result.summary.latency_ns
    found = []
    if result.score is not None:
        found.append((escape(result.metric), f"{result.score:.6g}"))
    if summary.samples_per_s is not None:
        found.append(("samples/s", significant(summary.samples_per_s)))
    target = "" if summary.latency_percentile is None else f"p{100 * summary.latency_percentile:g}"
    if target:
        found.append((f"{target}, the result", duration_ms(latency["result"] / 1e6)))
    if result.settings.scenario != "Offline":
        names = [name for name in ("mean", "p50", "p99") if name in latency and name != target]
        found += [(name, duration_ms(latency[name] / 1e6)) for name in names]
    return found


class _View:
    """Progress on a terminal; where there is none, a line for each stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Any = None
        self._stage = ""

    def __enter__(self) -> _View:
        if self._console.is_terminal:
            self._status = self._console.status("starting LoadGen's process")
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, message: Any) -> None:
        """Something was said by the run's process."""
        from onecard.bench.mlperf_job import Note

        if isinstance(message, Note):
            self._console.print(f"[yellow]warning:[/] {escape(message.text)}", soft_wrap=True)
        elif self._status is not None:
            counts = f": {message.answered:,} of {message.issued:,} samples answered" if message.issued else ""
            self._status.update(f"{escape(message.stage)}{counts}")
        elif message.stage != self._stage:
            self._stage = message.stage
            self._console.print(f"{escape(message.stage)} ...")
