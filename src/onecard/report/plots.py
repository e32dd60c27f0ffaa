"""The page's four drawings: trade-off, error against latency, spread of latency, error by output."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from onecard.evidence import Candidate, Evidence, Timing, quantile
from onecard.recipe import ORIGINAL
from onecard.report import figures, svg
from onecard.report import format as fmt
from onecard.spec import Bucket

WIDTH = 560.0
_AREA = svg.Box(62, 34, WIDTH - 14, 340)
_ROW = 36.0
_RING = 4.0
_LABEL_CHARACTERS = 40
_MAX_DOTS = 160
_MAX_OUTPUTS = 5
_MAX_ROWS = 30
_LOG_FROM = 4.0
_MIB = 2**20


@dataclass(frozen=True)
class Point:
    """One candidate in a scatter plot; ``kind`` is its class: chosen, original, ok, slower or wrong."""

    candidate: Candidate
    x: float
    y: float
    radius: float
    kind: str
    title: str


def trade_off(evidence: Evidence, bucket: Bucket) -> str:
    """Latency against peak memory, the size on disk as the size of the mark, the front connected."""
    points = [
        p
        for p in _points(evidence, bucket, [c.measurement.peak_bytes / _MIB for c in evidence.candidates], sized=True)
        if p.y > 0
    ]
    if not points:
        return ""
    x = svg.log_scale((p.x for p in points), _AREA.left, _AREA.right)
    y = svg.zero_scale((p.y for p in points), _AREA.bottom, _AREA.top)
    on_card = any(c.measurement.peak_device_bytes for c in evidence.candidates)
    name = f"peak {'card' if on_card else 'process'} memory, MiB"
    label = f"Median latency against {name} at {fmt.sizes(bucket)}"
    marks = [*svg.axis_y(y, _AREA, name), _front(points, x, y), *_marks(points, x, y)]
    return svg.figure(WIDTH, 384, [*svg.axis_x(x, _AREA, "median latency, ms"), *marks], label)


def error_plot(evidence: Evidence, bucket: Bucket) -> str:
    """Latency against the worst relative error, both logarithmic; an error of zero sits on the floor."""
    errors = [0.0 if c.id == ORIGINAL.id and not c.errors else c.worst_error for c in evidence.candidates]
    positive = [e for e in errors if e > 0 and math.isfinite(e)]
    points = [p for p in _points(evidence, bucket, errors) if math.isfinite(p.y)]
    if not points or not positive:
        return ""
    floor = min(positive) / 10
    x = svg.log_scale((p.x for p in points), _AREA.left, _AREA.right)
    y = svg.log_scale([floor, *positive], _AREA.bottom, _AREA.top)
    name = "worst relative error"
    parts = [*svg.axis_x(x, _AREA, "median latency, ms"), *svg.axis_y(y, _AREA, name)]
    kept = []
    if evidence.reference_error:
        at = y(evidence.reference_error)
        parts.append(svg.line((_AREA.left, at), (_AREA.right, at), "limit"))
        note = "the original's own error"
        parts.append(svg.text(_AREA.left + 4, at - 5, note, "tick"))
        kept.append(svg.Box(_AREA.left, at - 16, _AREA.left + 4 + len(note) * svg.CHARACTER, at))
    parts += _marks(points, x, y, kept)
    return svg.figure(WIDTH, 384, parts, f"Median latency against {name} at {fmt.sizes(bucket)}")


def _points(evidence: Evidence, bucket: Bucket, values: Sequence[float], sized: bool = False) -> list[Point]:
    """The candidates with a latency, each with its value; with ``sized``, the area of a mark is bytes on disk."""
    largest = max((c.measurement.size_bytes for c in evidence.candidates), default=0) or 1
    found = []
    for candidate, value in zip(evidence.candidates, values, strict=True):
        timing = evidence.timing(candidate.id, bucket)
        if timing is None or not timing.samples_ms or timing.median_ms <= 0:
            continue
        size = candidate.measurement.size_bytes
        radius = 4 + 6 * math.sqrt(size / largest) if sized else 5.5
        title = (
            f"{candidate.id}: {fmt.duration_ms(timing.median_ms)}, "
            f"{fmt.bytes_(candidate.measurement.peak_bytes)} peak, {fmt.bytes_(size)} on disk, "
            f"relative error {fmt.relative_error(candidate.worst_error)}, {candidate.verdict.reason}"
        )
        found.append(Point(candidate, timing.median_ms, value, radius, _kind(evidence, candidate), title))
    return found


def _kind(evidence: Evidence, candidate: Candidate) -> str:
    if candidate.id == evidence.chosen:
        return "chosen"
    if candidate.verdict.ok:
        return "original" if candidate.id == ORIGINAL.id else "ok"
    return "slower" if candidate.verdict.reason == "slower" else "wrong"


def _front(points: Sequence[Point], x: svg.Scale, y: svg.Scale) -> str:
    """A staircase through the sound points that no other sound point beats in both directions."""
    path: list[str] = []
    best = math.inf
    for point in sorted((p for p in points if p.candidate.verdict.ok), key=lambda p: (p.x, p.y)):
        if point.y < best:
            px, py = svg.number(x(point.x)), svg.number(y(point.y))
            path.append(f"H{px}V{py}" if path else f"M{px} {py}")
            best = point.y
    return svg.element("path", d="".join(path), class_="front") if path else ""


def _marks(points: Sequence[Point], x: svg.Scale, y: svg.Scale, kept: Sequence[svg.Box] = ()) -> list[str]:
    """The marks, large below small, and their labels, the important ones first and none in a ``kept`` box."""
    labels = svg.Labels(svg.Box(_AREA.left, _AREA.top - 6, _AREA.right, _AREA.bottom - 1), list(kept))
    drawn = []
    for point in sorted(points, key=lambda p: (p.kind == "chosen", -p.radius)):
        px, py = x(point.x), y(point.y)
        labels.mark(px, py, _reach(point))
        drawn.append(_mark(point, px, py))
    rank = {"chosen": 0, "original": 1, "ok": 2, "wrong": 3, "slower": 4}
    for point in sorted(points, key=lambda p: (rank[p.kind], p.x)):
        name = fmt.shorten(fmt.clean(point.candidate.id), _LABEL_CHARACTERS)
        drawn.append(labels.place((x(point.x), y(point.y)), _reach(point), name, f"l {point.kind}"))
    return drawn


def _reach(point: Point) -> float:
    """How far a mark extends, with the ring around the chosen one."""
    return point.radius + (_RING if point.kind == "chosen" else 0)


def _mark(point: Point, px: float, py: float) -> str:
    note = svg.title(point.title)
    r = point.radius
    if point.kind == "wrong":
        a, b, c, d = (svg.number(v) for v in (px - r * 0.8, py - r * 0.8, px + r * 0.8, py + r * 0.8))
        return svg.element("path", note, d=f"M{a} {b}L{c} {d}M{a} {d}L{c} {b}", class_="mark wrong")
    ring = svg.element("circle", cx=px, cy=py, r=r + _RING, class_="ring") if point.kind == "chosen" else ""
    return ring + svg.element("circle", note, cx=px, cy=py, r=r, class_=f"mark {point.kind}")


def spread(evidence: Evidence, bucket: Bucket) -> str:
    """Raw samples of every finalist as a strip, the middle half as a box, the median as a line."""
    timings = _finalists(evidence, bucket)
    if not timings:
        return ""
    everything = [s for _, timing in timings for s in timing.samples_ms]
    area = svg.Box(14, 10, WIDTH - 84, 14 + _ROW * len(timings))
    scale = svg.log_scale(everything, area.left, area.right, 0.02)
    if max(everything) < _LOG_FROM * min(everything):
        low, high = min(everything), max(everything)
        pad = (high - low) * 0.04 or abs(low) * 0.1 or 1.0
        scale = svg.Scale(low - pad, high + pad, area.left, area.right)
    parts = svg.axis_x(scale, area, "latency of one call, ms" + (" (log scale)" if scale.log else ""))
    for row, (recipe_id, timing) in enumerate(timings):
        kind = "chosen" if recipe_id == evidence.chosen else "ok"
        parts += _strip(recipe_id, timing, area.top + _ROW * row, scale, kind)
    return svg.figure(WIDTH, area.bottom + 42, parts, f"Distribution of latency at {fmt.sizes(bucket)}")


def _finalists(evidence: Evidence, bucket: Bucket) -> list[tuple[str, Timing]]:
    """Those of the play-off; without one, every candidate that passed. Fastest first."""
    names = list(evidence.playoff) or [c.id for c in evidence.candidates if c.verdict.ok]
    found = []
    for name in names:
        candidate, timing = evidence.candidate(name), evidence.timing(name, bucket)
        if candidate and candidate.verdict.ok and timing and timing.samples_ms and min(timing.samples_ms) > 0:
            found.append((name, timing))
    return sorted(found, key=lambda pair: pair[1].median_ms)[:_MAX_ROWS]


def _strip(recipe_id: str, timing: Timing, top: float, scale: svg.Scale, kind: str) -> list[str]:
    ordered = sorted(timing.samples_ms)
    if len(ordered) > _MAX_DOTS:  # evenly by rank: the shape stays, and so do both extremes
        ordered = [ordered[round(i * (len(ordered) - 1) / (_MAX_DOTS - 1))] for i in range(_MAX_DOTS)]
    middle = top + 24
    # A golden-ratio walk spreads the dots over the strip without chance: the same evidence, the same file.
    dots = "".join(
        f"M{svg.number(scale(s))} {svg.number(middle - 6 + 12 * (i * 0.618034 % 1))}h0" for i, s in enumerate(ordered)
    )
    low, high = (scale(quantile(timing.samples_ms, q)) for q in (0.25, 0.75))
    note = f"{recipe_id}: median {fmt.duration_ms(timing.median_ms)}, p99 {fmt.duration_ms(timing.p99_ms)}, "
    note += f"IQR {fmt.duration_ms(timing.iqr_ms)}, {len(timing.samples_ms)} samples"
    median = scale(timing.median_ms)
    return [
        svg.text(14, top + 12, fmt.shorten(fmt.clean(recipe_id), 70), f"l row {kind}"),
        svg.element("path", d=dots, class_=f"dots {kind}"),
        svg.element(
            "rect", svg.title(note), x=low, y=middle - 6, width=max(high - low, 1.0), height=12.0, class_=f"box {kind}"
        ),
        svg.line((median, middle - 9), (median, middle + 9), f"median {kind}"),
        svg.text(WIDTH - 8, middle + 4, fmt.duration_ms(timing.median_ms), "value", "end"),
    ]


def errors_by_output(evidence: Evidence) -> str:
    """Relative error of every output of every compared candidate, as dots on a logarithmic scale."""
    rows = [c for c in evidence.candidates if c.errors]
    shown = [e.relative_l2 for c in rows for e in c.errors if e.relative_l2 > 0 and math.isfinite(e.relative_l2)]
    if not shown:
        return ""
    worst = {e.output: -1.0 for c in rows for e in c.errors}
    for error in (e for c in rows for e in c.errors if math.isfinite(e.relative_l2)):
        worst[error.output] = max(worst[error.output], error.relative_l2)
    outputs = sorted(worst, key=lambda name: -worst[name])
    rows = sorted(rows, key=lambda c: -c.worst_error if math.isfinite(c.worst_error) else -math.inf)[:_MAX_ROWS]
    step = 30.0
    area = svg.Box(14, 8, WIDTH - 84, 12 + step * len(rows))
    scale = svg.log_scale([min(shown) / 3, *shown], area.left, area.right, 0.03)
    parts = svg.axis_x(scale, area, "relative error ‖out \u2212 ref‖ / ‖ref‖ (log scale)")
    if evidence.reference_error:
        at = scale(evidence.reference_error)
        parts.append(svg.line((at, area.top), (at, area.bottom), "limit"))
    for row, candidate in enumerate(rows):
        parts += _error_row(candidate, outputs, area.top + step * row, scale)
    svg_text = svg.figure(WIDTH, area.bottom + 42, parts, "Relative error by candidate and output")
    return svg_text + _legend(outputs)


def _error_row(candidate: Candidate, outputs: Sequence[str], top: float, scale: svg.Scale) -> list[str]:
    kind = "ok" if candidate.verdict.ok else "wrong" if candidate.verdict.reason == "wrong" else "slower"
    sign = "" if kind == "ok" else f" · {figures.LABELS[candidate.verdict.reason][1]}"
    parts = [svg.text(14, top + 11, fmt.shorten(fmt.clean(candidate.id), 60) + sign, f"l row {kind}")]
    middle = top + 20
    parts.append(svg.line((scale.start, middle), (scale.end, middle), "rule"))
    for error in candidate.errors:
        note = svg.title(f"{candidate.id}, {error.output}: {error.relative_l2:.3g}, worst at {error.case}")
        position = outputs.index(error.output)
        if math.isfinite(error.relative_l2):
            at = scale(max(error.relative_l2, scale.low))
            parts.append(_shape(position, at, middle, note))
    parts.append(svg.text(WIDTH - 8, middle + 4, _shown_error(candidate), "value", "end"))
    return parts


def _shown_error(candidate: Candidate) -> str:
    """The worst error; an output with NaN in it says so, since a dot cannot."""
    if any(math.isnan(e.relative_l2) for e in candidate.errors):
        return "NaN"
    return fmt.relative_error(max(e.relative_l2 for e in candidate.errors))


def _shape(position: int, x: float, y: float, note: str) -> str:
    """A mark whose form, not only its colour, tells the outputs apart."""
    which = min(position, _MAX_OUTPUTS)
    paths = ("", "M-5 0L0-5 5 0 0 5Z", "M-4-4H4V4H-4Z", "M0-5L5 4H-5Z", "M0 5L5-4H-5Z", "M-3 0H3")
    if which == 0:
        return svg.element("circle", note, cx=x, cy=y, r=4.5, class_="series s0")
    place = f"translate({svg.number(x)} {svg.number(y)})"
    return svg.element("path", note, d=paths[which], transform=place, class_=f"series s{which}")


def _legend(outputs: Sequence[str]) -> str:
    if len(outputs) == 1:
        return ""
    items = []
    names = [*outputs[:_MAX_OUTPUTS], *([f"{len(outputs) - _MAX_OUTPUTS} more"] if outputs[_MAX_OUTPUTS:] else [])]
    for position, name in enumerate(names):
        key = svg.element("svg", _shape(position, 7, 7, ""), viewBox="0 0 14 14", class_="key", aria_hidden="true")
        items.append(f"<li>{key} {html.escape(fmt.clean(name))}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'
