"""What compressing tried, what it kept and what it saves, on the page, in the terminal and as advice."""

import io
import re

from msgspec.structs import replace
from rich.console import Console

from onecard.evidence import Compression, LayerError, Trial
from onecard.report.advice import advice
from onecard.report.compression import compressed, in_short, section
from onecard.report.console import print_table
from onecard.report.html import render
from tests.unit.report.evidence_sample import CHOSEN, EVIL, FP8, INT8, LAYERS, LOST, SIGNS, compressed_sample, sample
from tests.unit.report.test_report_html import Page


def block(text, recipe):
    plain = text.replace("<wbr>", "")
    return next(b for b in re.findall(r"<details class=.*?</details>", plain, re.S) if f"<summary><code>{recipe}<" in b)


def test_in_a_few_words():
    assert in_short(INT8) == "int8: percentile, 2 of 53 layers kept"
    assert in_short(FP8) == "fp8: all 49 layers"


def test_every_compressed_candidate_has_a_block_and_the_chosen_one_is_open():
    found = compressed_sample()
    assert [c.id for c in compressed(found)] == [CHOSEN.id, "inductor+bf16+fp8", "onnxruntime+fold_bn+int8"]
    text = section(found)
    assert text.count('<details class="compressed"') == 3
    assert re.findall(r'<details class="compressed" open><summary><code>(.*?)</code>', text.replace("<wbr>", "")) == [
        CHOSEN.id
    ]
    Page(text)


def test_trials_are_listed_in_order_and_the_one_that_stands_is_marked():
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", block(section(compressed_sample()), CHOSEN.id), re.S)
    plain = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row)).strip().translate(SIGNS) for row in rows]
    assert plain == [
        "minmax 0 9.4 % 0.7020 ✗ missed",
        "percentile 0 5.1 % 0.7290 ✗ missed",
        "mse 0 - - ! failed",
        "percentile 1 3.4 % 0.7410 ✗ missed",
        "percentile stands 2 1.3 % 0.7490 ✓ passed",
    ]


def test_the_worst_twelve_layers_are_drawn_and_those_kept_are_marked():
    drawn = block(section(compressed_sample()), CHOSEN.id)
    bars = re.findall(r'width="([\d.]+)" height="9" class="layer (\w+)"', drawn)
    assert [kind for _, kind in bars] == ["kept", "kept", *["ok"] * 10]
    widths = [float(width) for width, _ in bars]
    assert widths == sorted(widths, reverse=True)
    assert "layer4.2.conv3 · kept" in drawn
    assert LAYERS[11] in drawn
    assert LAYERS[12] not in drawn
    assert "calibrated on 512 rows" in drawn
    assert "51 of 53 layers compressed" in drawn
    assert "mse wants a histogram" in drawn


def test_size_and_memory_stand_beside_the_originals():
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", section(compressed_sample()).replace("<wbr>", ""), re.S)
    plain = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row)).strip().translate(SIGNS) for row in rows[:2]]
    assert plain[0] == "eager ✓ passed 1.00x 1.00x 97.8 612 100.0 % 1 0 0.7510 0.0000"
    assert plain[1].startswith(f"{CHOSEN.id} chosen ✓ passed 8.")
    assert plain[1].endswith("27.0 28 % 240 39 % 71.0 % 0.99350 1.3 % 0.7490 0.0020")


def test_it_is_absent_where_nothing_was_compressed():
    assert section(sample()) == ""
    assert "<h2>Compression</h2>" not in render(sample())
    assert "<h2>Compression</h2>" in render(compressed_sample())


def test_poor_records_and_names_that_mean_harm():
    poor = (
        Compression("int8", 0),
        Compression(
            EVIL, 3, EVIL, (EVIL,) * 20, (Trial(EVIL, (EVIL,), float("nan")),), (LayerError(EVIL, 1e300),), 0, (EVIL,)
        ),
        Compression("fp8", 3, sensitivity=(LayerError("a", 0.0), LayerError("b", float("nan")))),
    )
    found = compressed_sample()
    bad = tuple(replace(c, compression=poor) if c.compression else c for c in found.candidates)
    text = render(replace(found, candidates=bad))
    Page(text)
    assert EVIL not in text
    assert "and 12 more" in text


def test_the_terminal_has_a_line_for_each():
    file = io.StringIO()
    print_table(compressed_sample(), Console(file=file, width=120))
    text = file.getvalue()
    assert f"{CHOSEN.id}: int8: percentile, 2 of 53 layers kept" in text
    assert "inductor+bf16+fp8: fp8: all 49 layers" in text


def actions(evidence):
    return " | ".join(f"{item.action} {item.why}" for item in advice(evidence))


def test_a_compressed_variant_that_fell_wants_training_or_rows():
    said = actions(compressed_sample())
    assert "'onecard qat'" in said
    assert f"more than the {LOST.rows} used here" in said
    assert "even with the most sensitive layers kept" in said
    assert "INT8 and FP8 are tried" not in said


def test_without_data_it_says_what_data_would_bring():
    plain = tuple(c for c in sample().candidates if not c.recipe.compressions)
    said = actions(replace(sample(), candidates=plain))
    assert "INT8 and FP8 are tried" in said
    assert "onecard qat" not in said
