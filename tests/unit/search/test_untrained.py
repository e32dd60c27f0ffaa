"""A search over a model that answers zero whatever it is asked: nothing is refused, but it is said aloud."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from onecard.api import prepare
from onecard.report.console import print_table
from onecard.report.html import render
from onecard.search.job import EffortSpec
from onecard.search.search import Search

ZERO_HEAD = """
from torch import nn


def untrained():
    head = nn.Linear(8, 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head)
"""


def test_answers_of_zero_are_told_in_the_evidence_the_table_and_the_page(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(ZERO_HEAD)
    options = {"recipes": ("torchscript.trace",), "effort": EffortSpec(0.1, 0.1, 0.05, 2)}
    model, settled = prepare(
        f"{tmp_path / 'zoo.py'}:untrained", device="cpu", inputs=["x: float32[B,6], B=1..4"], options=options
    )
    evidence = Search(model, settled).run()
    assert {c.verdict.reason for c in evidence.candidates} <= {"ok", "slower"}
    assert evidence.reference_error is None
    note = (
        "output 'output' of the original is 0 for every input, so agreement with it proves nothing; "
        "give trained --weights"
    )
    assert evidence.notes[0] == note
    printed = io.StringIO()
    print_table(evidence, Console(file=printed, width=200))
    assert f"Note: {note}" in printed.getvalue()
    assert "agreement with it proves nothing; give trained --weights" in render(evidence)
    assert "original&#x27;s own error" not in render(evidence)
