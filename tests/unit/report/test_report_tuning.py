"""The report's section on tuning: every point and setting is there, failures too, and nothing in it is trusted."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from onecard.report.html import render, write_report
from onecard.report.tuning import curve_plot, section
from onecard.tuning import LoadPoint, Setting, Tuning
from tests.unit.report.evidence_sample import EVIL, sample
from tests.unit.report.test_report_html import Page

KNEE = LoadPoint(64, 2, 27_400.0, 5.1, 5.9, 800)
POINTS = (
    *(LoadPoint(1 << n, 1, 2000.0 * 1.5**n, 0.5 * 1.4**n, 0.6 * 1.4**n, 900) for n in range(6)),
    LoadPoint(64, 1, failed=f"out of memory {EVIL}"),
    LoadPoint(32, 2, 19_000.0, 4.0, 4.4, 900),
    KNEE,
)
SETTINGS = (
    Setting(0.2, failed=f"no batch is that quick {EVIL}"),
    Setting(5.0, 16, 0.0, 1, 8100.0, 2.0, 4.7, 8100, 9.5),
    Setting(20.0, 64, 6.5, 2, 24_300.0, 9.0, 19.1, 24_300, 51.25),
    Setting(100.0, 64, 40.0, 2, 26_000.0, 30.0, 120.0, 26_000, 60.0, "its confirming run had a p99 of 120 ms"),
)
FOUND = Tuning("cuda:0", sample().environment, POINTS, KNEE, SETTINGS, 1, {}, "", "", 60.0, (f"a note {EVIL}",))


@pytest.fixture(scope="module")
def text() -> str:
    return section(FOUND)


def rows(text: str, name: str) -> list[str]:
    table = re.search(f'aria-label="{name}">(.*?)</table>', text, re.DOTALL)
    assert table is not None
    return re.findall(r"<tr>.*?</tr>", table[1].partition("<tbody>")[2], re.DOTALL)


def test_a_bundle_that_was_not_tuned_has_no_section():
    assert section(None) == ""
    assert "<h2>Tuning</h2>" not in render(sample())


def test_the_page_has_the_section():
    page = Page(render(sample(), "resnet.onecard", FOUND))
    shown = "".join(page.text).replace("\xa0", " ")
    assert "Tuning" in page.text
    assert "From batch 64 on 2 lanes on, no doubling of the batch gains 10 %: 27,400 rows/s there" in shown
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert [a for a in page.attributes if a[1] == "style" or a[1].startswith("on")] == []


def test_nothing_in_it_becomes_markup(text):
    assert EVIL not in text
    assert "script" not in Page(text).tags
    assert "".join(Page(text).text).count(EVIL) == 3


def test_every_setting_is_a_row(text):
    found = rows(text, "Settings")
    assert len(found) == 4
    assert "no batch is that quick" in found[0]
    assert re.findall(r'<td class="n">([^<]*)</td>', found[2]) == [
        "24,300", "9.00 ms", "19.1 ms", "64", "6.50 ms", "2", "51.2", "24,300",
    ]  # fmt: skip
    assert "not kept: its confirming run had a p99 of 120 ms" in found[3]


def test_heads_and_cells_are_equally_many(text):
    for name, sound in (("Settings", 1), ("Every batch size", 0)):
        heads = len(re.findall('<th scope="col"', text.partition(f'aria-label="{name}"')[2].partition("</thead>")[0]))
        row = rows(text, name)[sound]
        assert len(re.findall(r"<t[dh][ >]", row)) == heads
        failed = next(r for r in rows(text, name) if "colspan" in r)
        span = int(re.search(r'colspan="(\d+)"', failed)[1])
        assert len(re.findall(r"<t[dh][ >]", failed)) + span - 1 == heads


def test_every_point_is_a_row_and_the_knee_is_marked(text):
    found = rows(text, "Every batch size")
    assert len(found) == len(POINTS)
    assert sum("out of memory" in row for row in found) == 1
    assert [row for row in found if "knee" in row] == [found[-1]]
    assert "All 9 points of the curve, 1 without figures" in text


def test_the_plot_has_every_point_a_line_for_each_lane_count_and_the_settings(text):
    plot = curve_plot(FOUND)
    assert len(re.findall(r'<circle [^>]*class="series s0"', plot)) == 6
    assert len(re.findall(r'<circle [^>]*class="series s1"', plot)) == 2
    assert re.findall(r'class="curve (s\d)"', plot) == ["s0", "s1"]
    assert plot.count('class="ring"') == 1
    assert plot.count('class="setting"') == 2, "what was not kept is no setting"
    assert plot.count('class="limit"') == 2
    for label in ("64, the knee", "\u2264 5 ms", "\u2264 20 ms"):
        assert f">{label}</text>" in plot
    assert "1 lane<" in text
    assert "2 lanes<" in text


def test_higher_throughput_is_drawn_higher_and_longer_latency_further_right():
    marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5" class="series s0">', curve_plot(FOUND))
    across, down = ([float(mark[axis]) for mark in marks] for axis in (0, 1))
    assert across == sorted(across)
    assert down == sorted(down, reverse=True)


@pytest.mark.parametrize(
    "found",
    [
        replace(FOUND, points=(), knee=None, settings=()),
        replace(FOUND, points=POINTS[6:7], knee=None),
        replace(FOUND, points=POINTS[:1], knee=POINTS[0], settings=()),
        replace(FOUND, settings=SETTINGS[:1], notes=()),
        replace(FOUND, knee=LoadPoint(7, 7, 1.0, 1.0, 1.0, 1)),
        replace(FOUND, points=tuple(replace(p, rows_per_s=0.0, p99_ms=0.0) for p in POINTS)),
        replace(FOUND, points=tuple(LoadPoint(1, n, 1.0 * n, 1.0, 1.0, 1) for n in range(1, 9))),
        replace(FOUND, request_rows=8),
    ],
    ids=["nothing", "failures only", "one point", "no setting", "another knee", "zeros", "many lanes", "rows"],
)
def test_poor_tunings_still_make_a_page(found):
    shown = "".join(Page(render(sample(), "", found)).text)
    assert "Tuning" in shown
    assert not re.findall(r"\b(nan|inf)\b", shown)


def test_it_is_written(tmp_path):
    write_report(sample(), tmp_path / "report.html", FOUND)
    assert "<h2>Tuning</h2>" in (tmp_path / "report.html").read_text("utf-8")
