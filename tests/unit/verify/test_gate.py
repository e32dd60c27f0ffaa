"""The gate lets the right answers pass, and names each way of being wrong."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from onecard.inputs import make_inputs
from onecard.spec import TensorSpec, parse_spec
from onecard.verify.cases import Case, make_cases
from onecard.verify.compare import THRESHOLDS
from onecard.verify.gate import Gate
from onecard.verify.reference import Run, compute_reference

SPEC = msgspec.structs.replace(
    parse_spec(["x: float32[B,6], B=1..64"]), outputs=(TensorSpec("y", "float32", ("B", 5)),)
)
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 5)).eval()


def right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {"y": MODEL(inputs["x"])}


def changed(change) -> Run:
    """The right answers after a change."""
    return lambda inputs: {"y": change(right(inputs)["y"].clone())}


def make_gate(folder: Path, cases: list[Case] | None = None, run: Run = right, **options) -> Gate:
    cases = cases or make_cases(SPEC, [{"B": 1}, {"B": 8}, {"B": 64}])
    reference = compute_reference(run, SPEC, cases, folder, None, "cpu")
    return Gate(SPEC, reference, folder, THRESHOLDS["fp32"], "cpu", **options)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return make_gate(tmp_path)


def test_right_answers_pass(gate):
    said: list[str] = []
    assert gate.judge(right, said.append).ok
    sizes = ["B1", "B3", "B8", "B64"]
    assert said == [*sizes, *(f"repeated calls of {size}" for size in sizes)]
    assert gate.errors["y"].relative_l2 < 1e-6


def only_row_0(y: Tensor) -> Tensor:
    y[1:] = 0
    return y


def one_row_off(y: Tensor) -> Tensor:
    if len(y) == 64:
        y[37] *= 1.006
    return y


def one_nan(y: Tensor) -> Tensor:
    y[-1, 0] = float("nan")
    return y


WRONG = {
    "scaled": (lambda y: y * 1.05, r"output 'y' in case B1: relative error 5\.00e-02 exceeds 1e-03"),
    "right only in row 0": (only_row_0, r"case B3: relative error \S+ exceeds"),
    "rows swapped": (lambda y: y.flip(0), r"case B3: relative error \S+ exceeds"),
    "one row of many": (one_row_off, r"case B64: row 37 has relative error (6\.0|5\.9)\de-03, the rest are right"),
    "NaN": (one_nan, "case B1 has NaN or infinity where the original has none"),
    "another shape": (lambda y: y[:, :4], r"case B1 has shape \[1, 4\], expected \[1, 5\]"),
    "a dimension more": (lambda y: y[None], r"has shape \[1, 1, 5\], expected \[1, 5\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_named(name, gate):
    change, message = WRONG[name]
    verdict = gate.judge(changed(change))
    assert verdict.reason == "wrong"
    assert verdict.cure.startswith("Nothing to do")
    assert re.search(message, verdict.detail)


def detail_of(gate: Gate, run: Run) -> str:
    verdict = gate.judge(run)
    assert verdict.reason == "wrong"
    return verdict.detail


def test_the_worst_error_is_kept(gate):
    gate.judge(changed(lambda y: y * 1.05))
    assert gate.errors["y"].relative_l2 == pytest.approx(0.05, rel=1e-3)


def test_a_missing_output(gate):
    assert "no output named ['y']" in detail_of(gate, lambda inputs: {"z": right(inputs)["y"]})


def test_one_output_buffer_for_all_calls(gate):
    buffer = torch.empty(64, 5)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = right(inputs)["y"]
        return {"y": buffer[: len(y)].copy_(y)}

    assert "a later call overwrote an answer that was already handed out" in detail_of(gate, run)


def test_one_output_buffer_for_all_calls_of_one_size(gate):
    buffer = torch.empty(8, 5)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = right(inputs)["y"]
        return {"y": buffer.copy_(y) if len(y) == 8 else y}

    assert "in case B8: a later call overwrote an answer that was already handed out" in detail_of(gate, run)


def test_another_answer_the_second_time(gate):
    calls = 0

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {"y": right(inputs)["y"] * (1.0009 if calls % 4 < 2 else 0.9991)}  # within the threshold each time

    assert "the same input gave another answer the second time (1.8" in detail_of(gate, run)


def test_a_row_that_is_another_one_alone(tmp_path):
    gate = make_gate(tmp_path, [Case({"B": 4}, 0)])

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": right(inputs)["y"] * (1.0 if len(inputs["x"]) > 1 else 1.02)}

    assert "in case B4: row 0 alone differs from row 0 in the batch by 2." in detail_of(gate, run)


def test_an_engine_that_never_reads_its_second_input(gate):
    first: dict[int, dict[str, Tensor]] = {}

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": first.setdefault(len(inputs["x"]), right(inputs))["y"].clone()}

    assert "alone differs" in detail_of(gate, run)


def test_rows_are_not_tried_alone_where_the_original_mixes_them(tmp_path):
    def mixing(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": right(inputs)["y"] - right(inputs)["y"].mean(0)}

    gate = make_gate(tmp_path, [Case({"B": 4}, 0)], mixing)
    assert not gate.reference.row_invariant
    assert gate.judge(mixing).ok


def test_a_decisive_flip(tmp_path):
    """At a loose threshold, one row of many whose classes change places is no rounding."""
    ref = torch.zeros(64, 5)
    ref[:, 0], ref[:, 1] = 1.0, 0.8

    def flipped(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = ref[: len(inputs["x"])].clone()
        y[0, :2] = torch.tensor([0.89, 0.91])
        return {"y": y}

    gate = make_gate(tmp_path, [Case({"B": 64}, 0)], lambda inputs: {"y": ref[: len(inputs["x"])].clone()})
    gate.threshold = THRESHOLDS["bf16"]
    assert "case B64: 1 rows have another largest element where the original was clear" in detail_of(gate, flipped)


def test_with_a_task_metric_answers_need_only_be_sane(tmp_path):
    gate = make_gate(tmp_path, only_sane=True)
    assert gate.judge(changed(lambda y: y * 1.05)).ok
    assert gate.errors["y"].relative_l2 == pytest.approx(0.05, rel=1e-3)
    assert "NaN" in detail_of(gate, changed(one_nan))


def test_nan_of_the_original_is_nan_of_the_variant(tmp_path):
    def no_first_class(y: Tensor) -> Tensor:
        y[:, 0] = float("nan")
        return y

    run = changed(no_first_class)
    assert make_gate(tmp_path, run=run).judge(run).ok


def test_answers_of_some_rows_are_enough_to_judge(tmp_path, monkeypatch):
    monkeypatch.setattr("onecard.verify.reference._MAX_CASE_BYTES", 200)
    gate = make_gate(tmp_path, [Case({"B": 64}, 0)])
    assert gate.judge(right).ok
    assert "relative error" in detail_of(gate, changed(lambda y: y.flip(0)))


def test_users_rows_are_what_is_run(tmp_path):
    data = {"x": torch.full((3, 6), 0.5)}
    cases = [Case({"B": 2}, 0)]
    reference = compute_reference(right, SPEC, cases, tmp_path, data, "cpu")
    gate = Gate(SPEC, reference, tmp_path, THRESHOLDS["fp32"], "cpu", data)
    seen: list[Tensor] = []

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(inputs["x"])
        return right(inputs)

    assert gate.judge(run).ok
    assert all((x == 0.5).all() for x in seen)
    assert not torch.equal(make_inputs(SPEC, {"B": 2})["x"], seen[0])
