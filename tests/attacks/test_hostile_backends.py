"""Nothing that an engine does takes the search down; each failure is a row with its reason."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import pytest

from onecard.api import prepare
from onecard.search.job import EffortSpec
from onecard.search.search import Search
from tests.conftest import INPUT

HERE = Path(__file__).parent
EXPECTED = {
    "Segfaults": ("crashed", "killed by SIGSEGV"),
    "Hangs": ("timeout", "did not end within"),
    "EatsMemory": ("out_of_memory", "of main memory"),
    "Raises": ("crashed", "ValueError: operator aten::frobnicate is not known"),
    "OutOfMemory": ("out_of_memory", "CUDA out of memory"),
    "Unavailable": ("unavailable", "frobnicator is not installed"),
    "Scaled": ("wrong", "relative error"),
    "FirstRowOnly": ("wrong", "relative error"),
    "SwapsRows": ("wrong", "relative error"),
    "ReusesBuffer": ("wrong", "a later call overwrote an answer that was already handed out"),
}


SHARES = (
    ("Hangs",),
    ("Segfaults", "Scaled", "FirstRowOnly", "Raises", "Unavailable"),
    ("EatsMemory", "OutOfMemory", "SwapsRows", "ReusesBuffer"),
)
"""Tried in searches side by side: much of their time is waiting."""
HANGS_S, OTHERS_S = 40.0, 300.0
"""How long a candidate may take: only what hangs is to reach the end of that, on a busy machine too."""


@pytest.mark.timeout(600)
def test_every_hostile_backend_is_a_row_with_its_reason(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("ONECARD_BACKENDS", ",".join(f"bad{n}=hostile_backends:{n}" for n in EXPECTED))
    searches = []
    for names in SHARES:
        monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / f"cache-{len(searches)}"))
        options = {
            "recipes": tuple(f"bad{n}" for n in names),
            "effort": EffortSpec(0.1, 0.1, 0.1, 2),
            "candidate_time_limit_s": HANGS_S if "Hangs" in names else OTHERS_S,
            "worker_memory_bytes": 3 << 30,
        }
        model, settled = prepare(f"{model_file}:small", device="cpu", inputs=[INPUT], options=options)
        searches.append(Search(model, settled))
    with concurrent.futures.ThreadPoolExecutor(len(searches)) as pool:
        evidences = list(pool.map(Search.run, searches))

    assert {evidence.chosen for evidence in evidences} == {"eager"}
    candidates = [c for evidence in evidences for c in evidence.candidates]
    found = {c.id.removeprefix("bad"): c.verdict for c in candidates if c.id != "eager"}
    for name, (reason, detail) in EXPECTED.items():
        assert found[name].reason == reason, (name, found[name])
        assert detail in found[name].detail, (name, found[name])
        assert found[name].cure, name
