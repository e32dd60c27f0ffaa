"""Every candidate stands below the one it is a step away from, and losses are told as losses."""

import itertools
import re

import pytest
from msgspec.structs import replace

from onecard.evidence import Candidate, Measurement, Rank, Verdict
from onecard.recipe import ORIGINAL, Recipe
from onecard.report import steps
from onecard.report.html import render
from onecard.search.recipes import parse_recipe
from tests.unit.report.evidence_sample import B1, B8, CHOSEN, EVIL, SIGNS, compressed_sample, sample, timing


def evidence(*rows: tuple[str, float], chosen: str = "eager"):
    """A search whose candidates took these milliseconds; 0 is one that never ran."""
    candidates = []
    for recipe, ms in rows:
        found = Measurement((timing(B1, ms, 1, count=5),)) if ms else Measurement()
        candidates.append(Candidate(parse_recipe(recipe), Verdict("ok" if ms else "crashed"), found))
    return replace(sample(), candidates=tuple(candidates), chosen=chosen, buckets=(B1,), ranks=(), playoff={})


def parent_of(found, recipe):
    step = next(s for s in steps.tree(found) if s.candidate.id == recipe)
    return (step.parent.id if step.parent else None, step.changed)


HALF = "channels_last+fold_bn+fp16"


@pytest.mark.parametrize(
    ("others", "recipe", "parent", "changed"),
    [
        (["eager+fold_bn"], "eager+fold_bn+bf16", "eager+fold_bn", "+ bf16"),
        (["eager+bf16", "eager+fold_bn"], "eager+fold_bn+bf16", "eager+fold_bn", "+ bf16"),
        (["eager+fold_bn"], "inductor+fold_bn@bucket", "eager+fold_bn", "→ inductor@bucket"),
        (["inductor"], "inductor@bucket", "inductor", "→ inductor@bucket"),
        (["openvino"], "openvino.bf16", "openvino", "→ openvino.bf16"),
        (
            [f"eager+{HALF}", f"inductor+{HALF}@bucket"],
            f"cudagraph.inductor+{HALF}@bucket",
            f"inductor+{HALF}@bucket",
            "→ cudagraph.inductor@bucket",
        ),
        (["inductor+fp16"], "aoti+fp16", "eager", "→ aoti + fp16"),
        (["eager+fold_bn"], "inductor+fold_bn+bf16", "eager+fold_bn", "→ inductor + bf16"),
    ],
)
def test_the_parent_differs_by_one_step_where_there_is_one(others, recipe, parent, changed):
    found = evidence(("eager", 9.0), *((other, 5.0) for other in others), (recipe, 4.0))
    assert parent_of(found, recipe) == (parent, changed)


def test_what_was_not_measured_is_no_parent_but_a_row():
    found = evidence(("eager", 9.0), ("eager+fold_bn", 0.0), ("eager+fold_bn+bf16", 4.0))
    assert parent_of(found, "eager+fold_bn+bf16") == ("eager", "+ fold_bn + bf16")
    assert parent_of(found, "eager+fold_bn") == ("eager", "+ fold_bn")


def test_everyone_is_shown_once_below_its_parent():
    found = compressed_sample()
    tree = steps.tree(found)
    assert sorted(s.candidate.id for s in tree) == sorted(c.id for c in found.candidates)
    assert [s.candidate.id for s in tree if s.parent is None] == [ORIGINAL.id]
    seen = {}
    for step in tree:
        assert step.depth == (seen[step.parent.id] + 1 if step.parent else 0)
        seen[step.candidate.id] = step.depth


def test_the_way_leads_from_the_original_to_the_chosen():
    way = steps.path(compressed_sample())
    assert [s.changed for s in way] == [
        "eager",
        "→ inductor",
        "→ inductor@bucket",
        "+ fold_bn",
        "+ channels_last",
        "+ int8",
    ]
    assert way[-1].candidate.id == CHOSEN.id


