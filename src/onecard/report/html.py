"""The report as one HTML file that needs no network, no other file and, to be read, no JavaScript."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from onecard.errors import StorageError
from onecard.evidence import Evidence
from onecard.report import compression, figures, plots, steps, tuning
from onecard.report import format as fmt
from onecard.report.about import card_table, environment_table, how_to_load, search_table
from onecard.report.advice import advice
from onecard.report.frame import framed, part
from onecard.report.table import bucket_class, candidates_table, code
from onecard.spec import Bucket
from onecard.tuning import Tuning

_UNIT = re.compile(r"(?<=\d) (?=(?:ms|µs|s|rows/s)\b|%)")
"""The space between a number and its unit, where no line should break."""
_BUNDLE = re.compile(r"(?!\.).*\.onecard", re.DOTALL)


def write_report(evidence: Evidence, path: Path, tuned: Tuning | None = None) -> None:
    """Write the evidence as one self-contained page.

    Args:
        evidence: the outcome of a search; its text is not trusted and all of it is escaped.
        path: the file to write; an older one is replaced.
        tuned: what ``onecard tune`` found, if it ran.

    Raises:
        StorageError: the file cannot be written.
    """
    page = render(evidence, path.parent.name, tuned)
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StorageError:
    if path.is_dir():
        return StorageError(f"cannot write the report {path}: it is a folder.", f"Name a file: {path / 'report.html'}.")
    if not path.absolute().parent.is_dir():
        return StorageError(
            f"cannot write the report {path}: there is no folder {path.absolute().parent}.", "Make it first."
        )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StorageError(
        f"cannot write the report {path}: {error.strerror or error}.",
        "Free some space." if full else "Choose another place.",
    )


def render(evidence: Evidence, bundle: str = "", tuned: Tuning | None = None) -> str:
    """The page as text; ``bundle`` is the folder's name for the lines that load it, ``tuned`` what tuning found."""
    body = _body(evidence, tuned, bundle if _BUNDLE.fullmatch(bundle) else "model.onecard")
    style = _picker_style(len(figures.buckets(evidence)))
    return framed(f"onecard: {fmt.clean(evidence.model)}", body, style, part("page.js"))


def _body(evidence: Evidence, tuned: Tuning | None, bundle: str) -> str:
    sections = [
        _section("Every candidate", candidates_table(evidence), _picker(evidence) + _how_to_read(evidence)),
        _section("What the figures look like", _plots(evidence), _picker_again(evidence)),
        _section("What each step gained and lost", _waterfalls(evidence) + steps.steps_table(evidence), _STEPS_NOTE),
        _section("Compression", compression.section(evidence), _COMPRESSION_NOTE),
        _section("Tuning", tuning.section(tuned), _TUNING_NOTE),
        _section("What to try next", _advice(evidence)),
        _section("Load it", how_to_load(evidence, bundle)),
        _section("How it was measured", environment_table(evidence) + card_table(evidence) + search_table(evidence)),
    ]
    return f"{_header(evidence)}<main>{''.join(sections)}</main>{_footer(evidence)}"


_STEPS_NOTE = (
    '<p class="note">Each recipe stands below the one it is a step away from: one transform more, or the same on '
    "another engine. Medians of each candidate's own measurement; changes of memory, size and accuracy are against "
    "the row's parent.</p>"
)
_COMPRESSION_NOTE = (
    '<p class="note">What was tried until the gate passed, and what it saves; shares are of the original\'s size '
    "and memory.</p>"
)
_TUNING_NOTE = (
    '<p class="note">From host memory to host memory, the copies included. Measured by <code>onecard tune</code>.</p>'
)


def _section(title: str, content: str, lead: str = "") -> str:
    return f"<section><h2>{title}</h2>{lead}{content}</section>" if content else ""


def _header(evidence: Evidence) -> str:
    marks = {"text": "{}", "code": "<code>{}</code>", "number": "<strong>{}</strong>"}
    sentence = "".join(marks[kind].format(escape(fmt.clean(text))) for kind, text in figures.outcome(evidence))
    sentence = _UNIT.sub("&nbsp;", sentence)
    card = evidence.environment.card
    facts = [f"<b>{escape(fmt.clean(evidence.model))}</b>"]
    if evidence.params:
        facts.append(f"{fmt.count(evidence.params)} parameters")
    facts.append(escape(fmt.clean(card.name if card else evidence.environment.cpu)))
    facts.append(f"optimised for {escape(fmt.clean(evidence.objective))}")
    passed = sum(c.verdict.ok for c in evidence.candidates)
    facts.append(f"{len(evidence.candidates)} candidates tried, {passed} passed")
    tiles = "".join(_tile(evidence, bucket) for bucket in figures.buckets(evidence))
    return (
        f'<header><p class="eyebrow">{" · ".join(facts)}</p><h1>{sentence}</h1>'
        f'<ul class="tiles" aria-label="The winner of each size">{tiles}</ul></header>'
    )


def _tile(evidence: Evidence, bucket: Bucket) -> str:
    """The winner of one bucket, its gain and the noise that the gain had to exceed."""
    name = figures.winner(evidence, bucket)
    rank = figures.rank_of(evidence, bucket)
    timing, reference = figures.timing_pair(evidence, name, bucket)
    noise = f"<small>noise ± {fmt.percent(rank.noise)}</small>" if rank else ""
    took = fmt.duration_ms(timing.median_ms) if timing else "not timed"
    was = f", original {fmt.duration_ms(reference.median_ms)}" if reference else ""
    rate = f"{fmt.count(timing.throughput)} rows/s" if timing else ""
    return (
        f'<li><div class="at">{escape(fmt.sizes(bucket))}</div>'
        f'<div class="gain">{fmt.times(figures.won_speedup(evidence, bucket))} {noise}</div>'
        f"<p>{code(name)}</p><p>{took}{was}</p><p>{rate}</p></li>"
    )


