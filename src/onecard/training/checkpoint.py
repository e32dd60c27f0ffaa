"""Checkpoints of a training: one safetensors file of module and optimiser, with JSON in its header.

The random numbers of a step follow from the seed and the step alone (:func:`onecard.training.data.step_seed`), so no
state of a generator has to be kept. The file is written aside and renamed: there is a whole one or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onecard.errors import StorageError

_STATE = "onecard.training"  # the key of the JSON in the file's header
_FORMAT = 1


class EpochRecord(msgspec.Struct, frozen=True):
    """One epoch: the mean loss of its steps, the learning rate at its end, and how long it took."""

    epoch: int
    loss: float
    learning_rate: float
    seconds: float


class Position(msgspec.Struct, frozen=True):
    """Where a training stands.

    Args:
        key: what is trained on what and how; see :func:`run_key`.
        epoch: the epoch under way, from 0.
        batch: batches of it that are done.
        step: steps done altogether.
        loss_sum: of the losses of this epoch's steps.
        seconds: spent in this epoch.
        epochs: the epochs that are finished.
    """

    key: str
    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    epochs: tuple[EpochRecord, ...] = ()


def run_key(*parts: object) -> str:
    """SHA-256 of anything that has a lasting text; of a module, of its parameters."""
    digest = hashlib.sha256()
    for part in parts:
        text = digest_of_parameters(part) if isinstance(part, nn.Module) else repr(part)
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def digest_of_parameters(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the parameters.

    Buffers are left out: observers fill them from a calibration, which on a GPU is not the same twice.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Write a checkpoint in the place of an older one; :func:`check_checkpoint` made its folder.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {_STATE: json.dumps({"format": _FORMAT, **msgspec.to_builtins(position)})}
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _explained(path):
        try:
            save_file(tensors, aside, header)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def check_checkpoint(path: Path) -> None:
    """Make the folder, and find out before hours of training whether a checkpoint could be written there.

    Raises:
        StorageError: it could not.
    """
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.probe")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the checkpoint {path} was not written: {error}.",
            "Free some space or set ONECARD_CACHE to another folder.",
        ) from error


def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> Position | None:
    """Put module and optimiser back where a checkpoint left them.

    Returns:
        Where the training stands, or None where there is no checkpoint, it is another run's, or it is damaged; then
        module and optimiser are unchanged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_STATE, "{}"))
            if header.get("format") != _FORMAT or header.get("key") != key:
                return None
            position = msgspec.convert(header, Position)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError):
        return None
    wanted = {f"module.{name}" for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    if wanted != {name for name in tensors if name.startswith("module.")}:
        return None
    before = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in module.state_dict().items()
    }
    try:
        module.load_state_dict({n.removeprefix("module."): t for n, t in tensors.items() if n in wanted}, strict=False)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": _moments(tensors)})
    except (RuntimeError, ValueError, KeyError):
        module.load_state_dict(before)
        return None
    return position


def _moments(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            state.setdefault(int(index), {})[field] = tensor
    return state
