import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest
from msgspec.structs import replace

from onecard.errors import StorageError
from onecard.evidence import Candidate, Evidence, Measurement, Verdict
from onecard.recipe import ORIGINAL
from onecard.report.html import render, write_report
from onecard.spec import parse_spec
from tests.unit.report.evidence_sample import B1, EVIL, sample, timed, timing

VOID = {"meta", "input", "br", "wbr", "link", "img"}


class Page(HTMLParser):
    """Collects elements and text, and fails on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def only_original(**changes):
    return Evidence(
        model="m",
        spec=parse_spec(["x: float32[3]"]),
        buckets=changes.pop("buckets", ({},)),
        objective="latency",
        device="cpu",
        environment=replace(sample().environment, card=None, device="cpu"),
        candidates=changes.pop("candidates", (Candidate(ORIGINAL, Verdict("ok")),)),
        chosen=ORIGINAL.id,
        **changes,
    )


@pytest.fixture(scope="module")
def text():
    return render(sample(), "resnet.onecard")


def test_every_candidate_is_a_row(text):
    rows = re.findall(r'<tbody class="(?:chosen|good|bad)">.*?</tbody>', text, re.S)
    assert len(rows) >= len(sample().candidates)
    shown = " ".join(Page(text).text)
    for candidate in sample().candidates:
        assert candidate.verdict.detail in shown
        assert candidate.verdict.cure in shown
        assert candidate.id in "".join(Page(text).text)


def test_no_text_of_the_evidence_becomes_markup(text):
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert EVIL not in text
    assert "\x1b" not in text
    assert EVIL in "".join(page.text)


def test_nothing_is_loaded_from_anywhere(text):
    loads = ("src", "href", "srcset", "action", "data", "poster", "background", "xlink:href")
    assert [a for a in Page(text).attributes if a[1] in loads] == []
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_allows_this_style_and_script_and_nothing_else(text):
    policy = next(v for _, name, v in Page(text).attributes if name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        body = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    inline = [a for a in Page(text).attributes if a[1] == "style" or a[1].startswith("on")]
    assert inline == []


def test_ids_are_unique_and_labels_point_to_them(text):
    page = Page(text)
    ids = [v for _, name, v in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {v for _, name, v in page.attributes if name == "for"} <= set(ids)


def test_the_outcome_and_the_winner_of_each_bucket(text):
    shown = "".join(Page(text).text).replace("\xa0", " ")
    assert "inductor+bf16 answers in 4.10 ms at B=1, 6.2 times faster than the original (25.4 ms)" in shown
    assert "noise ± 3.1 %" in shown
    assert "noise ± 1.8 %" in shown
    assert 'onecard.load("resnet.onecard")' in shown
    assert "onecard run resnet.onecard inputs.npz" in shown


def test_the_figures_of_a_row_are_those_of_the_evidence(text):
    row = re.search(r'<tbody class="chosen">(.*?)</tbody>', text, re.S)[1]
    cells = re.findall(r'<td class="n[^"]*" data-v="([^"]*)" data-label="([^"]*)">([^<]*)</td>', row)
    found = {label: (float(value), shown) for value, label, shown in cells}
    evidence = sample()
    t = evidence.timing("inductor+bf16", B1)
    assert found["median ms B=1"][0] == pytest.approx(t.median_ms, rel=1e-4)
    assert found["p99 ms B=1"][0] == pytest.approx(t.p99_ms, rel=1e-4)
    assert found["IQR ms B=1"][0] == pytest.approx(t.iqr_ms, rel=1e-4)
    assert found["rows/s B=1"][0] == pytest.approx(t.throughput, rel=1e-4)
    assert found["rel. error"][1] == "0.31 %"
    assert found["top-1 agree"][1] == "100.0 %"
    assert found["drop"][1] == "0.0040"
    assert found["peak MiB"][1] == "422"
    assert found["size MiB"][1] == "51.2"


def test_heads_and_cells_are_equally_many(text):
    table = re.search(r'<table class="candidates">(.*?)</thead>(.*?)<tr class="more">', text, re.S)
    heads = len(re.findall(r'<th scope="col"', table[1]))
    assert heads == len(re.findall(r"<t[dh][ >]", table[2]))
    spans = sum(map(int, re.findall(r'colspan="(\d+)"', table[1])))
    assert spans == heads


@pytest.mark.parametrize(
    "evidence",
    [
        only_original(),
        only_original(candidates=()),
        only_original(buckets=()),
        only_original(candidates=(Candidate(ORIGINAL, Verdict("ok"), Measurement((timing({}, 3.0, 1, count=1),))),)),
        only_original(candidates=(Candidate(ORIGINAL, Verdict("ok"), Measurement((timing({}, 0.0, 1, count=2),))),)),
        replace(sample(), playoff={}, ranks=(), pareto=()),
        replace(sample(), buckets=(B1,)),
        replace(sample(), chosen="nobody"),
    ],
    ids=["original", "empty", "no-bucket", "one-sample", "zero-ms", "no-playoff", "one-bucket", "no-choice"],
)
def test_poor_evidence_still_makes_a_page(evidence):
    shown = "".join(Page(render(evidence)).text)
    assert "Every candidate" in shown
    assert "nan" not in re.findall(r"\bnan\b", shown)


def test_nan_errors_are_named_and_sort_as_the_worst():
    bad = timed(5)
    errors = (replace(bad.errors[0], relative_l2=math.nan, cosine=math.nan), bad.errors[1])
    wrong = replace(bad, verdict=Verdict("wrong", "NaN in logits"), errors=errors)
    text = render(replace(sample(), candidates=(timed(0), wrong), chosen=ORIGINAL.id, ranks=()))
    Page(text)
    assert 'data-v="1e99" data-label="rel. error">NaN<' in text


def test_all_errors_zero_and_infinite():
    same = replace(timed(5), errors=tuple(replace(e, relative_l2=0.0) for e in timed(5).errors))
    off = replace(timed(6), errors=tuple(replace(e, relative_l2=math.inf) for e in timed(6).errors))
    Page(render(replace(sample(), candidates=(timed(0), same, off))))


def test_a_folder_with_an_odd_name_is_not_put_into_code():
    assert 'load("model.onecard")' in "".join(Page(render(sample(), 'x"); evil(".onecard')).text)


def test_it_is_written_and_a_folder_that_is_not_there_is_told(tmp_path):
    write_report(sample(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(StorageError, match=r"cannot write the report .*: there is no folder .*missing") as caught:
        write_report(sample(), tmp_path / "missing" / "report.html")
    assert "disk" not in str(caught.value)


def test_a_folder_in_the_place_of_the_page_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"it is a folder. Name a file: .*report.html"):
        write_report(sample(), tmp_path)
