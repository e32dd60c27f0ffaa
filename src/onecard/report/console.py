"""The same outcome for a terminal or a pipe: a table that fits, the reasons and cures, the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onecard.evidence import Candidate, Evidence
from onecard.report import figures
from onecard.report import format as fmt
from onecard.report.advice import advice
from onecard.report.compression import compressed, in_short
from onecard.spec import Bucket

_STYLES = {"ok": "green", "slower": "dim", "unavailable": "dim", "unsupported": "dim", "skipped": "dim"}
_GAP = 2
_LONGEST_RECIPE = 44
_SHORTEST_RECIPE = 22
_MAX_ADVICE = 4
_ALWAYS = 0


@dataclass(frozen=True)
class _Column:
    """One column: its head, a cell for each row, and how early it goes when room is short (0: never)."""

    head: str
    cells: list[str]
    goes: int = _ALWAYS
    right: bool = True

    def width(self) -> int:
        return max(cell_len(part) for text in (self.head, *self.cells) for part in text.split("\n")) + _GAP


def summary_line(evidence: Evidence) -> str:
    """The outcome in one sentence of plain text, for a log or a shell."""
    return figures.outcome_text(evidence)


def print_table(evidence: Evidence, console: Console, bundle: Path | None = None) -> None:
    """Print every candidate with its figures, the failures' reasons and cures, and the outcome.

    Args:
        evidence: the outcome of a search.
        console: where to; its width decides which columns are shown.
        bundle: the folder that was written, to say where things are.
    """
    rows = figures.ordered(evidence)
    console.print()
    console.print(_table(evidence, rows, console))
    console.print()
    _print_reasons([c for c in rows if c.verdict.reason != "ok"], console)
    _print_compression(evidence, console)
    _print_warnings(rows, console)
    _print_notes(evidence, console)
    _print_advice(evidence, console)
    _print_outcome(evidence, console)
    if bundle is not None:
        _print_files(bundle, console)


def _say(console: Console, text: str, style: str = "") -> None:
    """Print text as it is: no markup, no highlighting, and plain signs where the output knows only ASCII."""
    console.print(Text(_plain(text, console), style=style), highlight=False, soft_wrap=False)


def _plain(text: str, console: Console) -> str:
    """``text`` without signs that the output's encoding cannot hold."""
    cleaned = fmt.clean(text)
    if not console.options.ascii_only:
        return cleaned
    for sign, letters in _ASCII.items():
        cleaned = cleaned.replace(sign, letters)
    return cleaned.encode("ascii", "replace").decode()


_ASCII = {
    "\u00d7": "x", "\u2013": "-", "✓": "+", "✗": "x", "≈": "~", "○": "o", "±": "+/-", "°": "", "µ": "u", "→": "->",
    "…": "~", "“": '"', "”": '"',
}  # fmt: skip


def _table(evidence: Evidence, rows: Sequence[Candidate], console: Console) -> Table:
    columns = _fitting(_columns(evidence, rows), console.width)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    for column in columns:
        justify = "right" if column.right else "left"
        table.add_column(
            Text(_plain(column.head, console)),
            justify=justify,  # type: ignore[arg-type]
            no_wrap=True,
            vertical="bottom",
            overflow="fold",
        )
    for number, row in enumerate(rows):
        cells = [Text(_plain(column.cells[number], console)) for column in columns]
        cells[1].stylize(_STYLES.get(row.verdict.reason, "red"))
        style = "bold" if row.id == evidence.chosen else ("" if row.verdict.ok else "dim")
        table.add_row(*cells, style=style)
    return table


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """The columns that fit ``width``: dispensable ones go first, then the recipes are cut in their middle."""
    kept = list(columns)
    recipes = min(kept[0].width(), _LONGEST_RECIPE + _GAP)
    while recipes + sum(c.width() for c in kept[1:]) - _GAP > width and any(c.goes for c in kept):
        last = max(c.goes for c in kept)
        kept = [c for c in kept if c.goes != last]
    room = max(width - sum(c.width() for c in kept[1:]), _SHORTEST_RECIPE)
    kept[0] = _Column(kept[0].head, [fmt.shorten(cell, room) for cell in kept[0].cells], right=False)
    return kept


