"""The console in a terminal: a line for the server, one for each model, and one for the card."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onecard.report import format as fmt
from onecard.telemetry.monitor_figures import Point, Watch, failures, sparkline
from onecard.telemetry.snapshot import ModelFigures, Snapshot

_LONGEST_NAME = 40
_LINE = 8  # characters of a sparkline
_READY = "READY"


@dataclass(frozen=True)
class _Column:
    """A column of the table.

    Args:
        head: its title.
        cell: what stands in it.
        least_width: of the terminal for which it is shown.
        style: of its text.
        is_number: whether it stands at the right.
    """

    head: str
    cell: Callable[[ModelFigures, Sequence[Point]], str]
    least_width: int = 0
    style: str = ""
    is_number: bool = True


_COLUMNS = (
    _Column("device", lambda model, _: fmt.clean(model.device), 122, is_number=False),
    _Column("variant", lambda model, _: fmt.shorten(fmt.clean(model.variant), 28), 182, is_number=False),
    _Column("requests", lambda _, points: _rate(points[-1].requests_per_s)),
    _Column("", lambda _, points: sparkline([p.requests_per_s for p in points], _LINE), 80, "cyan", False),
    _Column("rows", lambda _, points: _rate(points[-1].rows_per_s), 152),
    _Column("p50", lambda _, points: _time(points[-1].p50_s)),
    _Column("p90", lambda _, points: _time(points[-1].p90_s), 100),
    _Column("p99", lambda _, points: _time(points[-1].p99_s)),
    _Column("", lambda _, points: sparkline([p.p99_s for p in points], _LINE), 132, "magenta", False),
    _Column("waiting", lambda model, _: f"{model.queue_requests:,}"),
    _Column("in flight", lambda model, _: f"{model.in_flight:,}", 90),
    _Column("failing", lambda _, points: _rate(points[-1].failures_per_s), 72),
    _Column("failed", lambda model, _: f"{failures(model):,}", 142),
    _Column("memory", lambda model, _: _memory(model), 112),
)
"""The narrowest terminal gets those without a width; each of the others is shown where there is room for it."""


def show(watch: Watch, url: str, width: int, trouble: str = "") -> RenderableType:
    """All of it.

    Args:
        watch: with one snapshot or more; rates and percentiles need two.
        url: of the server.
        width: of the terminal, in characters: a narrow one gets fewer columns.
        trouble: why the figures are not of now.
    """
    snapshot = watch.newest
    parts: list[RenderableType] = [server_line(snapshot, url)]
    if trouble:
        parts.append(Text(fmt.clean(trouble), style="bold red"))
    table = model_table(watch, width) if snapshot.models else Text("no model is loaded", style="yellow")
    parts += ["", table]
    reasons = [model for model in snapshot.models if model.reason]
    parts += [Text(f"{fmt.clean(model.name)}: {fmt.clean(model.reason)}", style="yellow") for model in reasons]
    if snapshot.card:
        parts += ["", card_line(watch)]
    return Group(*parts)


def server_line(snapshot: Snapshot, url: str) -> Text:
    """Which server it is, for how long it has been running, and whether it is ready."""
    server = snapshot.server
    if not server.live:
        state = ("not live", "bold red")
    else:
        state = ("ready", "bold green") if server.ready else ("not ready", "bold yellow")
    parts = [f"up {fmt.duration_s(max(snapshot.time_s - server.started_s, 0))}" if server.started_s else ""]
    parts.append(f"{server.open_connections} connection{'s' if server.open_connections != 1 else ''}")
    parts.append(f"engine restarts: {server.engine_restarts}" if server.engine_restarts else "")
    name = f"onecard {fmt.clean(server.version)}".strip()
    return Text.assemble(
        (name, "bold"), f" at {fmt.clean(url)} · ", state, "".join(f" · {part}" for part in parts if part)
    )


def model_table(watch: Watch, width: int) -> Table:
    """One line a model."""
    columns = [column for column in _COLUMNS if width >= column.least_width]
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold", style="bold")  # the one column that gives way
    table.add_column("state", no_wrap=True)
    for column in columns:
        justify: Any = "right" if column.is_number else "left"
        table.add_column(column.head, justify=justify, no_wrap=True, style=column.style)
    several = len({model.name for model in watch.newest.models}) < len(watch.newest.models)
    for model in watch.newest.models:
        name = f"{model.name}:{model.version}" if several else model.name
        state = Text(model.state.lower(), style="green" if model.state == _READY else "yellow")
        points = watch.points(model)
        cells = [Text(column.cell(model, points)) for column in columns]
        table.add_row(Text(fmt.shorten(fmt.clean(name), _LONGEST_NAME)), state, *cells)
    return table


def card_line(watch: Watch) -> Text:
    """The card's sensors, as many as there are."""
    card = watch.newest.card
    parts = [Text(fmt.clean(str(card.get("name", "card"))), "bold")]
    if "utilisation" in card:
        line = sparkline(watch.sensor("utilisation"), _LINE, 1.0).lstrip()
        parts.append(Text.assemble(f"busy {fmt.percent(card['utilisation'])} ", (line, "cyan")))
    if "memory_used_bytes" in card:
        total = f" of {fmt.bytes_(card['memory_total_bytes'])}" if "memory_total_bytes" in card else ""
        parts.append(Text(f"memory {fmt.bytes_(card['memory_used_bytes'])}{total}"))
    if "temperature_c" in card:
        parts.append(Text(f"{card['temperature_c']:.0f} °C"))
    if "power_w" in card:
        limit = f" of {card['power_limit_w']:.0f} W" if "power_limit_w" in card else ""
        line = sparkline(watch.sensor("power_w"), _LINE, card.get("power_limit_w", 0.0)).lstrip()
        parts.append(Text.assemble(f"{card['power_w']:.0f} W{limit} ", (line, "magenta")))
    clock = card.get("sm_clock_hz", card.get("frequency_hz"))
    if clock:
        parts.append(Text(f"{clock / 1e9:.2f} GHz"))
    if card.get("throttle_reasons"):
        reasons = ", ".join(str(reason).replace("_", " ") for reason in card["throttle_reasons"])
        parts.append(Text(f"slowed down by {fmt.clean(reasons)}", "yellow"))
    if "lost" in card:
        parts.append(Text(f"cannot be reached: {fmt.clean(str(card['lost']))}", "bold red"))
    return Text(" · ").join(parts)


def plain_lines(watch: Watch) -> list[str]:
    """What is said now and then where there is no terminal: one line a model, no colours."""
    lines = []
    for model in watch.newest.models:
        now = watch.points(model)[-1]
        times = f"p50 {_time(now.p50_s)}, p99 {_time(now.p99_s)}"
        counts = f"{model.queue_requests} waiting, {model.in_flight} in flight"
        rates = f"{_rate(now.requests_per_s)} requests, {_rate(now.failures_per_s)} failing"
        lines.append(f"{fmt.clean(model.name)} {model.state.lower()}: {rates}, {times}, {counts}")
    return lines or ["no model is loaded"]


def _rate(value: float) -> str:
    return f"{fmt.count(value)}/s" if math.isfinite(value) else fmt.NONE


def _time(seconds: float) -> str:
    return fmt.duration_ms(seconds * 1e3)


def _memory(model: ModelFigures) -> str:
    found = model.memory_bytes.get("reserved", model.memory_bytes.get("weights", UNSET))
    return fmt.bytes_(found) if isinstance(found, int) else fmt.NONE
