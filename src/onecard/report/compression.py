"""What compressing came to: the methods tried, the layers kept in higher precision, and what was won and lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from onecard.evidence import INCOMPARABLE, Candidate, Compression, Evidence, LayerError, Trial
from onecard.recipe import ORIGINAL
from onecard.report import figures, svg
from onecard.report import format as fmt
from onecard.report.table import badge, bucket_class, code

_WORST_LAYERS = 12
_MOST_NAMES = 8
_WIDTH = 560.0
_ROW = 30.0
_LABEL_CHARACTERS = 62


def compressed(evidence: Evidence) -> list[Candidate]:
    """The candidates that were compressed, in the order of the report."""
    return [c for c in figures.ordered(evidence) if c.compression]


def in_short(found: Compression) -> str:
    """One compression in a few words of plain text: ``int8: percentile, 2 of 53 layers kept``."""
    kept = f"{len(found.kept)} of {found.layers} layers kept" if found.kept else f"all {found.layers} layers"
    return f"{found.scheme}: " + ", ".join(filter(None, (found.method, kept)))


def section(evidence: Evidence) -> str:
    """All of it as HTML; empty if nothing was compressed."""
    rows = compressed(evidence)
    if not rows:
        return ""
    blocks = "".join(_details(c, c.id == evidence.chosen or position == 0) for position, c in enumerate(rows))
    return _overview(evidence, rows) + blocks


def _overview(evidence: Evidence, rows: Sequence[Candidate]) -> str:
    original = evidence.candidate(ORIGINAL.id)
    shown = [*([original] if original and original not in rows else []), *rows]
    named = next((c.metric.name for c in shown if c.metric), None)
    heads = ['<th scope="col">recipe</th><th scope="col">verdict</th>']
    for position, bucket in enumerate(figures.buckets(evidence)):
        name = f"{escape(fmt.sizes(bucket))}<br>" if bucket else ""
        heads.append(f'<th scope="col" class="n{bucket_class(position)}">{name}speed-up</th>')
    names = ["size<br>MiB", "peak<br>MiB", "top-1<br>agree", "cosine", "rel. error"]
    names += [escape(fmt.clean(named)), "drop"] if named else []
    heads += [f'<th scope="col" class="n">{name}</th>' for name in names]
    body = "".join(_overview_row(evidence, c, original, bool(named)) for c in shown)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Compressed candidates"><table class="plain">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _overview_row(evidence: Evidence, candidate: Candidate, original: Candidate | None, metric: bool) -> str:
    cells = []
    for position, bucket in enumerate(figures.buckets(evidence)):
        gain = figures.speedup(evidence, candidate.id, bucket)
        cells.append(f'<td class="n{bucket_class(position)}">{fmt.times(gain)}</td>')
    now, before = candidate.measurement, original.measurement if original else None
    is_original = original is not None and candidate.id == original.id
    for size, was in (
        (now.size_bytes, before.size_bytes if before else 0),
        (now.peak_bytes, before.peak_bytes if before else 0),
    ):
        share = f" <small>{fmt.percent(size / was)}</small>" if size > 0 and was > 0 and not is_original else ""
        cells.append(f'<td class="n">{fmt.mib(size)}{share}</td>')
    cosines = [e.cosine for e in candidate.errors]
    error = "NaN" if any(math.isnan(e.relative_l2) for e in candidate.errors) else _error(candidate.worst_error)
    values = [fmt.agreement(figures.worst_agreement(candidate)), _cosine(cosines), error]
    if metric:
        found = candidate.metric
        values += [fmt.fixed(found.value, 4), fmt.fixed(found.drop, 4)] if found else [fmt.NONE, fmt.NONE]
    cells += [f'<td class="n">{value}</td>' for value in values]
    mark = ' <span class="pick">chosen</span>' if candidate.id == evidence.chosen else ""
    name = f'<th scope="row">{code(candidate.id)}{mark}</th><td>{badge(candidate)}</td>'
    return f"<tr>{name}{''.join(cells)}</tr>"


def _cosine(values: Sequence[float]) -> str:
    """The lowest cosine, never rounded up to 1."""
    if not values or any(map(math.isnan, values)):
        return fmt.NONE
    lowest = min(values)
    return f"{math.floor(lowest * 1e5) / 1e5:.5f}" if lowest < 1 else "1"


def _error(value: float) -> str:
    return "not comparable" if value >= INCOMPARABLE else fmt.relative_error(value)


def _details(candidate: Candidate, is_open: bool) -> str:
    """One candidate, folded away unless it is the one to look at first."""
    short = "; ".join(in_short(found) for found in candidate.compression)
    body = "".join(_one(found) for found in candidate.compression)
    return (
        f'<details class="compressed"{" open" if is_open else ""}><summary>{code(candidate.id)} {badge(candidate)} '
        f"{escape(fmt.clean(short))}</summary>{body}</details>"
    )


def _one(found: Compression) -> str:
    facts = [_in_words(found), *(f"<p>{escape(fmt.clean(note))}</p>" for note in found.notes)]
    drawn = _sensitivity(found.sensitivity, frozenset(found.kept))
    figure = (
        "<figure><figcaption><h3>The layers that lose most</h3>"
        '<p class="note">How far the answers move when this one layer alone is compressed.</p></figcaption>'
        f'<div class="fit">{drawn}</div></figure>'
        if drawn
        else ""
    )
    return f'<div class="columns"><div>{"".join(facts)}{_trials(found)}</div>{figure}</div>'


def _in_words(found: Compression) -> str:
    method = f", method <b>{escape(fmt.clean(found.method))}</b>" if found.method else ""
    rows = f", calibrated on {found.rows:,} rows" if found.rows else ""
    text = (
        f"<b>{escape(fmt.clean(found.scheme))}</b>{method}: {found.layers - len(found.kept)} of {found.layers} layers"
    )
    kept = ""
    if found.kept:
        names = ", ".join(code(name) for name in found.kept[:_MOST_NAMES])
        more = f" and {len(found.kept) - _MOST_NAMES} more" if found.kept[_MOST_NAMES:] else ""
        kept = f" Kept in higher precision: {names}{more}."
    return f"<p>{text} compressed{rows}.{kept}</p>"


def _trials(found: Compression) -> str:
    if not found.trials:
        return ""
    metric = any(trial.metric is not None for trial in found.trials)
    heads = ["method", "layers kept", "rel. error", *(["metric"] if metric else []), "gate"]
    numbers = ("layers kept", "rel. error", "metric")
    cells = "".join(f'<th scope="col"{_number(h in numbers)}>{h}</th>' for h in heads)
    rows = "".join(_trial(trial, trial is _standing(found), metric) for trial in found.trials)
    table = f'<table class="small trials"><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="fit">{table}</div>'


def _number(is_number: bool) -> str:
    return ' class="n"' if is_number else ""


def _standing(found: Compression) -> Trial | None:
    """The trial that the artifact was made by."""
    return next((t for t in found.trials if (t.method, t.kept) == (found.method, found.kept)), None)


def _trial(trial: Trial, stands: bool, metric: bool) -> str:
    mark = ' <span class="pick">stands</span>' if stands else ""
    name = escape(fmt.clean(trial.method)) or "as it is"
    state = '<span class="badge ok"><b>✓</b> passed</span>'
    if not trial.passed:
        state = '<span class="badge wrong"><b>✗</b> missed</span>'
    if trial.error >= INCOMPARABLE:
        state = '<span class="badge wrong"><b>!</b> failed</span>'
    error = "NaN" if math.isnan(trial.error) else fmt.NONE if trial.error >= INCOMPARABLE else _error(trial.error)
    value = f'<td class="n">{fmt.NONE if trial.metric is None else fmt.fixed(trial.metric, 4)}</td>' if metric else ""
    return (
        f'<tr><th scope="row">{name}{mark}</th><td class="n">{len(trial.kept)}</td>'
        f'<td class="n">{error}</td>{value}<td>{state}</td></tr>'
    )


def _sensitivity(layers: Sequence[LayerError], kept: frozenset[str]) -> str:
    """The worst layers as bars; those kept in higher precision are hollow and say so."""
    worst = [layer for layer in layers[:_WORST_LAYERS] if math.isfinite(layer.error)]
    finite = [layer.error for layer in worst if layer.error < INCOMPARABLE]
    if not worst or max(finite, default=0.0) <= 0:
        return ""
    scale = svg.Scale(0.0, max(finite), 14, _WIDTH - 90)
    parts = []
    for row, layer in enumerate(worst):
        top = 4 + _ROW * row
        is_kept = layer.layer in kept
        name = fmt.shorten(fmt.clean(layer.layer), _LABEL_CHARACTERS) + (" · kept" if is_kept else "")
        note = svg.title(f"{fmt.clean(layer.layer)}: {_error(layer.error)}{', kept in higher precision' * is_kept}")
        width = max(scale(layer.error) - scale.start, 1.5)
        kind = "kept" if is_kept else "ok"
        parts += [
            svg.text(14, top + 11, name, "l row" + (" wrong" if is_kept else "")),
            svg.element("rect", note, x=scale.start, y=top + 15, width=width, height=9.0, class_=f"layer {kind}"),
            svg.text(_WIDTH - 8, top + 23, _error(layer.error), "value", "end"),
        ]
    return svg.figure(_WIDTH, 8 + _ROW * len(worst), parts, "Error that each layer causes alone", "plot fits")