def _columns(evidence: Evidence, rows: Sequence[Candidate]) -> list[_Column]:
    names = [("* " if c.id == evidence.chosen else "  ") + fmt.clean(c.id) for c in rows]
    verdicts = [" ".join(figures.LABELS[c.verdict.reason]) for c in rows]
    found = [_Column("  recipe", names, right=False), _Column("verdict", verdicts, right=False)]
    buckets = figures.buckets(evidence)
    headline = figures.headline_bucket(evidence)
    for position, bucket in enumerate(buckets):
        # The headline's bucket stays; of the others, those in the middle are the first to go.
        goes = _ALWAYS if bucket == headline else 20 + min(position, len(buckets) - 1 - position)
        found += _timing_columns(evidence, rows, bucket, goes)
    found.append(_Column("rel.\nerror", [_error(c) for c in rows], 10))
    if any(figures.worst_agreement(c) is not None for c in rows):
        found.append(_Column("top-1\nagree", [fmt.agreement(figures.worst_agreement(c)) for c in rows], 40))
    named = next((c.metric.name for c in rows if c.metric), None)
    if named:
        metric = [f"{c.metric.value:.4f}" if c.metric else fmt.NONE for c in rows]
        found.append(_Column(fmt.shorten(fmt.clean(named), 10), metric, 11))
    found.append(_Column("peak\nMiB", [_whole(c.measurement.peak_bytes) for c in rows], 15))
    found.append(_Column("size\nMiB", [_whole(c.measurement.size_bytes) for c in rows], 41))
    build = [f"{c.measurement.build_s:.0f}" if c.measurement.build_s > 0 else fmt.NONE for c in rows]
    found.append(_Column("build\ns", build, 42))
    return found


def _whole(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size > 0 else fmt.NONE


def _error(candidate: Candidate) -> str:
    if any(e.relative_l2 != e.relative_l2 for e in candidate.errors):
        return "NaN"
    return fmt.relative_error(candidate.worst_error)


def _timing_columns(evidence: Evidence, rows: Sequence[Candidate], bucket: Bucket, goes: int) -> list[_Column]:
    """Median and speed-up of one bucket (rows a second too, if that was the objective)."""
    timings = [evidence.timing(c.id, bucket) for c in rows]
    medians = [t.median_ms if t else float("nan") for t in timings]
    decimals = fmt.column_decimals(medians)
    name = fmt.sizes(bucket) if bucket else "median"
    gains = [figures.speedup(evidence, c.id, bucket) for c in rows]
    found = [_Column(f"{name}\nms", [fmt.fixed(m, decimals) for m in medians], goes)]
    if figures.by_throughput(evidence):
        rates = [fmt.count(t.throughput) if t and t.median_ms > 0 else fmt.NONE for t in timings]
        found.append(_Column("rows/s", rates, goes))
    found.append(_Column("speed-up", [fmt.times(g) for g in gains], goes))
    return found


def _print_reasons(failed: Sequence[Candidate], console: Console) -> None:
    """One paragraph for each reason and cure, with all the recipes that share it."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for candidate in failed:
        verdict = candidate.verdict
        groups.setdefault((verdict.reason, verdict.detail, verdict.cure), []).append(candidate.id)
    for (reason, detail, cure), names in groups.items():
        sign, word = figures.LABELS[reason]
        _say(console, f"{sign} {', '.join(names)}: {word}", _STYLES.get(reason, "red"))
        for text, style in ((detail, ""), (f"Cure: {cure}" if cure else "", "bold")):
            if text:
                console.print(
                    Padding(Text(_plain(text, console), style=style), (0, 0, 0, 2), expand=False), highlight=False
                )


def _print_compression(evidence: Evidence, console: Console) -> None:
    """One line for each compressed candidate; the page has the trials and layers."""
    for candidate in compressed(evidence):
        _say(console, f"{candidate.id}: {'; '.join(in_short(found) for found in candidate.compression)}")


def _print_warnings(rows: Sequence[Candidate], console: Console) -> None:
    for candidate in rows:
        for warning in candidate.warnings:
            _say(console, f"Warning ({candidate.id}): {warning}", "yellow")


def _print_notes(evidence: Evidence, console: Console) -> None:
    """What the search had to say of the model and of itself."""
    for note in evidence.notes:
        _say(console, f"Note: {note}", "yellow")


def _print_advice(evidence: Evidence, console: Console) -> None:
    """The first few things to try; the page has all of them."""
    items = advice(evidence)
    if not items:
        return
    console.print()
    _say(console, "What to try next", "bold")
    for item in items[:_MAX_ADVICE]:
        _say(console, f"- {item.action}")
    if items[_MAX_ADVICE:]:
        _say(console, f"  and {len(items) - _MAX_ADVICE} more, with their reasons, in report.html.", "dim")


def _print_outcome(evidence: Evidence, console: Console) -> None:
    console.print()
    _say(console, figures.outcome_text(evidence), "bold")
    buckets = figures.buckets(evidence)
    if len(buckets) == 1:
        return
    for bucket in buckets:
        rank = figures.rank_of(evidence, bucket)
        noise = f" (noise ± {fmt.percent(rank.noise)})" if rank else ""
        gain = fmt.times(figures.won_speedup(evidence, bucket))
        _say(console, f"  {fmt.sizes(bucket)}: {figures.winner(evidence, bucket)}, {gain}{noise}")


def _print_files(bundle: Path, console: Console) -> None:
    console.print()
    for name, path in (("bundle", bundle), ("report", bundle / "report.html")):
        # Paths are not wrapped: a broken path can be neither clicked nor copied.
        console.print(Text(f"{name}  {_plain(str(path), console)}"), soft_wrap=True, highlight=False)
