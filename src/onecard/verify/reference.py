"""The original's own answers, computed once per search and kept in files for every candidate."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.inputs import make_inputs
from onecard.spec import Spec
from onecard.verify.cases import Case
from onecard.verify.compare import worst_row
from onecard.verify.variation import Variation, differ

_INDEX = "reference.json"
_MAX_CASE_BYTES = 512 << 20  # answers larger than this are kept for a sample of their rows only
ROW_TOLERANCE = 1e-3
_OTHER_SEED = 1000  # beside a case's own: the same size, other inputs

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Reference(msgspec.Struct, frozen=True):
    """What was found out about the original while its answers were computed.

    Args:
        cases: the trials, each with its answers in ``<case>.safetensors``.
        row_invariant: False where the original itself mixes the rows of a batch.
        fp64_error: relative L2 of fp32 against fp64 on the smallest case, None where fp64 did not run or all is zero.
        metric: the original's metric on the user's labelled data, None without.
        notes: what the user should know (answers that hold NaN, or are the same for all inputs, say).
    """

    cases: tuple[Case, ...]
    row_invariant: bool = True
    fp64_error: float | None = None
    metric: float | None = None
    notes: tuple[str, ...] = ()


def compute_reference(
    run: Run, spec: Spec, cases: list[Case], folder: Path, data: Mapping[str, Tensor] | None, device: str
) -> Reference:
    """Run the original on every case and write its answers.

    Args:
        run: the original in fp32, taking and giving named tensors on ``device``.
        spec: of the model.
        cases: what to run.
        folder: where to write; exists.
        data: rows of the user's data, if any.
        device: where ``run`` wants its inputs.

    Returns:
        What was found; :func:`write_reference` is for the caller, once all that belongs to it is known.
    """
    notes: list[str] = []
    invariant = True
    variation = Variation()
    for case in cases:
        inputs = _inputs(spec, case, case.seed, data, device)
        outputs = run(inputs)
        variation.add(outputs)
        for name, out in outputs.items():
            if out.is_floating_point() and not torch.isfinite(out).all():
                notes.append(f"the original's own output '{name}' holds NaN or infinity in case {case.name}")
        invariant = invariant and _rows_alone_agree(run, spec, case, inputs, outputs)
        _save(folder / f"{case.name}.safetensors", outputs, spec, case)
        if variation.in_doubt:
            others = _inputs(spec, case, case.seed + _OTHER_SEED, data, device)
            if differ(inputs, others):
                variation.contrast(outputs, run(others))
    if not invariant:
        notes.append("the original mixes the rows of a batch, so rows are not tested one by one")
    return Reference(tuple(cases), invariant, None, None, (*variation.notes(), *notes))


def write_reference(reference: Reference, folder: Path) -> None:
    """Write the index of a reference folder, whole or not at all: its presence means that all is there."""
    temporary = folder / f".{_INDEX}.{os.getpid()}"
    temporary.write_bytes(msgspec.json.encode(reference))
    temporary.replace(folder / _INDEX)


def read_reference(folder: Path) -> Reference:
    """Read what was written last."""
    return msgspec.json.decode((folder / _INDEX).read_bytes(), type=Reference)


def read_answers(folder: Path, case: Case) -> tuple[dict[str, Tensor], Tensor | None]:
    """The original's answers to one case, on the CPU, and the rows they are of (None: all)."""
    tensors = load_file(folder / f"{case.name}.safetensors")
    rows = tensors.pop("rows", None)
    return {name.removeprefix("out."): tensor for name, tensor in tensors.items()}, rows


def to_device(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """Copies of named tensors on a device (the same tensors where they are there already)."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def probed_rows(size: int) -> list[int]:
    """The rows of a batch that are tried alone: the first, a middle and the last."""
    return sorted({0, size // 2, size - 1}) if size > 1 else []


def one_row(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """A batch of one row of these inputs."""
    return {name: tensor[row : row + 1].contiguous() for name, tensor in inputs.items()}


def _inputs(spec: Spec, case: Case, seed: int, data: Mapping[str, Tensor] | None, device: str) -> dict[str, Tensor]:
    return to_device(make_inputs(spec, case.bucket, seed=seed, ragged=case.ragged, data=data), device)


def _rows_alone_agree(run: Run, spec: Spec, case: Case, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> bool:
    batch = spec.batch_symbol
    if batch is None or case.bucket[batch] == 1 or spec.symbols[batch].low > 1:
        return True
    for row in probed_rows(case.bucket[batch]):
        alone = run(one_row(inputs, row))
        if any(worst_row(alone[name], out[row : row + 1])[1] > ROW_TOLERANCE for name, out in outputs.items()):
            return False
    return True


def _save(path: Path, outputs: Mapping[str, Tensor], spec: Spec, case: Case) -> None:
    kept = {f"out.{name}": out.detach().cpu() for name, out in outputs.items()}
    total = sum(t.nbytes for t in kept.values())
    batch = spec.batch_symbol
    if total > _MAX_CASE_BYTES and batch is not None:
        count = max(2, case.bucket[batch] * _MAX_CASE_BYTES // total)
        rows = torch.linspace(0, case.bucket[batch] - 1, count).round().long()
        rows = torch.unique(rows)
        kept = {name: tensor[rows] for name, tensor in kept.items()}
        kept["rows"] = rows
    save_file({name: tensor.contiguous().clone() for name, tensor in kept.items()}, path)
