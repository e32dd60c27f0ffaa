"""What compression may use beside labelled data: calibration rows, and programs in the original's place."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from onecard.errors import DataError, ModelError, UsageError
from onecard.inputs import make_inputs
from onecard.models.exported import flat_program, load_exported
from onecard.models.model import Model
from onecard.models.wording import first_line
from onecard.verify.data import Dataset, digest_of, load_data, save_data


@dataclass(frozen=True)
class Material:
    """Checked and ready for a search.

    Args:
        calibration: rows without labels, or None to calibrate on the labelled ones.
        alternatives: ``pruned`` or ``qat`` to the ``.pt2`` file with that program.
    """

    calibration: Dataset | None = None
    alternatives: Mapping[str, Path] = field(default_factory=dict)

    def digest(self, data: Dataset | None) -> str:
        """What the results depend on, the labelled rows included."""
        parts = [digest_of(rows) if rows is not None else "" for rows in (data, self.calibration)]
        programs = sorted(self.alternatives.items())
        parts += [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in programs]
        return " ".join(parts)

    def save(self, calibration: Path, alternatives: Path) -> None:
        """Write all into a job's folder."""
        if self.calibration is not None:
            save_data(self.calibration, calibration)
        for name, path in self.alternatives.items():
            alternatives.mkdir(exist_ok=True)
            shutil.copyfile(path, alternatives / f"{name}.pt2")


def load_material(model: Model, calibration: str | None, alternatives: Mapping[str, Path]) -> Material:
    """Read and check calibration rows and alternative programs, before anything is searched.

    Args:
        model: whose inputs and outputs they must fit.
        calibration: a file or ``module:callable``, as for labelled data; labels are ignored.
        alternatives: name to ``.pt2`` file.

    Raises:
        DataError: the rows do not fit the model, or they are all the same.
        ModelError: a program cannot be read, or answers in another form than the original.
        UsageError: there is no such file.
    """
    rows = load_data(calibration, model.spec) if calibration else None
    if rows is not None:
        rows = Dataset(rows.inputs, None, rows.rows)
        _check_variety(rows)
    for name, path in alternatives.items():
        _check_program(model, name, path)
    return Material(rows, dict(alternatives))


def _check_variety(rows: Dataset) -> None:
    """A constant says nothing about the range of what a model will see."""
    for name, tensor in rows.inputs.items():
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            raise DataError(
                f"all calibration values of '{name}' are {float(tensor.flatten()[0]):g}, which gives no range.",
                "Pass inputs as the model will see them, preprocessed as for training.",
            )


def _check_program(model: Model, name: str, path: Path) -> None:
    """Run the program beside the original at the smallest size, and compare the forms of their answers."""
    if not path.is_file():
        raise UsageError(
            f"there is no file '{path}'.", f"--{name} takes a .pt2 file that 'onecard {_MAKER[name]}' wrote."
        )
    program = flat_program(load_exported(path, error=ModelError))
    inputs = make_inputs(model.spec, model.spec.smallest())
    args = [inputs[t.name] for t in model.spec.inputs]
    with torch.inference_mode():
        wanted = model.flat(*args)
        try:
            given = program(*args)
        except Exception as error:  # the program's own code, on inputs it was perhaps not made for
            raise ModelError(
                f"the program {path} does not take the inputs of {model.name}: {first_line(error)}.",
                f"It takes {model.spec}. Make it from the same model with 'onecard {_MAKER[name]}'.",
            ) from error
    shapes = [[(tuple(t.shape), t.dtype) for t in answer] for answer in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"the program {path} answers {_text(given)} where {model.name} answers {_text(wanted)}.",
            f"Make it from the same model with 'onecard {_MAKER[name]}'.",
        )


def _text(answer: tuple[torch.Tensor, ...]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in answer)


_MAKER = {"pruned": "prune", "qat": "qat"}
