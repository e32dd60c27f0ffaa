"""The report's section on tuning: throughput against latency over batch sizes and lanes, and the settings found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from onecard.report import format as fmt
from onecard.report import svg
from onecard.tuning import LoadPoint, Setting, Tuning

_WIDTH = 760.0
_HEIGHT = 420.0
_AREA = svg.Box(74, 34, _WIDTH - 18, _HEIGHT - 44)
_RADIUS = 4.5
_MOST_LINES = 5
_KNEE_RING = 4.0


def section(tuning: Tuning | None) -> str:
    """All of it as HTML; empty if the bundle was not tuned."""
    if tuning is None:
        return ""
    notes = "".join(f'<p class="note">{escape(fmt.clean(note))}</p>' for note in tuning.notes)
    return _sentence(tuning) + _figure(tuning) + _settings_table(tuning) + notes + _points_table(tuning)


def _sentence(tuning: Tuning) -> str:
    """What was found, in words."""
    knee = tuning.knee
    if knee is None:
        return ""
    text = (
        f"From batch {knee.batch}{_on_lanes(knee.lanes)} on, no doubling of the batch gains 10 %: "
        f"{fmt.count(knee.rows_per_s)} rows/s there, {fmt.duration_ms(knee.p50_ms)} a batch (p99 "
        f"{fmt.duration_ms(knee.p99_ms)}). This is what an engine starts with unless a limit is named."
    )
    return f"<p>{escape(text)}</p>"


def _on_lanes(lanes: int) -> str:
    return f" on {lanes} lanes" if lanes > 1 else ""


def _figure(tuning: Tuning) -> str:
    drawn = curve_plot(tuning)
    if not drawn:
        return ""
    return (
        '<figure class="tuned"><figcaption><h3>Throughput against latency</h3><p class="note">Upper left is better. '
        "A dot is one batch size with every lane kept busy; the ring is the knee. A diamond is a setting: requests "
        "that come at random, each timed from when it was due; dashed lines are the limits."
        f'</p></figcaption><div class="fit">{drawn}</div>{_legend(tuning)}</figure>'
    )


def curve_plot(tuning: Tuning) -> str:
    """One line per number of lanes over a logarithmic axis of p99 latency; the knee and the settings marked."""
    points = [p for p in tuning.measured if p.p99_ms > 0 and p.rows_per_s > 0]
    if not points:
        return ""
    held = [s for s in tuning.settings if not s.failed and s.p99_ms > 0]
    shown_ms = [*(p.p99_ms for p in points), *(ms for s in held for ms in (s.p99_ms, s.p99_limit_ms))]
    x = svg.log_scale(shown_ms, _AREA.left, _AREA.right)
    y = svg.zero_scale([*(p.rows_per_s for p in points), *(s.rows_per_s for s in held)], _AREA.bottom, _AREA.top)
    parts = [*svg.axis_x(x, _AREA, "p99 latency, ms (log scale)"), *svg.axis_y(y, _AREA, "rows/s")]
    parts += [_limit(s, x) for s in held]
    lanes = _lanes(points)
    parts += [_line([p for p in points if p.lanes == n], x, y, i) for i, n in enumerate(lanes)]
    labels = svg.Labels(svg.Box(_AREA.left, _AREA.top - 6, _AREA.right, _AREA.bottom - 1))
    for point in points:
        labels.mark(x(point.p99_ms), y(point.rows_per_s), _RADIUS)
        parts.append(_dot(point, x, y, lanes.index(point.lanes), point == tuning.knee))
    for setting in held:
        labels.mark(x(setting.p99_ms), y(setting.rows_per_s), _RADIUS + 1)
        parts.append(_diamond(setting, x, y))
    parts += _names(tuning, points, held, labels, (x, y))
    label = f"Throughput against p99 latency over batch sizes on {fmt.clean(tuning.device)}"
    return svg.figure(_WIDTH, _HEIGHT, parts, label)


def _lanes(points: Sequence[LoadPoint]) -> list[int]:
    return sorted({p.lanes for p in points})


def _series(index: int) -> str:
    return f"s{min(index, _MOST_LINES - 1)}"


def _line(points: Sequence[LoadPoint], x: svg.Scale, y: svg.Scale, index: int) -> str:
    ordered = sorted(points, key=lambda p: p.batch)
    places = [f"{svg.number(x(p.p99_ms))} {svg.number(y(p.rows_per_s))}" for p in ordered]
    return svg.element("path", d="M" + "L".join(places), class_=f"curve {_series(index)}")


def _dot(point: LoadPoint, x: svg.Scale, y: svg.Scale, index: int, is_knee: bool) -> str:
    at = {"cx": x(point.p99_ms), "cy": y(point.rows_per_s)}
    note = svg.title(
        f"batch {point.batch}{_on_lanes(point.lanes)}: {fmt.count(point.rows_per_s)} rows/s, "
        f"p50 {fmt.duration_ms(point.p50_ms)}, p99 {fmt.duration_ms(point.p99_ms)}, {point.batches} batches"
    )
    ring = svg.element("circle", **at, r=_RADIUS + _KNEE_RING, class_="ring") if is_knee else ""
    return ring + svg.element("circle", note, **at, r=_RADIUS, class_=f"series {_series(index)}")


def _diamond(setting: Setting, x: svg.Scale, y: svg.Scale) -> str:
    place = f"translate({svg.number(x(setting.p99_ms))} {svg.number(y(setting.rows_per_s))})"
    note = svg.title(f"p99 within {_limit_ms(setting)}: {_setting_in_words(setting)}")
    return svg.element("path", note, d="M-6.5 0L0-6.5 6.5 0 0 6.5Z", transform=place, class_="setting")


def _limit(setting: Setting, x: svg.Scale) -> str:
    at = x(setting.p99_limit_ms)
    return svg.line((at, _AREA.top), (at, _AREA.bottom), "limit")


def _limit_ms(setting: Setting) -> str:
    """As it was given: ``5 ms``."""
    return f"{setting.p99_limit_ms:g} ms"


def _setting_in_words(setting: Setting) -> str:
    delay = f", up to {fmt.duration_ms(setting.max_delay_ms)} of waiting for others" if setting.max_delay_ms else ""
    return (
        f"{fmt.count(setting.rows_per_s)} rows/s, p99 {fmt.duration_ms(setting.p99_ms)}, "
        f"batch {setting.batch}{delay}{_on_lanes(setting.lanes)}"
    )


def _names(
    tuning: Tuning,
    points: Sequence[LoadPoint],
    held: Sequence[Setting],
    labels: svg.Labels,
    scales: tuple[svg.Scale, svg.Scale],
) -> Iterator[str]:
    """Labels, the important ones first: what finds no room is left out."""
    x, y = scales
    for setting in held:
        name = f"\u2264 {_limit_ms(setting)}"
        yield labels.place((x(setting.p99_ms), y(setting.rows_per_s)), 6.5, name, "l tuned")
    knee = tuning.knee
    if knee in points and knee is not None:
        place = x(knee.p99_ms), y(knee.rows_per_s)
        yield labels.place(place, _RADIUS + _KNEE_RING, f"{knee.batch}, the knee", "l chosen")
    for point in sorted(points, key=lambda p: -p.batch):
        if point != knee:
            yield labels.place((x(point.p99_ms), y(point.rows_per_s)), _RADIUS, str(point.batch), "l")


def _legend(tuning: Tuning) -> str:
    lanes = _lanes(tuning.measured)
    if len(lanes) == 1:
        return ""
    items = []
    for index, count in enumerate(lanes):
        mark = svg.element("circle", cx=7.0, cy=7.0, r=_RADIUS, class_=f"series {_series(index)}")
        key = svg.element("svg", mark, viewBox="0 0 14 14", class_="key", aria_hidden="true")
        items.append(f"<li>{key} {count} {'lane' if count == 1 else 'lanes'}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


_SETTING_HEADS = ("p99 within", "rows/s", "p50", "p99", "batch, at most", "waits, at most", "lanes", "mean batch")


def _settings_table(tuning: Tuning) -> str:
    if not tuning.settings:
        return ""
    rows = "".join(_setting_row(setting) for setting in tuning.settings)
    each = "one row" if tuning.request_rows == 1 else f"{tuning.request_rows} rows"
    lead = (
        f'<h3>The most throughput under a limit</h3><p class="note">Requests of {each} each, at random times '
        "(Poisson). The figures are those of a run of its own after the search.</p>"
    )
    return lead + _table("Settings", [*_SETTING_HEADS, "requests"], rows)


def _table(name: str, heads: Sequence[str], rows: str) -> str:
    numbers = "".join(f'<th scope="col" class="n">{head}</th>' for head in heads[1:])
    cells = f'<th scope="col">{heads[0]}</th>{numbers}'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table class="plain">'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _setting_row(setting: Setting) -> str:
    head = f'<th scope="row">{_limit_ms(setting)}'
    if not setting.rows_per_s:
        return f'<tr>{head}</th><td colspan="8">{escape(fmt.clean(setting.failed))}</td></tr>'
    values = [
        fmt.count(setting.rows_per_s),
        fmt.duration_ms(setting.p50_ms),
        fmt.duration_ms(setting.p99_ms),
        str(setting.batch),
        fmt.duration_ms(setting.max_delay_ms) if setting.max_delay_ms else "0",
        str(setting.lanes),
        fmt.significant(setting.batch_mean),
        f"{setting.requests:,}",
    ]
    failed = f'<p class="note">not kept: {escape(fmt.clean(setting.failed))}</p>' if setting.failed else ""
    return f"<tr>{head}{failed}</th>{_cells(values)}</tr>"


def _points_table(tuning: Tuning) -> str:
    """Every point, those that failed too, folded away."""
    rows = "".join(_point_row(point, point == tuning.knee) for point in tuning.points)
    table = _table("Every batch size", ["batch", "lanes", "rows/s", "p50", "p99", "batches"], rows)
    failed = sum(bool(p.failed) for p in tuning.points)
    note = f", {failed} without figures" if failed else ""
    return (
        f'<details class="compressed"><summary>All {len(tuning.points)} points of the curve{note}</summary>{table}'
        "</details>"
    )


def _point_row(point: LoadPoint, is_knee: bool) -> str:
    mark = ' <span class="pick">knee</span>' if is_knee else ""
    head = f'<th scope="row">{point.batch}{mark}</th><td class="n">{point.lanes}</td>'
    if point.failed:
        return f'<tr>{head}<td colspan="4">{escape(fmt.clean(point.failed))}</td></tr>'
    values = [
        fmt.count(point.rows_per_s),
        fmt.duration_ms(point.p50_ms),
        fmt.duration_ms(point.p99_ms),
        f"{point.batches:,}",
    ]
    return f"<tr>{head}{_cells(values)}</tr>"


def _cells(values: Sequence[str]) -> str:
    return "".join(f'<td class="n">{value}</td>' for value in values)
