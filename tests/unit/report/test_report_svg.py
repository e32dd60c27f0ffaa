import re
import xml.etree.ElementTree as ET

import pytest

from onecard.report import plots, svg
from tests.unit.report.evidence_sample import B1, EVIL, sample


@pytest.mark.parametrize("values", [(0.01, 900.0), (4.0, 4.0), (2e-9, 0.3), (25.0, 26.0), (1e-30, 1e30)])
def test_a_log_scale_keeps_its_values_inside_and_has_ticks(values):
    scale = svg.log_scale(values, 0, 100)
    assert 0 < scale(min(values)) <= scale(max(values)) < 100
    assert 1 <= len(scale.ticks()) <= 40
    assert all(scale.low <= value <= scale.high for value, _ in scale.ticks())


def test_labels_cover_neither_each_other_nor_a_mark():
    labels = svg.Labels(svg.Box(0, 0, 400, 200))
    for x in (100, 104, 108, 112, 116):
        labels.mark(x, 100, 6)
    for x in (100, 104, 108, 112, 116):
        labels.place((x, 100), 6, "a-rather-long-recipe", "l")
    boxes = labels.taken
    marks, texts = boxes[:5], boxes[5:]
    assert texts
    for n, box in enumerate(texts):
        assert not any(box.overlap(other) for other in [*marks, *texts[:n]])
        assert box.inside(labels.area)


def test_elements_escape_text_and_attributes():
    assert svg.text(0, 0, "<b>&") == '<text x="0" y="0" class="t" text-anchor="start">&lt;b&gt;&amp;</text>'
    assert '"' not in svg.element("g", x='"').replace('x="', "").replace('"/>', "").replace("&quot;", "")


@pytest.mark.parametrize("plot", [plots.trade_off, plots.error_plot, plots.spread])
def test_every_plot_is_well_formed_and_says_what_it_is(plot):
    root = ET.fromstring(plot(sample(), B1))
    assert root.get("aria-label")
    assert "nan" not in re.sub(r"aria-\S+", "", ET.tostring(root, "unicode")).lower()


def test_the_chosen_variant_is_marked_and_named_in_each_plot():
    assert 'class="mark chosen"' in plots.trade_off(sample(), B1)
    assert ">inductor+bf16</text>" in plots.trade_off(sample(), B1)
    assert 'class="median chosen"' in plots.spread(sample(), B1)


def test_errors_are_shown_by_output_and_escaped():
    drawn = plots.errors_by_output(sample())
    assert "logits" in drawn
    assert "features" in drawn
    assert EVIL not in drawn
