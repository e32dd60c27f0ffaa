"""The page's drawings: latencies by percentile, the run second by second, latency against load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from onecard.bench.histogram import Histogram
from onecard.bench.result import Knee, KneePoint, RunResult, Second
from onecard.report import svg
from onecard.report.format import count, duration_ms

WIDTH, HEIGHT = 560.0, 300.0
_AREA = svg.Box(62, 34, WIDTH - 14, HEIGHT - 46)
_MARKS = (50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
_RADIUS = 4.0
_MOST_SECONDS = 400
_NEARLY = 0.05  # of a second


def percentile_plot(run: RunResult, limit_ms: float = math.nan) -> str:
    """Latency against the percentile; the axis counts nines: each step is a tenth of the requests before."""
    histogram = Histogram.decode(run.histogram)
    if not histogram.total:
        return ""
    seen, curve = 0, []
    for latency_s, number in histogram.buckets():
        seen += number
        curve.append((1 - (seen - number) / histogram.total, 1e3 * latency_s))  # share at or above it, latency
    last = max(1 / histogram.total, 1e-6)
    x = svg.Scale(1.0, 1 / last if last < 1 else 10.0, _AREA.left, _AREA.right, log=True)
    shown = [ms for _, ms in curve] + ([limit_ms] if math.isfinite(limit_ms) else [])
    y = svg.log_scale([max(ms, 1e-6) for ms in shown], _AREA.bottom, _AREA.top)
    parts = [*svg.axis_y(y, _AREA, "latency, ms (log scale)"), *_nines(x), *_limit(y, limit_ms)]
    parts.append(_step_line([(x(1 / max(share, last)), y(ms)) for share, ms in curve], "curve s0"))
    return svg.figure(WIDTH, HEIGHT, parts, "Latency by percentile")


def _nines(x: svg.Scale) -> list[str]:
    parts = [svg.line((_AREA.left, _AREA.bottom), (_AREA.right, _AREA.bottom), "axis")]
    for percentile in _MARKS:
        place = 1 / (1 - percentile / 100)
        if place <= x.high:
            at = x(place)
            parts.append(svg.line((at, _AREA.top), (at, _AREA.bottom), "grid"))
            parts.append(svg.text(at, _AREA.bottom + 16, f"p{percentile:g}", "tick", "middle"))
    parts.append(
        svg.text((_AREA.left + _AREA.right) / 2, _AREA.bottom + 34, "percentile (log scale)", "name", "middle")
    )
    return parts


def _limit(y: svg.Scale, limit_ms: float) -> list[str]:
    if not math.isfinite(limit_ms):
        return []
    at = y(limit_ms)
    label = svg.text(_AREA.left + 4, at - 5, f"limit, {duration_ms(limit_ms)}", "tick")
    return [svg.line((_AREA.left, at), (_AREA.right, at), "limit"), label]


def rate_plot(run: RunResult) -> str:
    """Queries a second that were due, were answered, and failed."""
    seconds = _whole(run)
    if not seconds:
        return ""
    y = svg.zero_scale([max(s.sent, s.answered, s.failed) for s in seconds], _AREA.bottom, _AREA.top)
    lines = [([s.sent for s in seconds], "curve s4"), ([s.answered for s in seconds], "curve s0")]
    if any(s.failed for s in seconds):
        lines.append(([s.failed for s in seconds], "curve s1"))
    return _over_time(seconds, y, "queries a second", lines)


def latency_plot(run: RunResult, limit_ms: float = math.nan) -> str:
    """p50 and p99 of the queries that were due in each second."""
    seconds = _whole(run)
    shown = [ms for s in seconds for ms in (s.p50_ms, s.p99_ms) if math.isfinite(ms)]
    if not shown:
        return ""
    y = svg.log_scale(shown + ([limit_ms] if math.isfinite(limit_ms) else []), _AREA.bottom, _AREA.top)
    lines = [([s.p50_ms for s in seconds], "curve s0"), ([s.p99_ms for s in seconds], "curve s1")]
    return _over_time(seconds, y, "latency, ms (log scale)", lines, limit_ms)


def _whole(run: RunResult) -> Sequence[Second]:
    """As many seconds as can be told apart; the last one, which may be a part of one, only where it is the first."""
    whole = [second for second in run.seconds if second.second + 1 <= run.span_s + _NEARLY]
    return (whole or run.seconds[:1])[:_MOST_SECONDS]


def _over_time(
    seconds: Sequence[Second],
    y: svg.Scale,
    name: str,
    lines: Iterable[tuple[Sequence[float], str]],
    limit_ms: float = math.nan,
) -> str:
    x = svg.Scale(0.0, max(float(seconds[-1].second + 1), 1.0), _AREA.left, _AREA.right)
    parts = [*svg.axis_x(x, _AREA, "seconds from the start"), *svg.axis_y(y, _AREA, name), *_limit(y, limit_ms)]
    for values, class_ in lines:
        pairs = zip(seconds, values, strict=True)
        places = [(x(s.second + 0.5), y(value)) if math.isfinite(value) else None for s, value in pairs]
        parts += _broken_line(places, class_)
    return svg.figure(WIDTH, HEIGHT, parts, f"{name} over time")


def load_plot(knee: Knee, limit_ms: float) -> str:
    """The objective's percentile against the load, every run a mark; the knee is ringed."""
    points = [p for p in knee.points if math.isfinite(p.result.objective_ms) and p.result.objective_ms > 0]
    if not points:
        return ""
    x = svg.log_scale([p.qps for p in points], _AREA.left, _AREA.right)
    y = svg.log_scale([limit_ms, *(p.result.objective_ms for p in points)], _AREA.bottom, _AREA.top)
    objective = points[0].result.objective.partition("=")[0]
    parts = [*svg.axis_x(x, _AREA, "requests a second (log scale)")]
    parts += [*svg.axis_y(y, _AREA, f"{objective}, ms (log scale)"), *_limit(y, limit_ms)]
    kept = sorted({p.qps: y(p.result.objective_ms) for p in points if p.kept}.items())
    parts += _broken_line([(x(qps), at) for qps, at in kept], "curve s0")
    labels = svg.Labels(svg.Box(_AREA.left, _AREA.top - 6, _AREA.right, _AREA.bottom - 1))
    for point in points:
        parts.append(_mark(point, x(point.qps), y(point.result.objective_ms), point.kept and point.qps == knee.qps))
        labels.mark(x(point.qps), y(point.result.objective_ms), _RADIUS)
    best = next((p for p in reversed(points) if p.kept and p.qps == knee.qps), None)
    if best is not None:
        at = x(best.qps), y(best.result.objective_ms)
        parts.append(labels.place(at, _RADIUS + 4, f"the knee, {count(best.qps)}/s", "l chosen"))
    return svg.figure(WIDTH, HEIGHT, parts, f"{objective} against the load")


