"""Weights as files: reading a checkpoint, loading it strictly, and saving without repeating shared tensors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import ModelError
from onecard.models.wording import first_line

_SHOWN = 3
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a state dict out of a ``.safetensors``, ``.pt`` or ``.pth`` file, without running any code in it.

    Raises:
        ModelError: no such file, not readable, or not a mapping of names to tensors.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"the weights file {path} does not exist.", "Check --weights.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text is long, in bold, and advises to run the file's code
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ModelError(
            f"the weights file {path} holds more than tensors{f' ({found[1]})' if found else ''}, or is no checkpoint: "
            "onecard unpickles no objects.",
            "Save the tensors alone: safetensors.torch.save_file(model.state_dict(), 'model.safetensors') or "
            "torch.save(model.state_dict(), path).",
        ) from error
    except Exception as error:  # the readers raise what they like on files that are something else
        raise ModelError(
            f"the weights file {path} cannot be read: {first_line(error)}.",
            "Give a .safetensors file or a state dict saved with torch.save(model.state_dict(), path).",
        ) from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            f"the weights file {path} holds a {type(content).__name__}, expected a mapping of names to tensors.",
            "Save model.state_dict() itself.",
        )
    state = {str(key): value for key, value in content.items()}
    prefix = "module."  # what DataParallel puts before every name
    if state and all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict, every name and shape of which must fit.

    Raises:
        ModelError: naming the first names that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    problems = [
        _listed("missing", [name for name in own if name not in state]),
        _listed("unexpected", [name for name in state if name not in own]),
        _listed(
            "of another shape",
            [
                f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
                for name, value in own.items()
                if name in state and isinstance(value, Tensor) and value.shape != state[name].shape
            ],
        ),
    ]
    found = "; ".join(filter(None, problems))
    if found:
        raise ModelError(
            f"the weights in {path} do not fit {type(module).__name__}: {found}.",
            "Give the weights of just this architecture.",
        )
    module.load_state_dict(dict(state), strict=True)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"


def save_state(module: nn.Module, path: Path) -> dict[str, str]:
    """Save a module's parameters and persistent buffers, each stored tensor once.

    Returns:
        For every name that was left out because it is the very same tensor as another: that other's name.

    Raises:
        ModelError: the state holds something that is no tensor.
    """
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the state '{name}' of {type(module).__name__} is a {type(value).__name__}, expected a tensor.",
                "Keep such state out of state_dict (get_extra_state).",
            )
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        # A clone of its own: safetensors refuses views that share storage with another.
        kept[name] = value.detach().clone(memory_format=torch.contiguous_format)
    save_file(kept, path)
    return aliases


def load_state(module: nn.Module, path: Path, aliases: Mapping[str, str]) -> None:
    """Load what :func:`save_state` saved.

    Raises:
        ModelError: the file does not fit the module.
    """
    state = read_checkpoint(path)
    load_strictly(module, {**state, **{name: state[other] for name, other in aliases.items() if other in state}}, path)
