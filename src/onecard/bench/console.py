"""The figures on a terminal, and how far the load generator is while it runs."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onecard.bench.result import BenchResult, Knee, KneePoint, RunResult
from onecard.bench.session import BenchView
from onecard.bench.summary import describe, rate, rows_of
from onecard.report.format import clean, duration_ms

_EVERY_S = 10.0  # between two lines where nobody watches


def print_bench(found: BenchResult, out: Console) -> None:
    """Everything that was found, and what limits it."""
    about = ", ".join(f"{name} {value}" for name, value in found.target.items() if value)
    out.print(f"[bold]{escape(found.address)}[/]  {escape(clean(about))}", soft_wrap=True)
    if found.knee is not None:
        print_knee(found.knee, found.settings.objective, out)
    if found.run is not None:
        print_run(found.run, out)


def print_knee(knee: Knee, objective: str, out: Console) -> None:
    """The points of the search, by rate, and where the knee is."""
    table = _table("requests/s", "answered/s", "p50", objective.partition("=")[0], "p99.9", "in time/s", "lag p99", "")
    for point in sorted(knee.points, key=lambda p: p.qps):
        table.add_row(*_point_cells(point))
    out.print(table)
    above = f", but not {rate(knee.above_qps)}" if knee.above_qps < math.inf else ""
    what = f"{rate(knee.qps)} requests/s keep {objective}{above}" if knee.qps else f"no rate keeps {objective}"
    out.print(f"[bold]The knee:[/] {what}.")
    if knee.note:
        out.print(f"[yellow]{escape(knee.note)}[/]", soft_wrap=True)


def print_run(run: RunResult, out: Console) -> None:
    """The figures of one run."""
    out.print()
    out.print(f"[bold]{escape(run.scenario)}[/]: {describe(run)}", soft_wrap=True)
    figures = Table(show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for name, value in rows_of(run):
        figures.add_row(name, escape(value))
    latencies = _table(*run.percentiles_ms, "mean")
    latencies.add_row(*(duration_ms(ms) for ms in run.percentiles_ms.values()), duration_ms(run.mean_ms))
    out.print(figures)
    out.print(latencies)
    if run.objective:
        verdict = "[green]kept[/]" if not run.shortfall else f"[red]not kept[/]: {escape(run.shortfall)}"
        out.print(f"{escape(run.objective)} {verdict}")
    if run.sender is not None and run.sender.bound:
        out.print(f"[bold yellow]generator-bound:[/] {escape(run.sender.bound)}", soft_wrap=True)
    for note in run.notes:
        out.print(escape(note), soft_wrap=True)


class ConsoleView(BenchView):
    """Progress: a bar on a terminal, a line now and then elsewhere.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._what = ""
        self._seconds = 0.0
        self._shown_s = 0.0

    def __enter__(self) -> ConsoleView:
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[made]}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("connecting", total=None, made="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, queries: int, seconds: float) -> None:
        self._what, self._seconds, self._shown_s = what, seconds or 0.0, 0.0
        if self._bar is not None:
            self._bar.update(self._task, description=what, total=seconds or None, completed=0, made="")

    def step(self, made: int, ended: int, seconds: float) -> None:
        if self._bar is not None:
            state = f"{ended:,} ended, {made - ended:,} under way"
            self._bar.update(self._task, completed=min(max(seconds, 0), self._seconds), made=state)
        elif seconds - self._shown_s >= _EVERY_S:
            self._shown_s = seconds
            self._console.print(f"{self._what}: {seconds:.0f} s, {ended:,} of {made:,} ended", soft_wrap=True)

    def point(self, point: KneePoint, low: float, high: float) -> None:
        cells = _point_cells(point)
        verdict = "kept" if point.kept else point.reason
        between = f"the knee lies above {rate(low)}" + (f" and below {rate(high)}" if high < math.inf else "")
        self._console.print(f"{cells[0]} requests/s: {cells[3]}, {verdict}; {between}", soft_wrap=True)


def _point_cells(point: KneePoint) -> tuple[str, ...]:
    run = point.result
    lag = run.sender.lag_p99_ms if run.sender is not None else math.nan
    return (
        rate(point.qps),
        rate(run.answered_per_s),
        duration_ms(run.percentiles_ms["p50"]),
        duration_ms(run.objective_ms),
        duration_ms(run.percentiles_ms["p99.9"]),
        rate(run.goodput_per_s),
        duration_ms(lag),
        "kept" if point.kept else escape(point.reason),
    )


def _table(*heads: str) -> Table:
    table = Table()
    for head in heads:
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    return table
