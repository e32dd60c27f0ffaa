"""Where an interrupted pruning goes on: one file for each step, with what was removed and the weights that are left.

The channels that a step removed and its figures stand as JSON in the header of a safetensors file; each is written
aside and renamed.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onecard.errors import StorageError
from onecard.models.flat import FlatModule
from onecard.training.channels import Inputs, Removal, remove, trainable_copy
from onecard.training.checkpoint import EpochRecord
from onecard.training.cost import Cost

_KEY = "onecard.prune"
_FORMAT = 1


class PruneStep(msgspec.Struct, frozen=True):
    """One step towards the target.

    Args:
        step: its number, from 1.
        goal: the amount that it was to come down to.
        cost: the amount it came down to, and the other figures.
        channels: how many channels of leading layers it removed.
        score_before: the yardstick's figure before fine-tuning, or None.
        score: the same after it.
        epochs: of the fine-tuning.
    """

    step: int
    goal: float
    cost: Cost
    channels: int
    score_before: float | None = None
    score: float | None = None
    epochs: tuple[EpochRecord, ...] = ()


def with_changes(step: PruneStep, **changes: object) -> PruneStep:
    """A step with some fields changed; its score is the one before fine-tuning until there is another."""
    done = msgspec.structs.replace(step, **changes)
    return done if done.score is not None else msgspec.structs.replace(done, score=done.score_before)


class Saved(msgspec.Struct, frozen=True):
    """A step's file.

    Args:
        before: what the original costs.
        step: see :class:`PruneStep`.
        removal: the channels it removed.
        tuned: False where its fine-tuning is still to come or under way.
    """

    before: Cost
    step: PruneStep
    removal: Removal
    tuned: bool


class PruneFolder:
    """The files of one pruning.

    Args:
        root: the folder; made when the first step is saved.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def training(self, step: int) -> Path:
        """The fine-tuning's own checkpoint of a step."""
        return self.root / f"training-{step}.safetensors"

    def save(self, saved: Saved, module: FlatModule) -> None:
        """Keep a step.

        Raises:
            StorageError: the folder cannot be written, or the disk is full.
        """
        path = self._path(saved.step.step)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        tensors = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        header = {_KEY: msgspec.json.encode([_FORMAT, saved]).decode()}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside, header)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"the state of the pruning, {path}, was not written: {error}.",
                "Free some space or set ONECARD_CACHE to another folder.",
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def read(self) -> list[Saved]:
        """The steps that are there, in order, up to the first that is missing or damaged."""
        found: list[Saved] = []
        while (saved := self._read(len(found) + 1)) is not None:
            found.append(saved)
        return found

    def rebuild(self, original: FlatModule, inputs: Inputs, steps: list[Saved]) -> FlatModule:
        """The module as the last of these steps left it.

        Args:
            original: the unpruned module, which is left as it is.
            inputs: an example for tracing, on its device.
            steps: all steps up to that one; none of them gives a copy of the original.
        """
        module = trainable_copy(original)
        for saved in steps:
            remove(module, inputs, saved.removal)
        if steps:
            with safe_open(self._path(steps[-1].step.step), "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            module.load_state_dict(state)
        return module

    def clear(self) -> None:
        """Forget all steps."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.root / f"step-{step}.safetensors"

    def _read(self, step: int) -> Saved | None:
        try:
            with safe_open(self._path(step), "pt") as file:
                text = (file.metadata() or {}).get(_KEY, "")
            kind, saved = msgspec.json.decode(text, type=tuple[int, Saved])
        except (OSError, SafetensorError, msgspec.DecodeError):
            return None
        return saved if kind == _FORMAT else None
