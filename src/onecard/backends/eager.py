"""PyTorch itself: the module as Python code, in inference mode.

Where installed code can build the model again (a factory, torchvision, timm, transformers), the artifact is
only a note, and loading builds the original from the bundle's source and applies the transforms. A live module,
and one that was compressed, ships as an exported program of the transformed module, whose graph is then run
operator by operator.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from onecard.backends.base import Runner, Target, Tensors
from onecard.backends.export import export_program
from onecard.evidence import Verdict
from onecard.inputs import make_inputs
from onecard.models.exported import flat_program, load_exported, save_exported
from onecard.models.flat import FlatModule
from onecard.models.model import Origin
from onecard.models.source import load_source
from onecard.transforms import apply_transforms

_NOTE = "eager.json"
_PROGRAM = "program.pt2"
_MODULE = "eager module"


class _Note(msgspec.Struct, frozen=True):
    """Where the module comes from: ``source`` (rebuilt) or ``program`` (the exported program beside it)."""

    road: str


class _SourceHeader(msgspec.Struct, frozen=True):
    """The part of ``source.json`` that decides the road."""

    origin: Origin


class EagerBackend:
    """Inference mode, nothing compiled: the yardstick, and the fallback that always runs."""

    def available(self, target: Target) -> Verdict | None:
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        header = msgspec.json.decode((target.source / "source.json").read_bytes(), type=_SourceHeader)
        road = "program" if header.origin.kind == "live" or target.recipe.compressions else "source"
        if road == "program":
            save_exported(export_program(module, inputs, target), folder / _PROGRAM)
        (folder / _NOTE).write_bytes(msgspec.json.encode(_Note(road)))

    def load(self, folder: Path, target: Target) -> Runner:
        note = msgspec.json.decode((folder / _NOTE).read_bytes(), type=_Note)
        if note.road == "program":
            return EagerRunner(flat_program(load_exported(folder / _PROGRAM)).to(target.device), target)
        if _MODULE not in target.memo:  # the buckets of one variant share one module
            module = load_source(target.source).flat.to(target.device)
            bucket = target.bucket if target.bucket is not None else target.spec.smallest()
            example = {name: t.to(target.device) for name, t in make_inputs(target.spec, bucket).items()}
            target.memo[_MODULE] = apply_transforms(module, target.recipe.transforms, example)
        return EagerRunner(target.memo[_MODULE], target)


class EagerRunner:
    """A module called with the spec's inputs by position."""

    def __init__(self, module: nn.Module, target: Target) -> None:
        self._module: nn.Module | None = module
        self._inputs = tuple(t.name for t in target.spec.inputs)
        self._outputs = tuple(t.name for t in target.spec.outputs)

    def __call__(self, inputs: Tensors) -> Tensors:
        if self._module is None:
            raise RuntimeError("this runner is closed")
        with torch.inference_mode():
            outputs: tuple[Tensor, ...] = self._module(*(inputs[name] for name in self._inputs))
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        self._module = None
