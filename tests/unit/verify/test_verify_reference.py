"""The original's answers on disk, and what was found out about the original on the way."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from onecard.inputs import make_inputs
from onecard.spec import Range, TensorSpec, parse_spec
from onecard.verify.cases import Case, make_cases
from onecard.verify.reference import compute_reference, one_row, read_answers, read_reference, write_reference

SPEC = msgspec.structs.replace(
    parse_spec(["x: float32[B,6], B=1..64"]), outputs=(TensorSpec("y", "float32", ("B", 6)),)
)
CASES = make_cases(SPEC, [{"B": 1}, {"B": 8}])


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": inputs["x"] * 2}


def mixing(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": inputs["x"] - inputs["x"].mean(0)}


def test_answers_are_kept_for_every_case(tmp_path):
    reference = compute_reference(double, SPEC, CASES, tmp_path, None, "cpu")
    assert not (tmp_path / "reference.json").exists()  # for whoever knows the rest to write
    write_reference(reference, tmp_path)
    assert read_reference(tmp_path) == reference
    assert (reference.row_invariant, reference.notes) == (True, ())
    for case in CASES:
        answers, rows = read_answers(tmp_path, case)
        assert rows is None
        assert torch.equal(answers["y"], 2 * make_inputs(SPEC, case.bucket, seed=case.seed)["x"])


def test_a_model_that_mixes_rows_is_found_out(tmp_path):
    reference = compute_reference(mixing, SPEC, CASES, tmp_path, None, "cpu")
    assert not reference.row_invariant
    assert "mixes the rows of a batch" in reference.notes[0]


def test_no_row_is_tried_alone_where_a_batch_of_one_is_not_served(tmp_path):
    spec = msgspec.structs.replace(SPEC, symbols={"B": Range(2, 8)})
    assert compute_reference(mixing, spec, [Case({"B": 4}, 0)], tmp_path, None, "cpu").row_invariant


def test_nan_of_the_original_is_noted(tmp_path):
    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": (inputs["x"] * 0).log() * 0}

    reference = compute_reference(run, SPEC, CASES[:1], tmp_path, None, "cpu")
    assert reference.notes[1:] == ("the original's own output 'y' holds NaN or infinity in case B1",)


def test_large_answers_are_kept_for_some_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr("onecard.verify.reference._MAX_CASE_BYTES", 10 * 6 * 4)  # ten rows
    cases = [Case({"B": 8}, 0), Case({"B": 64}, 1)]
    compute_reference(double, SPEC, cases, tmp_path, None, "cpu")
    whole, rows = read_answers(tmp_path, cases[0])
    assert rows is None
    assert len(whole["y"]) == 8
    some, rows = read_answers(tmp_path, cases[1])
    assert rows is not None
    assert (len(rows), rows[0], rows[-1]) == (10, 0, 63)
    assert torch.equal(some["y"], 2 * make_inputs(SPEC, {"B": 64}, seed=1)["x"][rows])


def test_outputs_that_share_memory_or_lie_askew_are_kept(tmp_path):
    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": inputs["x"], "z": inputs["x"], "w": inputs["x"].t().contiguous().t()}

    compute_reference(run, SPEC, CASES, tmp_path, None, "cpu")
    answers, _ = read_answers(tmp_path, CASES[-1])
    assert all(torch.equal(answers[name], answers["y"]) for name in "yzw")


def test_an_output_may_be_called_rows(tmp_path):
    compute_reference(lambda inputs: {"rows": inputs["x"]}, SPEC, CASES[:1], tmp_path, None, "cpu")
    answers, rows = read_answers(tmp_path, CASES[0])
    assert (list(answers), rows) == (["rows"], None)


def test_what_was_found_out_later_is_kept(tmp_path):
    reference = compute_reference(double, SPEC, CASES[:1], tmp_path, None, "cpu")
    more = msgspec.structs.replace(reference, fp64_error=3e-7, metric=0.75)
    write_reference(more, tmp_path)
    assert read_reference(tmp_path) == more


def test_one_row():
    inputs = {"x": torch.arange(6).reshape(3, 2), "m": torch.ones(3, 1)}
    assert {name: t.tolist() for name, t in one_row(inputs, 1).items()} == {"x": [[2, 3]], "m": [[1.0]]}
