"""The candidates as an HTML table: every one with its figures, its reason and cure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from onecard.evidence import Candidate, Evidence, Timing
from onecard.report import figures
from onecard.report import format as fmt
from onecard.spec import Bucket

_SECONDS = 1000.0
_MIB = 2**20


@dataclass(frozen=True)
class Column:
    """One column: its head, a tooltip, each row's value for sorting, and how the value is shown.

    ``bucket`` is the position of the bucket it belongs to, or None where it is the same for all.
    """

    head: str
    help: str
    values: list[float]
    show: Callable[[float], str]
    bucket: int | None = None


def code(text: str) -> str:
    """User text as code, escaped, with places where a long recipe may wrap."""
    return f"<code>{escape(fmt.clean(text)).replace('+', '<wbr>+')}</code>"


def badge(candidate: Candidate) -> str:
    """The verdict as sign and word, so that it does not hang on colour."""
    sign, word = figures.LABELS[candidate.verdict.reason]
    return f'<span class="badge {escape(candidate.verdict.reason)}"><b>{sign}</b> {word}</span>'


def bucket_class(position: int | None) -> str:
    """The class by which the bucket selector shows and hides."""
    return "" if position is None else f" bk b{position}"


def candidates_table(evidence: Evidence) -> str:
    """Every candidate, best first, one group of columns per bucket."""
    rows = figures.ordered(evidence)
    columns = _columns(evidence, rows)
    bodies = "".join(_body(evidence, row, number, columns) for number, row in enumerate(rows))
    caption = "All candidates. A reason and its cure stand below each that did not pass."
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Candidates"><table class="candidates">'
        f'<caption class="hidden">{caption}</caption>{_head(evidence, columns)}{bodies}</table></div>'
    )


def _columns(evidence: Evidence, rows: Sequence[Candidate]) -> list[Column]:
    found = []
    for position, bucket in enumerate(figures.buckets(evidence)):
        found += _timing_columns(evidence, rows, bucket, position)
    return found + _accuracy_columns(rows) + _cost_columns(rows)


def _timing_columns(evidence: Evidence, rows: Sequence[Candidate], bucket: Bucket, position: int) -> list[Column]:
    timings = [evidence.timing(c.id, bucket) for c in rows]

    def values(get: Callable[[Timing], float]) -> list[float]:
        return [get(t) if t and t.samples_ms else math.nan for t in timings]

    def ms(head: str, note: str, get: Callable[[Timing], float]) -> Column:
        numbers = values(get)
        decimals = fmt.column_decimals(numbers)
        return Column(head, note, numbers, lambda v: fmt.fixed(v, decimals), position)

    gains = [figures.speedup(evidence, c.id, bucket) for c in rows]
    return [
        ms("median ms", "Half of the calls took less", lambda t: t.median_ms),
        ms("p99 ms", "99 of 100 calls took less", lambda t: t.p99_ms),
        ms("IQR ms", "Spread of the middle half of the calls", lambda t: t.iqr_ms),
        Column("speed-up", "Against the original", gains, fmt.times, position),
        Column("rows/s", "Calls back to back", values(_throughput), fmt.count, position),
        Column(
            "first call s",
            "The first call in a new process",
            [_first_call_s(c, bucket) for c in rows],
            lambda v: fmt.fixed(v, 2),
            position,
        ),
    ]


def _first_call_s(candidate: Candidate, bucket: Bucket) -> float:
    """From the candidate's own process: in the play-off nothing is called for the first time."""
    timing = candidate.measurement.timing(bucket)
    return timing.first_call_ms / _SECONDS if timing and timing.first_call_ms else math.nan


def _throughput(timing: Timing) -> float:
    return timing.throughput if timing.median_ms > 0 else math.nan