def _picker(evidence: Evidence) -> str:
    """Radio buttons that say which bucket the tables and plots show; without :has() all are shown."""
    buckets = figures.buckets(evidence)
    if len(buckets) == 1:
        return ""
    names = [*(fmt.sizes(bucket) for bucket in buckets), "all"]
    items = "".join(
        f'<input class="hidden" type="radio" name="bucket" id="pick{i}"{" checked" if i == 0 else ""}>'
        f'<label for="pick{i}">{escape(name)}</label>'
        for i, name in enumerate(names)
    )
    return f'<fieldset class="picker"><legend>Show the figures at</legend>{items}</fieldset>'


def _picker_again(evidence: Evidence) -> str:
    """The same choice once more, beside the plots."""
    buckets = figures.buckets(evidence)
    if len(buckets) == 1:
        return ""
    names = [*(fmt.sizes(bucket) for bucket in buckets), "all"]
    items = "".join(f'<label for="pick{i}">{escape(name)}</label>' for i, name in enumerate(names))
    return f'<div class="picker"><span class="lead">Show the figures at</span>{items}</div>'


def _picker_style(count: int) -> str:
    """One rule per bucket; the last radio button, ``all``, hides nothing."""
    if count == 1:
        return ""
    rules = [f"body:has(#pick{i}:checked) .bk:not(.b{i}){{display:none}}" for i in range(count)]
    rules += [
        f'body:has(#pick{i}:checked) label[for="pick{i}"]'
        "{background:var(--best);border-color:var(--best);color:var(--paper)}"
        for i in range(count + 1)
    ]
    return "\n".join(rules) + "\n"


def _how_to_read(evidence: Evidence) -> str:
    text = "Medians come from the play-off, where the finalists took turns, or else from a candidate's own measurement."
    if not evidence.playoff:
        text = "Medians come from each candidate's own measurement."
    return f'<p class="note">{text} Speed-up and error are against the original, <code>eager</code>.</p>'


def _per_bucket(evidence: Evidence, draw: Callable[[Evidence, Bucket], str]) -> str:
    """One drawing per bucket, each shown when its bucket is."""
    buckets = figures.buckets(evidence)
    parts = []
    for position, bucket in enumerate(buckets):
        drawn = draw(evidence, bucket)
        if drawn:
            name = f'<p class="note">{escape(fmt.sizes(bucket))}</p>' if len(buckets) > 1 else ""
            parts.append(f'<div class="fit{bucket_class(position)}">{name}{drawn}</div>')
    return "".join(parts)


def _waterfalls(evidence: Evidence) -> str:
    """The way to the chosen variant, at up to three buckets."""
    drawings = []
    for position, bucket in enumerate(figures.buckets(evidence)[: steps.MAX_CHARTS]):
        drawn = steps.waterfall(evidence, bucket)
        if drawn:
            drawings.append(
                f'<figure class="{bucket_class(position).strip()}"><figcaption><h3>From the original to the chosen '
                f'variant at {escape(fmt.sizes(bucket))}</h3></figcaption><div class="fit">{drawn}</div></figure>'
            )
    return f'<div class="plots ways">{"".join(drawings)}</div>' if drawings else ""


def _plots(evidence: Evidence) -> str:
    drawings: Iterable[tuple[str, str, str]] = (
        ("Speed against memory", _FRONT_NOTE, _per_bucket(evidence, plots.trade_off)),
        ("Speed against error", _ERROR_NOTE, _per_bucket(evidence, plots.error_plot)),
        ("Spread of latency", _SPREAD_NOTE, _per_bucket(evidence, plots.spread)),
        ("Error by output", _OUTPUT_NOTE, plots.errors_by_output(evidence)),
    )
    found = "".join(
        f'<figure><figcaption><h3>{title}</h3><p class="note">{note}</p></figcaption>'
        f'<div class="fit">{drawn}</div></figure>'
        for title, note, drawn in drawings
        if drawn
    )
    return f'<div class="plots">{found}</div>' if found else ""


_FRONT_NOTE = "Lower left is better; the line joins the best trade-offs; the mark's area is the size on disk."
_ERROR_NOTE = "Lower left is better; a cross is a wrong answer."
_SPREAD_NOTE = "Every dot is one call; box: the middle half; line: the median."
_OUTPUT_NOTE = "At the worst of the cases tried; identical outputs sit at the left edge."


def _advice(evidence: Evidence) -> str:
    items = "".join(
        f"<li><b>{escape(fmt.clean(item.action))}</b><p>{escape(fmt.clean(item.why))}"
        f"{' ' + ', '.join(code(name) for name in item.recipes) if item.recipes else ''}</p></li>"
        for item in advice(evidence)
    )
    return f'<ul class="advice">{items}</ul>' if items else ""


def _footer(evidence: Evidence) -> str:
    when = f"Started {escape(fmt.clean(evidence.started))}" if evidence.started else ""
    took = f"took {fmt.duration_s(evidence.seconds)}" if evidence.seconds else ""
    return f"<footer>{', '.join(filter(None, (when, took)))}. Every raw sample is in onecard.json.</footer>"