def _mark(point: KneePoint, x: float, y: float, is_knee: bool) -> str:
    note = svg.title(
        f"{count(point.qps)} requests/s: {duration_ms(point.result.objective_ms)}, {point.reason or 'kept'}, "
        f"{point.result.queries:,} requests"
    )
    ring = svg.element("circle", cx=x, cy=y, r=_RADIUS + 4, class_="ring") if is_knee else ""
    if point.kept:
        return ring + svg.element("circle", note, cx=x, cy=y, r=_RADIUS, class_="series s0")
    place = f"translate({svg.number(x)} {svg.number(y)})"
    return ring + svg.element("path", note, d="M-4-4L4 4M-4 4L4-4", transform=place, class_="mark wrong")


def _step_line(places: Sequence[tuple[float, float]], class_: str) -> str:
    path = [f"M{svg.number(places[0][0])} {svg.number(places[0][1])}"]
    path += [f"H{svg.number(x)}V{svg.number(y)}" for x, y in places[1:]]
    path.append(f"H{svg.number(_AREA.right)}")
    return svg.element("path", d="".join(path), class_=class_)


def _broken_line(places: Sequence[tuple[float, float] | None], class_: str) -> list[str]:
    """Lines through what is there, and dots where one place stands alone."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place is None:
            runs.append([])
        else:
            runs[-1].append(place)
    parts = []
    for run in runs:
        if len(run) > 1:
            path = "M" + "L".join(f"{svg.number(x)} {svg.number(y)}" for x, y in run)
            parts.append(svg.element("path", d=path, class_=class_))
        elif run:
            parts.append(
                svg.element("circle", cx=run[0][0], cy=run[0][1], r=2.5, class_=class_.replace("curve", "series"))
            )
    return parts