def _accuracy_columns(rows: Sequence[Candidate]) -> list[Column]:
    agreement = [figures.worst_agreement(c) for c in rows]
    found = [
        Column("rel. error", "Worst ‖out - ref‖ / ‖ref‖ of all outputs", [_error(c) for c in rows], fmt.relative_error),
    ]
    if any(a is not None for a in agreement):
        shares = [math.nan if a is None else a for a in agreement]
        found.append(Column("top-1 agree", "Rows with the same largest element", shares, fmt.agreement))
    named = next((c.metric.name for c in rows if c.metric), None)
    if named:
        metric = [c.metric.value if c.metric else math.nan for c in rows]
        drop = [c.metric.drop if c.metric else math.nan for c in rows]
        found.append(Column(fmt.clean(named), "The task's metric on labelled data", metric, lambda v: fmt.fixed(v, 4)))
        found.append(Column("drop", "What the metric lost against the original", drop, lambda v: fmt.fixed(v, 4)))
    return found


def _error(candidate: Candidate) -> float:
    """The worst error; NaN in any output makes it infinite, so that it sorts as the worst."""
    if any(math.isnan(e.relative_l2) for e in candidate.errors):
        return math.inf
    return candidate.worst_error


def _cost_columns(rows: Sequence[Candidate]) -> list[Column]:
    measured = [c.measurement for c in rows]

    def positive(values: Sequence[float]) -> list[float]:
        return [v if v > 0 else math.nan for v in values]

    def whole(value: float) -> str:
        return fmt.fixed(value, 0 if value >= 100 else 1)  # noqa: PLR2004

    build = positive([m.build_s for m in measured])
    load = positive([m.load_s for m in measured])
    peak = positive([m.peak_bytes / _MIB for m in measured])
    size = positive([m.size_bytes / _MIB for m in measured])
    return [
        Column("peak MiB", "Peak memory: the card's, or else the process's", peak, whole),
        Column("size MiB", "Files it needs", size, lambda v: fmt.fixed(v, 1)),
        Column("build s", "Time to build", build, lambda v: fmt.fixed(v, 1)),
        Column("load s", "Time to load from disk", load, lambda v: fmt.fixed(v, 1)),
    ]


def _head(evidence: Evidence, columns: Sequence[Column]) -> str:
    groups = ['<th colspan="2"></th>']
    for position, bucket in enumerate(figures.buckets(evidence)):
        width = sum(c.bucket == position for c in columns)
        name = escape(fmt.sizes(bucket))
        groups.append(f'<th class="group{bucket_class(position)}" colspan="{width}" scope="colgroup">{name}</th>')
    names = ['<th scope="col">recipe</th><th scope="col">verdict</th>']
    names += [
        f'<th scope="col" class="n{bucket_class(c.bucket)}{_starts(columns, i)}" title="{escape(c.help)}">'
        f"{_two_lines(c.head)}</th>"
        for i, c in enumerate(columns)
    ]
    accuracy = [c for c in columns if c.bucket is None and c.head not in _COST]
    groups.append(f'<th class="group" colspan="{len(accuracy)}" scope="colgroup">agreement</th>')
    groups.append(f'<th class="group" colspan="{len(_COST)}" scope="colgroup">cost</th>')
    return f"<thead><tr>{''.join(groups)}</tr><tr>{''.join(names)}</tr></thead>"


_COST = ("peak MiB", "size MiB", "build s", "load s")


def _two_lines(head: str) -> str:
    """A head with its last word, mostly the unit, on a line of its own."""
    first, space, last = head.rpartition(" ")
    return f"{escape(first)}<br>{escape(last)}" if space else escape(head)


def _starts(columns: Sequence[Column], position: int) -> str:
    """A class for the first column of a group, which has a rule on its left."""
    column = columns[position]
    before = columns[position - 1].bucket if position else None
    starts = position == 0 or column.bucket != before or column.head == _COST[0]
    return " start" if starts else ""


