"""Calibration rows and alternative programs are checked before anything is searched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from onecard.errors import DataError, ModelError, UsageError
from onecard.models.exported import export_flat, save_exported
from onecard.models.load import load_model
from onecard.models.model import Model
from onecard.search.material import Material, load_material

SPEC = ["x: float32[B,4], B=1..8"]


@pytest.fixture
def model() -> Model:
    return load_model(nn.Sequential(nn.Linear(4, 3)), inputs=SPEC)


def program(path: Path, module: nn.Module, spec: list[str] = SPEC) -> Path:
    other = load_model(module, inputs=spec)
    save_exported(export_flat(other.flat, other.spec)[0], path)
    return path


def rows(path: Path, array: np.ndarray) -> str:
    np.savez(path, x=array)
    return str(path)


def test_rows_and_programs_are_read_and_kept(model: Model, tmp_path: Path):
    path = program(tmp_path / "small.pt2", nn.Linear(4, 3))
    text = rows(tmp_path / "rows.npz", np.random.default_rng(0).normal(size=(5, 4)).astype("float32"))
    material = load_material(model, text, {"pruned": path})
    material.save(tmp_path / "calibration.safetensors", tmp_path / "alternatives")
    assert (tmp_path / "alternatives" / "pruned.pt2").read_bytes() == path.read_bytes()
    assert material.calibration is not None
    assert material.calibration.rows == 5
    assert load_material(model, text, {}).digest(None) != material.digest(None)


def test_the_digest_tells_calibration_from_data(model: Model, tmp_path: Path):
    text = rows(tmp_path / "rows.npz", np.random.default_rng(0).normal(size=(5, 4)).astype("float32"))
    found = load_material(model, text, {}).calibration
    assert found is not None
    assert Material().digest(found) != Material(found).digest(None)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 5), "float32"), "dimension 1 must be 4"),
        (np.zeros((3, 4), "int64"), "int64"),
        (np.full((3, 4), np.nan, "float32"), "NaN or infinity"),
        (np.zeros((0, 4), "float32"), "empty"),
        (np.full((3, 4), 0.5, "float32"), "all calibration values of 'x' are 0.5"),
        (np.zeros((3, 2, 2), "float32"), "Reshape"),
    ],
)
def test_bad_rows(model: Model, tmp_path: Path, array: np.ndarray, message: str):
    with pytest.raises(DataError, match=message):
        load_material(model, rows(tmp_path / "rows.npz", array), {})


def test_a_missing_program(model: Model, tmp_path: Path):
    with pytest.raises(UsageError, match=r"no file.*onecard prune"):
        load_material(model, None, {"pruned": tmp_path / "none.pt2"})


def test_a_program_with_another_answer(model: Model, tmp_path: Path):
    path = program(tmp_path / "other.pt2", nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"answers float32\[1, 2\] where .* answers float32\[1, 3\]"):
        load_material(model, None, {"qat": path})


def test_a_program_with_other_inputs(model: Model, tmp_path: Path):
    path = program(tmp_path / "other.pt2", nn.Linear(5, 3), ["x: float32[B,5], B=1..8"])
    with pytest.raises(ModelError, match="does not take the inputs"):
        load_material(model, None, {"qat": path})


def test_a_file_that_is_no_program(model: Model, tmp_path: Path):
    (tmp_path / "bad.pt2").write_bytes(b"not a zip")
    with pytest.raises(ModelError, match="refused"):
        load_material(model, None, {"qat": tmp_path / "bad.pt2"})


def test_the_programs_own_weights_are_used(model: Model, tmp_path: Path):
    from onecard.calibration.bench import Bench
    from onecard.transforms.adopt import pruned

    other = nn.Linear(4, 3)
    alternatives = tmp_path / "alternatives"
    alternatives.mkdir()
    program(alternatives / "pruned.pt2", other)
    records: list = []
    place = Bench(model.spec, "cpu", {}, alternatives=alternatives, record=records.append)
    adopted = pruned(model.flat, place)
    x = torch.randn(3, 4)
    assert torch.equal(adopted(x)[0], other(x))
    assert [isinstance(m, nn.Linear) for m in adopted.inner.children()]
    assert (records[0].scheme, records[0].layers) == ("pruned", 1)
