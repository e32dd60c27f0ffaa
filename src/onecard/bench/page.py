"""What was found as one HTML file that needs nothing else: the sentence, the drawings, the figures, the conditions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path

from onecard.bench import plots
from onecard.bench.result import BenchResult, Knee, KneePoint, RunResult, Settings
from onecard.bench.slo import parse_slo
from onecard.bench.summary import describe, rows_of
from onecard.errors import StorageError
from onecard.report.format import clean, count, duration_ms, duration_s, sizes
from onecard.report.frame import framed

_STYLE = ".late { color: var(--bad); max-width: 76ch; }\n"
_PERCENTILE_NOTE = "Each step to the right leaves a tenth of the queries. A flat line that jumps is a stall."
_RATE_NOTE = "Where answers fall below what was due, a backlog builds up."
_LATENCY_NOTE = "Of the queries that were due in each second, from when they were due."
_LOAD_NOTE = "A dot is a run that kept the objective, a cross one that did not; rates near the limit are run twice."


def write_page(found: BenchResult, path: Path) -> None:
    """Write the page.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        path.write_text(render(found), encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}.", "Choose another place.") from error


def render(found: BenchResult) -> str:
    """The page as text. What a server said of itself is not trusted and escaped."""
    limit_ms = 1e3 * parse_slo(found.settings.objective).limit_s if found.settings.objective else math.nan
    sections = [_section("The search", _search(found.knee, found.settings.objective))] if found.knee is not None else []
    if found.run is not None:
        name = "At the knee" if found.knee is not None else "The run"
        sections.append(_section(name, _run(found.run, limit_ms)))
    sections.append(_section("How it was measured", _conditions(found)))
    body = f"{_header(found)}<main>{''.join(sections)}</main><footer>{_footer(found)}</footer>"
    return framed(f"onecard bench: {clean(found.address)}", body, _STYLE)


def _header(found: BenchResult) -> str:
    model = clean(found.target.get("model", ""))
    facts = " · ".join(escape(text) for text in (clean(found.address), found.settings.scenario) if text)
    tiles = "".join(
        f'<li><div class="at">{escape(name)}</div><div class="gain">{escape(value)}</div><p>{escape(note)}</p></li>'
        for name, value, note in _tiles(found)
    )
    return (
        f'<header><p class="eyebrow"><b>{escape(model)}</b> · {facts}</p><h1>{escape(_sentence(found))}</h1>'
        f'<ul class="tiles">{tiles}</ul></header>'
    )


def _sentence(found: BenchResult) -> str:
    run, knee = found.run, found.knee
    if knee is not None:
        if not knee.qps:
            return f"No rate that was tried keeps {found.settings.objective}."
        return f"{count(knee.qps)} requests a second keep {found.settings.objective}."
    if run is None or not run.answered:
        return "Nothing was answered."
    if run.scenario == "offline":
        return f"{count(run.rows_per_s)} rows a second, all requests at once."
    shown = f"{count(run.answered_per_s)} queries a second, p99 {duration_ms(run.percentiles_ms['p99'])}"
    if not run.objective:
        return f"{shown}."
    return f"{shown}: {run.objective} is {'not kept' if run.shortfall else 'kept'}."


def _tiles(found: BenchResult) -> Iterable[tuple[str, str, str]]:
    run = found.run
    if run is None:
        return
    yield "p50", duration_ms(run.percentiles_ms["p50"]), f"mean {duration_ms(run.mean_ms)}"
    yield "p99", duration_ms(run.percentiles_ms["p99"]), f"p99.9 {duration_ms(run.percentiles_ms['p99.9'])}"
    yield "answered", f"{count(run.answered_per_s)}/s", f"{run.answered:,} of {run.queries:,} queries"
    if run.objective:
        yield "in time", f"{count(run.goodput_per_s) if run.goodput_per_s else '0'}/s", f"within {run.objective}"