def _body(evidence: Evidence, candidate: Candidate, number: int, columns: Sequence[Column]) -> str:
    chosen = candidate.id == evidence.chosen
    cells = []
    for position, column in enumerate(columns):
        value = column.values[number]
        shown = column.show(value)
        if column.head == "rel. error" and any(math.isnan(e.relative_l2) for e in candidate.errors):
            shown = "NaN"
        key = f"{value:.6g}" if math.isfinite(value) else ("1e99" if value == math.inf else "")
        empty = " none" if shown == fmt.NONE else ""
        best = " key" if column.head in ("median ms", "speed-up") else ""
        cells.append(
            f'<td class="n{bucket_class(column.bucket)}{_starts(columns, position)}{empty}{best}" data-v="{key}" '
            f'data-label="{escape(_label(evidence, column))}">{escape(shown)}</td>'
        )
    mark = '<span class="pick">chosen</span>' if chosen else ""
    name = f'<th scope="row" data-v="{number}">{code(candidate.id)}{mark}</th>'
    state = "chosen" if chosen else ("bad" if candidate.verdict.reason != "ok" else "good")
    return (
        f'<tbody class="{state}"><tr>{name}<td data-v="{candidate.verdict.reason}">{badge(candidate)}</td>'
        f'{"".join(cells)}</tr><tr class="more"><td colspan="{len(columns) + 2}"><div>{_more(candidate)}</div></td>'
        "</tr></tbody>"
    )


def _label(evidence: Evidence, column: Column) -> str:
    """A cell's name where the table is shown as cards, which have no heads."""
    if column.bucket is None or len(figures.buckets(evidence)) == 1:
        return column.head
    return f"{column.head} {fmt.sizes(figures.buckets(evidence)[column.bucket])}"


def _more(candidate: Candidate) -> str:
    """Reason, cure and warnings in the open; the command, outputs and log folded away."""
    parts = []
    verdict = candidate.verdict
    if verdict.detail:
        parts.append(f"<p>{escape(fmt.clean(verdict.detail))}</p>")
    if verdict.cure:
        parts.append(f'<p class="cure"><b>Cure:</b> {escape(fmt.clean(verdict.cure))}</p>')
    parts += [f'<p class="warn"><b>Warning:</b> {escape(fmt.clean(w))}</p>' for w in candidate.warnings]
    folded: dict[str, str] = {}
    if candidate.errors:
        folded["outputs"] = _outputs(candidate)
    if candidate.metric:
        m = candidate.metric
        shown = f"on {m.samples:,} samples: {m.value:.6g}, original {m.original:.6g}"
        folded["metric"] = f"<p>{escape(fmt.clean(m.name))} {shown}</p>"
    if candidate.command:
        folded["command"] = f"<p>Run it again:</p><pre>{escape(fmt.clean(candidate.command))}</pre>"
    if candidate.log.strip():
        folded["log"] = f"<p>End of its log:</p><pre>{escape(fmt.tail(candidate.log))}</pre>"
    took = f"took {fmt.duration_s(candidate.seconds)}" if candidate.seconds else ""
    if folded:
        summary = " · ".join(filter(None, (", ".join(folded), took)))
        parts.append(f"<details><summary>{summary}</summary>{''.join(folded.values())}</details>")
    return "".join(parts)


def _outputs(candidate: Candidate) -> str:
    """The error of each output, with the case where it was worst."""
    rows = "".join(
        f"<tr><th scope='row'>{code(e.output)}</th><td>{_or_nan(e.relative_l2)}</td><td>{e.max_abs:.3g}</td>"
        f"<td>{e.cosine:.6f}</td><td>{fmt.agreement(e.top1_agreement)}</td><td>{escape(fmt.clean(e.case))}</td></tr>"
        for e in candidate.errors
    )
    heads = "".join(
        f"<th scope='col'>{h}</th>" for h in ("output", "rel. error", "max abs", "cosine", "top-1", "worst at")
    )
    return f'<table class="small"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _or_nan(value: float) -> str:
    return "NaN" if math.isnan(value) else fmt.relative_error(value)
