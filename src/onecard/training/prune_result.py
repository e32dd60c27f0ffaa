"""What a pruning came to, and its two files: the exported program and the figures beside it."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import msgspec
import torch

from onecard import __version__
from onecard.errors import ModelError, StorageError, Unsupported, UsageError
from onecard.evidence import to_json
from onecard.models.exported import export_flat, flat_program, load_exported, save_exported
from onecard.models.flat import FlatModule
from onecard.models.probe import probe_sizes, sample_inputs
from onecard.spec import Spec
from onecard.training.channels import channels_of, trainable_copy
from onecard.training.cost import Cost
from onecard.training.prune_state import PruneStep
from onecard.verify.compare import THRESHOLDS, compare


class LayerChannels(msgspec.Struct, frozen=True):
    """Input and output channels of one layer, in the original and in what is left of it."""

    layer: str
    before: tuple[int, int]
    after: tuple[int, int]


class Score(msgspec.Struct, frozen=True):
    """The yardstick (a metric, or the agreement with the original; higher is better) on so many rows."""

    name: str
    rows: int
    before: float
    after: float | None


class PruneResult(msgspec.Struct, frozen=True):
    """All that was done; the ``.json`` beside the program.

    Args:
        model: the name of the original.
        target: what was asked for.
        met: False where the closest was accepted instead.
        criterion: how channels were ranked.
        spec: of the program; with fixed sizes where it could not be exported for all.
        before: the original's cost.
        after: the cost of what is left.
        layers: every convolution and linear layer that lost channels.
        kept: why other layers could not lose any, by name.
        steps: one by one.
        score: how good the model was and is, or None where there were no rows.
        notes: what else the user should know.
        seconds: that it took, without earlier runs that were interrupted.
        versions: of what made it.
    """

    model: str
    target: str
    met: bool
    criterion: str
    spec: Spec
    before: Cost
    after: Cost
    layers: tuple[LayerChannels, ...]
    kept: dict[str, str]
    steps: tuple[PruneStep, ...]
    score: Score | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    versions: dict[str, str] = {}


def describe_layers(before: FlatModule, after: FlatModule) -> tuple[LayerChannels, ...]:
    """The layers that differ in their channels."""
    had, has = channels_of(before), channels_of(after)
    return tuple(LayerChannels(name, had[name], has[name]) for name in had if name in has and had[name] != has[name])


def check_output(output: Path) -> None:
    """Find out before hours of work whether the files could be written.

    Raises:
        UsageError: the name does not end in ``.pt2``.
        StorageError: the folder cannot be written.
    """
    if output.suffix != ".pt2":
        raise UsageError(f"the output '{output}' must end in .pt2.", f"Write -o {output.with_suffix('.pt2').name}.")
    if output.is_dir():
        raise StorageError(f"{output} is a folder.", "Choose another file with -o.")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.absolute().parent):
            pass
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror}.", "Choose another with -o.") from error


def check_exportable(module: FlatModule, spec: Spec) -> None:
    """Find out before hours of training whether a pruned module could be written.

    Raises:
        ModelError: it could not.
    """
    try:
        export_flat(trainable_copy(module).cpu().requires_grad_(False), spec)
    except Unsupported as error:
        raise ModelError(f"the pruned model cannot be written: {error.detail}.", error.cure) from error


def write_result(result: PruneResult, module: FlatModule, output: Path) -> PruneResult:
    """Export a pruned module, see that the file gives its answers, and put both files in place.

    Args:
        result: the figures.
        module: on the CPU, in evaluation mode, without gradients.
        output: the ``.pt2`` file; the figures go beside it with the suffix ``.json``.

    Returns:
        The result with the program's own spec, notes and versions.

    Raises:
        ModelError: it cannot be exported, or the program answers otherwise than the module.
        StorageError: a file cannot be written.
    """
    output = output.absolute()
    try:
        program, spec, notes = export_flat(module, result.spec)
        versions = {"onecard": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
        result = msgspec.structs.replace(result, spec=spec, notes=(*result.notes, *notes), versions=versions)
        with tempfile.TemporaryDirectory(prefix=f".{output.stem}.", dir=output.parent) as folder:
            aside = Path(folder) / output.name
            save_exported(program, aside)
            _check_program(module, aside, spec)
            figures = aside.with_suffix(".json")
            figures.write_bytes(to_json(result))
            for path in (aside, figures):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            figures.replace(output.with_suffix(".json"))
            aside.replace(output)
    except Unsupported as error:
        raise ModelError(f"the pruned model cannot be written: {error.detail}.", error.cure) from error
    except OSError as error:
        raise StorageError(f"{output} was not written: {error}.", "Free some space, or choose another -o.") from error
    return result


def _check_program(module: FlatModule, path: Path, spec: Spec) -> None:
    program = flat_program(load_exported(path, error=ModelError))
    for sizes in probe_sizes(spec):
        inputs = sample_inputs(spec, sizes)
        with torch.inference_mode():
            wanted, found = module(*inputs), program(*inputs)
        for name, ref, out in zip((t.name for t in spec.outputs), wanted, found, strict=True):
            error = compare(name, out, ref, "").relative_l2
            if not error <= THRESHOLDS["fp32"].relative_l2:
                raise ModelError(f"the exported program's '{name}' is off by {error:.1e} from the pruned model's.")
