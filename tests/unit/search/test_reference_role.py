"""The original's run: what is written of it is whole, or not there."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from torch import nn

from onecard.models.flat import FlatModule, positional
from onecard.search import worker
from onecard.search.job import JobFolder
from onecard.spec import TensorSpec, parse_spec
from onecard.verify.reference import read_reference

SPEC = msgspec.structs.replace(
    parse_spec(["x: float32[B,4], B=1..8"]), outputs=(TensorSpec("output", "float32", ("B", 2)),)
)
JOB = SimpleNamespace(spec=SPEC, buckets=({"B": 1},), device="cpu", metric="accuracy")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> JobFolder:
    rows = SimpleNamespace(inputs=None)
    flat = FlatModule(nn.Linear(4, 2), positional(("x",))).eval()
    monkeypatch.setattr(worker, "load_source", lambda *_, **__: SimpleNamespace(flat=flat))
    monkeypatch.setattr(worker, "load_rows", lambda *_: rows)
    return JobFolder(tmp_path)


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_original_whose_metric_was_interrupted_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr(worker, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker._make_reference(folder, JOB, ())
    assert not list(folder.reference.glob("*.json"))


def test_its_own_error_may_be_missing(folder, monkeypatch):
    monkeypatch.setattr(worker, "_evaluate", lambda *_: 0.75)
    monkeypatch.setattr(worker, "_fp64_error", interrupted)  # as a process that is ended for its memory
    with pytest.raises(KeyboardInterrupt):
        worker._make_reference(folder, JOB, ("a note",))
    found = read_reference(folder.reference)
    assert (found.metric, found.fp64_error) == (0.75, None)
    assert "a note" in found.notes