def row(text, recipe_step, on):
    rows = re.findall(r"<tr class=.*?</tr>", text, re.S)
    return next(r for r in rows if f">{recipe_step}</code>" in r.replace("<wbr>", "") and f"<code>{on}</code>" in r)


def test_a_row_has_ratios_memory_size_and_what_the_metric_lost():
    text = steps.steps_table(compressed_sample()).replace("<wbr>", "").translate(SIGNS)
    found = row(text, "+ int8", "inductor+fold_bn+channels_last@bucket")
    assert '<span class="gain">3.03x faster</span>' in found  # 9.4 -> 3.1 at B=1
    assert "240 <small>-63 %</small>" in found
    assert "27.0 <small>-73 %</small>" in found
    assert "0.7490 <small>-0.0020</small>" in found
    assert "chosen" in found


def test_losses_noise_and_failures_are_told():
    text = steps.steps_table(compressed_sample()).replace("<wbr>", "").translate(SIGNS)
    slower = row(text, "+ channels_last", "inductor+fold_bn@bucket")
    assert '<span class="loss">0.936x slower</span>' in slower
    assert '<span class="gain">1.15x faster</span>' in slower  # at B=8 it gains
    assert '<span class="same">0.984x (same)</span>' in row(text, "→ inductor@bucket", "inductor")
    assert "the process ended with signal 11" in row(text, "+ bf16", "aoti")
    assert "crashed" in row(text, "+ bf16", "aoti")


def test_what_is_within_the_noise_is_no_gain():
    found = evidence(("eager", 10.0), ("inductor", 9.0))
    assert "1.11x faster" in steps.steps_table(found).translate(SIGNS)
    noisy = replace(found, ranks=(Rank(B1, ("eager",), 1.0, 0.2),))
    assert "1.11x (same)" in steps.steps_table(noisy).translate(SIGNS)


def test_the_waterfall_has_a_bar_for_each_step_and_both_ends():
    drawn = steps.waterfall(compressed_sample(), B1).translate(SIGNS)
    bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="13" class="step ([a-z ]+)">', drawn)
    assert [kind for _, _, kind in bars] == ["total", "gain", "same", "gain", "loss", "gain", "total chosen"]
    for before, after in itertools.pairwise(bars):  # each bar starts where the one before it ended
        ends = [{float(x), float(x) + float(w)} for x, w, _ in (before, after)]
        assert min(abs(a - b) for a in ends[0] for b in ends[1]) < 2
    assert "-6.32 ms, 3.03x faster" in drawn
    assert "+602 µs, 0.936x slower" in drawn
    assert "8.16x in all" in drawn


def test_there_is_no_waterfall_without_a_way_or_times():
    assert steps.waterfall(evidence(("eager", 9.0)), B1) == ""
    assert steps.waterfall(evidence(("eager", 9.0), ("inductor", 3.0), chosen="inductor"), B8) == ""
    assert steps.waterfall(evidence(("eager", 9.0), chosen="nobody"), B1) == ""
    assert steps.steps_table(evidence(("eager", 9.0))) == ""


def test_without_the_original_the_others_are_roots():
    found = evidence(("inductor", 3.0), ("openvino", 4.0), chosen="inductor")
    assert [s.parent for s in steps.tree(found)] == [None, None]
    render(found)


def test_the_page_shows_three_charts_at_most_and_no_foreign_markup():
    more = [{"B": n} for n in (1, 2, 3, 4, 5)]
    measured = Measurement(tuple(timing(b, 5.0, 1, count=5) for b in more))
    faster = Measurement(tuple(timing(b, 3.0, 1, count=5) for b in more))
    evil = Candidate(Recipe("eager", transforms=(EVIL,)), Verdict("ok"), faster)
    rows = (Candidate(ORIGINAL, Verdict("ok"), measured), evil)
    found = replace(sample(), candidates=rows, chosen=evil.id, buckets=tuple(more), ranks=(), playoff={})
    text = render(found)
    assert text.count("From the original to the chosen variant at") == 3
    assert EVIL not in text
