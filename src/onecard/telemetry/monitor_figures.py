"""Rates and percentiles of the last seconds, made of the snapshots of a server, and how they went before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onecard.telemetry.histogram import Distribution
from onecard.telemetry.snapshot import ModelFigures, Snapshot

WINDOW_S = 5.0
"""Over how long a rate or a percentile is taken, as on the console page."""
KEPT = 60
"""How many points a sparkline can go back."""
_GAP_S = 2 * WINDOW_S
_BLOCKS = "▁▂▃▄▅▆▇█"
Key: TypeAlias = tuple[str, str]
"""A model's name and version."""


@dataclass(frozen=True)
class Point:
    """One model, or the card, at one moment. What is not known is NaN.

    Args:
        requests_per_s: answered.
        rows_per_s: answered.
        failures_per_s: requests not answered, or not well.
        p50_s: the median of the latency, in seconds.
        p90_s: nine of ten requests took no longer.
        p99_s: 99 of 100 requests took no longer.
    """

    requests_per_s: float = math.nan
    rows_per_s: float = math.nan
    failures_per_s: float = math.nan
    p50_s: float = math.nan
    p90_s: float = math.nan
    p99_s: float = math.nan


def model_point(now: ModelFigures, past: ModelFigures, seconds: float) -> Point:
    """What a model did between two snapshots.

    Args:
        now: the later figures.
        past: the earlier ones, of the same process.
        seconds: between them, more than 0.
    """
    latency = _since(now, past, "request_s")
    return Point(
        (now.requests - past.requests) / seconds,
        (now.rows - past.rows) / seconds,
        (failures(now) - failures(past)) / seconds,
        latency.quantile(0.5),
        latency.quantile(0.9),
        latency.quantile(0.99),
    )


def failures(model: ModelFigures) -> int:
    """Requests that were not answered well, for whatever reason."""
    return sum(model.failures.values())


class Watch:
    """The snapshots of a server as they come, and the points that are made of them."""

    def __init__(self) -> None:
        self._recent: deque[Snapshot] = deque()  # of the last seconds, for differences
        self._points: dict[Key, deque[Point]] = {}
        self._cards: deque[dict[str, float]] = deque(maxlen=KEPT)

    def add(self, snapshot: Snapshot) -> None:
        """Take in the next snapshot. After a restart of the server, or a long silence, differences begin anew."""
        recent = self._recent
        if recent and (_began_anew(snapshot, recent[-1]) or snapshot.time_s - recent[-1].time_s > _GAP_S):
            recent.clear()
        while len(recent) > 1 and snapshot.time_s - recent[1].time_s >= WINDOW_S:
            recent.popleft()  # so that the oldest is the newest that is a whole window ago
        points = _points(snapshot, recent)
        self._points = {key: self._points.get(key, deque(maxlen=KEPT)) for key in points}
        for key, point in points.items():
            self._points[key].append(point)
        self._cards.append({name: float(x) for name, x in snapshot.card.items() if isinstance(x, int | float)})
        recent.append(snapshot)

    @property
    def newest(self) -> Snapshot:
        """The last snapshot; there must be one."""
        return self._recent[-1]

    def points(self, model: ModelFigures) -> Sequence[Point]:
        """Of a model of the newest snapshot, the newest last."""
        return self._points[model.name, model.version]

    def sensor(self, name: str) -> list[float]:
        """What a sensor of the card told, the newest last; NaN where it told nothing."""
        return [card.get(name, math.nan) for card in self._cards]


def sparkline(values: Iterable[float], width: int, top: float = 0.0) -> str:
    """The last values as blocks of eight heights, from 0 to the greatest of them.

    Args:
        values: NaN is left blank.
        width: characters of the result; it is filled with blanks on its left.
        top: the least value of the full height.
    """
    shown = list(values)[-width:] if width > 0 else []
    high = max([top, *(value for value in shown if math.isfinite(value))])
    levels = len(_BLOCKS) - 1
    drawn = (
        _BLOCKS[min(round(max(value, 0.0) / high * levels), levels)] if high > 0 else _BLOCKS[0]
        for value in shown
        if math.isfinite(value)
    )
    return "".join(next(drawn) if math.isfinite(value) else " " for value in shown).rjust(width)


def _points(now: Snapshot, recent: Iterable[Snapshot]) -> dict[Key, Point]:
    """Each model since the oldest of the recent snapshots that has it: one may have been loaded meanwhile."""
    before: dict[Key, tuple[ModelFigures, float]] = {}
    for snapshot in recent:
        for model in snapshot.models:
            before.setdefault((model.name, model.version), (model, snapshot.time_s))
    found: dict[Key, Point] = {}
    for model in now.models:
        key = (model.name, model.version)
        was, then_s = before.get(key, (model, now.time_s))
        found[key] = model_point(model, was, now.time_s - then_s) if now.time_s > then_s else Point()
    return found


def _began_anew(now: Snapshot, past: Snapshot) -> bool:
    before = {(model.name, model.version): model for model in past.models}
    return (
        now.server.started_s != past.server.started_s
        or now.time_s < past.time_s
        or any(
            (was := before.get((model.name, model.version))) is not None
            and (model.requests < was.requests or failures(model) < failures(was))
            for model in now.models
        )
    )


def _since(now: ModelFigures, past: ModelFigures, name: str) -> Distribution:
    newer, older = now.histograms.get(name, Distribution()), past.histograms.get(name, Distribution())
    return newer.minus(older) if newer.bounds == older.bounds else newer
