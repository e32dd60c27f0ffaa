"""What a search shows in a terminal while it runs: what is running, the best so far, and the time left."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from onecard.evidence import Candidate
from onecard.recipe import ORIGINAL

if TYPE_CHECKING:
    from onecard.search.options import Progress

_STYLES = {"ok": "green", "wrong": "red", "crashed": "red", "timeout": "yellow", "out_of_memory": "yellow"}


class LiveView:
    """A live view on a terminal, or a line for each finished candidate where there is none.

    Args:
        console: where to show it (standard error, so that the table alone is the output).
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._seen: set[str] = set()
        self._phases: set[str] = set()

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Show the state of the search."""
        for name, candidate in progress.done.items():
            if name not in self._seen:
                self._seen.add(name)
                self._console.print(_line(candidate, progress), soft_wrap=True)
        if progress.phase not in self._phases and self._live is None:
            self._phases.add(progress.phase)
            self._console.print(f"{progress.phase} ...")
        if self._live:
            self._live.update(_panel(progress))


def _line(candidate: Candidate, progress: Progress) -> Text:
    reason = candidate.verdict.reason
    text = Text(f"{reason:>13} ", style=_STYLES.get(reason, "dim"))
    text.append(f"{candidate.id:<44}", style="default")
    timings = candidate.measurement.timings
    if timings and candidate.verdict.ok:
        text.append("  ".join(f"{t.label} {t.median_ms:.3g} ms" for t in timings), style="default")
    elif candidate.verdict.detail:
        text.append(candidate.verdict.detail, style="dim")
    return text


def _panel(progress: Progress) -> RenderableType:
    left = max(0.0, progress.time_limit_s - progress.elapsed_s)
    head = Text.assemble(
        (f"{progress.phase}  ", "bold"),
        f"{len(progress.done)} of {len(progress.recipes)} candidates",
        f" ({progress.resumed} from an earlier run)" if progress.resumed else "",
        f" · {_clock(progress.elapsed_s)} gone, at most {_clock(left)} left · Ctrl-C ends it with what there is",
    )
    table = Table.grid(padding=(0, 2))
    for item in progress.running:
        table.add_row("  " + escape(item.task.name), escape(item.stage), _clock(item.seconds))
    parts: list[RenderableType] = [
        head,
        ProgressBar(total=len(progress.recipes), completed=len(progress.done), width=60),
    ]
    best = _best(progress)
    return Group(*parts, table, *([best] if best else []))


def _best(progress: Progress) -> Text | None:
    original = progress.done.get(ORIGINAL.id)
    passed = [c for c in progress.done.values() if c.verdict.ok and c.measurement.timings]
    if original is None or not original.measurement.timings or not passed:
        return None
    best = min(passed, key=lambda c: c.measurement.timings[0].median_ms)
    mine, theirs = best.measurement.timings[0], original.measurement.timings[0]
    return Text(
        f"best so far: {best.id}, {mine.median_ms:.3g} ms at {mine.label}, "
        f"{theirs.median_ms / mine.median_ms:.2f} times as fast as the original",
        style="bold green",
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line on standard error for onecard's own warnings; those of other libraries are not the user's."""
    if category.__module__.startswith("onecard"):
        Console(stderr=True, highlight=False).print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)