def _search(knee: Knee, objective: str) -> str:
    slo = parse_slo(objective)
    rows = "".join(map(_point_row, sorted(knee.points, key=lambda p: p.qps)))
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name in ("answered/s", "p50", slo.name, "queries"))
    table = (
        '<div class="scroll"><table class="plain"><thead><tr><th scope="col">requests/s</th>'
        f'{heads}<th scope="col">verdict</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    note = f'<p class="late">{escape(_sentence_of(knee.note))}</p>' if knee.note else ""
    drawn = _figure("Latency against load", _LOAD_NOTE, plots.load_plot(knee, 1e3 * slo.limit_s))
    return f'{note}<div class="plots"><div>{drawn}</div><div>{table}</div></div>'


def _point_row(point: KneePoint) -> str:
    run = point.result
    values = (duration_ms(run.percentiles_ms["p50"]), duration_ms(run.objective_ms), f"{run.queries:,}")
    cells = _cells((count(run.answered_per_s) if run.answered else "0", *values))
    return f'<tr><th scope="row">{count(point.qps)}</th>{cells}<td>{escape(point.reason) or "kept"}</td></tr>'


def _run(run: RunResult, limit_ms: float) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows_of(run))
    rows += "".join(f"<tr><th>{name}</th><td>{duration_ms(ms)}</td></tr>" for name, ms in run.percentiles_ms.items())
    failed = any(second.failed for second in run.seconds)
    rates = _legend(("s4", "due"), ("s0", "answered"), *([("s1", "refused or failed")] if failed else []))
    figures = [
        _figure("Latency by percentile", _PERCENTILE_NOTE, plots.percentile_plot(run, limit_ms)),
        f'<div><table class="facts">{rows}</table></div>',
        _figure(
            "Latency over time", _LATENCY_NOTE, plots.latency_plot(run, limit_ms), _legend(("s0", "p50"), ("s1", "p99"))
        ),
        _figure("Queries over time", _RATE_NOTE, plots.rate_plot(run), rates),
    ]
    late = run.sender.bound if run.sender is not None else ""
    bound = f'<p class="late"><b>Generator-bound:</b> {escape(late)}.</p>' if late else ""
    notes = "".join(f'<p class="note">{escape(_sentence_of(note))}</p>' for note in (f"{describe(run)}.", *run.notes))
    return f'{bound}{notes}<div class="plots">{"".join(figures)}</div>'


def _conditions(found: BenchResult) -> str:
    tables = (
        ("The target", found.target),
        ("The load", dict(_settings(found.settings))),
        ("The load generator", found.generator),
    )
    columns = "".join(f"<div><h3>{title}</h3>{_facts(facts)}</div>" for title, facts in tables)
    return f'<div class="columns">{columns}</div>'


def _settings(asked: Settings) -> Iterator[tuple[str, str]]:
    """What was asked for, where it bears on the scenario."""
    yield "scenario", asked.scenario
    if asked.scenario == "server":
        yield "requests a second", f"{count(asked.qps)}{', the first' if asked.find_knee else ''}" if asked.qps else ""
    yield "arrivals", asked.arrivals
    yield "duration", "" if asked.scenario == "offline" else f"{duration_s(asked.duration_s)}"
    yield "queries, at most", f"{asked.requests:,}" if asked.requests else ""
    yield "requests of a query", str(asked.samples) if asked.scenario == "multi-stream" else ""
    yield "callers", str(asked.concurrency) if asked.scenario == "closed-loop" else ""
    yield "size of a request", sizes(asked.sizes)
    yield "inputs", asked.data or f"random, seed {asked.seed}"
    yield "objective", asked.objective
    yield "requests under way, at most", f"{asked.connections:,}"
    yield "warm-up", f"{asked.warm_up_s:g} s"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{escape(clean(name))}</th><td>{escape(clean(value))}</td></tr>"
        for name, value in facts.items()
        if value
    )
    return f'<table class="facts">{rows}</table>'


def _sentence_of(text: str) -> str:
    return clean(text[:1].upper() + text[1:])


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _figure(title: str, note: str, drawn: str, legend: str = "") -> str:
    if not drawn:
        return ""
    return (
        f'<figure><figcaption><h3>{title}</h3><p class="note">{note}</p></figcaption>'
        f'<div class="fit">{drawn}</div>{legend}</figure>'
    )


def _legend(*items: tuple[str, str]) -> str:
    keys = "".join(
        '<li><svg class="key line" viewBox="0 0 22 13" aria-hidden="true">'
        f'<path d="M1 7H21" class="curve {series}"/></svg> {name}</li>'
        for series, name in items
    )
    return f'<ul class="legend">{keys}</ul>'


def _cells(values: Iterable[str]) -> str:
    return "".join(f'<td class="n">{value}</td>' for value in values)


def _footer(found: BenchResult) -> str:
    command = f"<code>{escape(clean(found.command))}</code>" if found.command else ""
    return f"Measured by onecard bench, {escape(found.started)}. {command}"
