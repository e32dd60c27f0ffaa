import io
import math

import pytest
from msgspec.structs import replace
from rich.console import Console

from onecard.evidence import Rank, Verdict
from onecard.recipe import ORIGINAL
from onecard.report.console import print_table, summary_line
from tests.unit.report.evidence_sample import sample


def printed(evidence, width=120, bundle=None, encoding="utf-8"):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_table(evidence, Console(file=file, width=width), bundle)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_and_keeps_every_candidate(width):
    text = printed(sample(), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for verdict in ("passed", "wrong", "crashed", "timeout", "out of memory", "unavailable", "unsupported", "skipped"):
        assert verdict in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_cell_is_cut_off(width):
    row = next(line for line in printed(sample(), width).splitlines() if "* inductor+bf16" in line)
    assert "4.10" in row
    assert "6.20\u00d7" in row
    assert row.split("6.20\u00d7")[1].strip().startswith(("30.", "31.", "0.31 %"))


def test_failures_are_listed_with_their_cures_and_alike_ones_together():
    text = printed(sample())
    assert "tensorrt, tensorrt+fp16: unavailable" in text
    assert text.count("Cure: pip install 'onecard[tensorrt]'") == 1


def test_notes_are_printed():
    text = printed(replace(sample(), notes=("output 'y' is 0 for every input", "the card slowed itself down")))
    assert "Note: output 'y' is 0 for every input\nNote: the card slowed itself down\n" in text


def test_it_says_the_outcome_and_where_the_files_are(tmp_path):
    text = printed(sample(), 200, tmp_path / "model.onecard")
    assert summary_line(sample()) in text
    assert str(tmp_path / "model.onecard" / "report.html") in text


def test_a_pipe_that_knows_only_ascii_gets_only_ascii():
    text = printed(sample(), encoding="ascii")
    assert "6.20x" in text
    assert "?" not in text


def test_the_summary_is_one_sentence_with_the_numbers():
    assert summary_line(sample()) == (
        "`inductor+bf16` answers in 4.10 ms at B=1, 6.2 times faster than the original (25.4 ms), "
        "and agrees with it (relative error 0.31 %; top-1 0.747, original 0.751)."
    )


def test_the_summary_when_the_original_stays():
    line = summary_line(replace(sample(), chosen=ORIGINAL.id, ranks=()))
    assert line.startswith("`eager` answers in 25.4 ms at B=1. It is the original")


def test_the_summary_when_nothing_else_was_tried():
    skipped = [
        replace(c, verdict=Verdict("skipped", "interrupted")) for c in sample().candidates if c.id != ORIGINAL.id
    ]
    for others in ([], skipped):
        original = next(c for c in sample().candidates if c.id == ORIGINAL.id)
        line = summary_line(replace(sample(), candidates=(original, *others), chosen=ORIGINAL.id, ranks=()))
        assert line.endswith("It is the original; nothing else was tried.")


def test_the_summary_when_the_original_stays_but_not_everywhere():
    names = [ORIGINAL.id, "inductor+bf16"]
    ranks = [Rank({"B": 1}, tuple(names), 1.0, 0.01), Rank({"B": 8}, tuple(reversed(names)), 5.5, 0.01)]
    line = summary_line(replace(sample(), chosen=ORIGINAL.id, ranks=tuple(ranks)))
    assert line.endswith("It is the original; another variant serves B=8.")
    alone = replace(sample(), chosen=ORIGINAL.id, buckets=({"B": 8},), ranks=(ranks[1],))
    assert summary_line(alone).endswith("It is the original.")


def test_the_summary_for_throughput_speaks_of_rows():
    line = summary_line(replace(sample(), objective="throughput"))
    assert "rows/s at B=1, 6.2 times faster" in line


def test_the_summary_when_nothing_was_chosen_or_timed():
    assert "No variant was chosen" in summary_line(replace(sample(), chosen="nobody"))
    untimed = next(c for c in sample().candidates if c.id == "aoti+bf16")
    assert "not timed" in summary_line(replace(sample(), chosen=untimed.id))


def test_an_output_that_is_nan_is_said_so():
    bad = next(c for c in sample().candidates if c.id == "inductor+bf16")
    errors = (replace(bad.errors[0], relative_l2=math.nan), bad.errors[1])
    wrong = replace(bad, verdict=Verdict("wrong", "NaN"), errors=errors)
    assert "NaN" in printed(replace(sample(), candidates=(*sample().candidates[:5], wrong), chosen=ORIGINAL.id))
