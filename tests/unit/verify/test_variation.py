"""Outputs that agreement proves nothing about: constant, the same for every input, or nowhere finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from onecard.spec import Spec, parse_spec
from onecard.verify.cases import Case, make_cases
from onecard.verify.reference import compute_reference
from onecard.verify.variation import differ

SPEC = parse_spec(["x: float32[B,6], B=1..64"])
CASES = make_cases(SPEC, [{"B": 1}, {"B": 8}])
FIXED = parse_spec(["x: float32[1,6]"])
WEIGHTS = ", so agreement with it proves nothing; give trained --weights"
ZERO = f"output 'y' of the original is 0 for every input{WEIGHTS}"
SAME = f"output 'y' of the original is the same for every input of one size{WEIGHTS}"
Answer = Callable[[Tensor], dict[str, Tensor]]


def notes(answer: Answer, folder: Path, spec: Spec = SPEC, cases: list[Case] = CASES) -> tuple[str, ...]:
    return compute_reference(lambda inputs: answer(inputs["x"]), spec, cases, folder, None, "cpu").notes


MUTE: dict[str, tuple[Answer, str]] = {
    "zero": (lambda x: {"y": torch.zeros(len(x), 4)}, ZERO),
    "zero of either sign": (lambda x: {"y": x * 0}, ZERO),
    "one constant": (lambda x: {"y": torch.full((len(x), 4), 0.25)}, ZERO.replace("0 for", "0.25 for")),
    "a bias alone": (lambda x: {"y": torch.arange(4.0).repeat(len(x), 1)}, SAME),
    "half of it NaN": (lambda x: {"y": torch.tensor([0.0, torch.nan]).repeat(len(x), 1)}, SAME),
    "a constant for each size": (lambda x: {"y": torch.full((len(x), 4), float(len(x)))}, SAME),
    "in half precision": (lambda x: {"y": torch.zeros(len(x), 4, dtype=torch.float16)}, ZERO),
    "beside one that is sound": (lambda x: {"y": x * 0, "z": x}, ZERO),
    "beside a mask": (lambda x: {"y": x, "mask": torch.ones(len(x), 6, dtype=torch.int64)}, ""),
    "beside a boolean mask": (lambda x: {"y": x, "mask": x < 99}, ""),
    "empty": (lambda x: {"y": x, "z": x[:, :0]}, ""),
    "sound": (lambda x: {"y": x}, ""),
    "constant at one size only": (lambda x: {"y": x * (len(x) > 1)}, ""),
    "a class": (lambda x: {"y": x.argmax(1)}, ""),
}


@pytest.mark.parametrize("kind", MUTE)
def test_what_never_varies_is_told(kind: str, tmp_path: Path) -> None:
    answer, expected = MUTE[kind]
    told = [note for note in notes(answer, tmp_path) if "proves nothing" in note]
    assert told == ([expected] if expected else [])


def test_integers_count_where_all_outputs_are_constant(tmp_path: Path) -> None:
    told = notes(lambda x: {"y": x * 0, "label": torch.full((len(x),), 7), "mask": x < 99}, tmp_path)
    assert [note.partition(" for every")[0] for note in told] == [
        "output 'y' of the original is 0",
        "output 'label' of the original is 7",
        "output 'mask' of the original is True",
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_output_that_is_nowhere_finite_is_told_of_first(value: float, tmp_path: Path) -> None:
    first, *others = notes(lambda x: {"y": x.sign() * value}, tmp_path)
    assert first.startswith("output 'y' of the original is NaN or infinite in every element, so agreement with it")
    assert len(others) == len(CASES)
    assert all("holds NaN or infinity in case" in note for note in others)


def test_one_number_for_one_input_is_compared_with_another_input(tmp_path: Path) -> None:
    case = [Case({}, 0)]
    assert notes(lambda x: {"y": x.sum()}, tmp_path, FIXED, case) == ()
    assert notes(lambda x: {"y": x.sum() * 0}, tmp_path, FIXED, case) == (ZERO,)


def test_a_sound_model_runs_once_more_only(tmp_path: Path) -> None:
    spec = parse_spec(["x: float32[B,6], B=2..64"])  # no row is tried alone
    cases = make_cases(spec, [{"B": 4}])
    sizes = []

    def answer(x: Tensor) -> dict[str, Tensor]:
        sizes.append(len(x))
        return {"y": x * 2, "mask": torch.ones(len(x), 1, dtype=torch.bool)}

    notes(answer, tmp_path, spec, cases)
    smallest, *rest = (case.bucket["B"] for case in cases)
    assert sizes == [smallest, smallest, *rest]


def test_inputs_that_cannot_differ_prove_nothing(tmp_path: Path) -> None:
    data = {"x": torch.ones(1, 6)}
    found = compute_reference(lambda inputs: {"y": inputs["x"].cumsum(1)}, SPEC, CASES, tmp_path, data, "cpu")
    assert found.notes == ()


def test_differ() -> None:
    ones = {"x": torch.ones(2), "y": torch.tensor([torch.nan])}
    assert not differ(ones, {name: tensor.clone() for name, tensor in ones.items()})
    assert differ(ones, {**ones, "x": torch.zeros(2)})
    assert differ(ones, {**ones, "x": torch.ones(3)})
