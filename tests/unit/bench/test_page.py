"""The page and the pacer: whatever a server calls itself is shown as text, and every drawing is there."""

from __future__ import annotations

import asyncio
import math
import time

import msgspec
import pytest

from onecard.bench import pacer as pacers
from onecard.bench.knee import find_knee
from onecard.bench.page import render
from onecard.bench.result import BenchResult, Settings
from onecard.bench.slo import parse_slo
from tests.unit.bench.test_knee import simulated

SLO = parse_slo("p99=100ms")
SETTINGS = Settings("server", 60.0, 50.0, 0, 1, {"rows": 1}, 1, 1, 900, 1.0, 10.0, 0, "", "", str(SLO), False)


def found(run=None, knee=None, **target: str) -> BenchResult:
    asked = msgspec.structs.replace(SETTINGS, find_knee=knee is not None)
    return BenchResult(
        "http://h:1/m", {"model": "m", **target}, asked, {"python": "3"}, "now", "onecard bench", run, knee
    )


def test_a_run_has_its_drawings():
    page = render(found(simulated(70.0, 20.0, 0, SLO)))
    for title in ("Latency by percentile", "Latency over time", "Queries over time"):
        assert f"<h3>{title}</h3>" in page
    assert page.count('role="img"') == 3
    assert "p99=100ms is kept" in page
    assert "nan" not in page.lower().replace("nano", "")


def test_a_search_has_its_drawing_and_its_points():
    async def measure(qps, seed):
        return simulated(qps, 20.0, seed, SLO)

    knee = asyncio.run(find_knee(measure, 50.0, 100.0, 0.1))
    page = render(found(simulated(knee.qps, 20.0, 0, SLO), knee))
    assert "<h3>Latency against load</h3>" in page and "the knee, " in page
    assert page.count('<th scope="row">') == len(knee.points)
    assert page.count('class="mark wrong"') == sum(not p.kept for p in knee.points)


def test_nothing_is_shown_as_nothing():
    assert "Nothing was answered." in render(found())
    none = dict.fromkeys(("p50", "p99", "p99.9"), math.nan)
    nothing = msgspec.structs.replace(simulated(1.0, 1.0, 0, SLO), answered=0, percentiles_ms=none)
    assert "Nothing was answered." in render(found(nothing))


def test_words_of_a_server_are_not_markup():
    page = render(found(server="<script>alert(1)</script>", model="<b>"))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert page.count("<script>") == 1, "the frame's own, which is empty"


@pytest.mark.parametrize("with_timer_files", [True, False])
def test_the_alarm_rings_once_and_not_before(monkeypatch, with_timer_files):
    if not with_timer_files:
        monkeypatch.setattr(pacers, "_library", lambda: None)
    rung: list[float] = []

    async def rings(count: int) -> None:
        end = time.perf_counter() + 30
        while len(rung) < count and time.perf_counter() < end:
            await asyncio.sleep(0.01)

    async def main() -> float:
        pacer = pacers.Pacer(asyncio.get_running_loop(), lambda: rung.append(time.perf_counter()))
        at = time.perf_counter() + 0.05
        pacer.set(at + 100)
        pacer.set(at)
        await rings(1)
        await asyncio.sleep(0.2)
        pacer.set(time.perf_counter() - 1)
        await rings(2)
        pacer.set(time.perf_counter() + 0.05)
        pacer.close()
        await asyncio.sleep(0.1)
        return at

    at = asyncio.run(main())
    assert len(rung) == 2
    assert rung[0] >= at - 0.002
