"""Tensors of an artifact in safetensors files; equal tensors of one variant are kept and loaded once."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Stored(msgspec.Struct, frozen=True):
    """Where a tensor lies: the key of its elements, and how they are laid out."""

    key: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TensorStore:
    """A folder of safetensors files that grows by one file per artifact.

    Args:
        folder: made when something is saved.
        memo: loaded tensors by key and device, shared by all stores that are given the same one.
    """

    def __init__(self, folder: Path, memo: dict[Any, Any]) -> None:
        self._folder = folder
        self._new: dict[str, Tensor] = {}
        self._loaded = memo
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._where.update(dict.fromkeys(file.keys(), path))

    def add(self, tensor: Tensor) -> Stored:
        """Keep a tensor (any device, any dense layout of its elements) for the next :meth:`save`."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        if _is_dense(tensor):
            flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset()).cpu()
        else:
            contiguous = tensor.detach().contiguous()
            flat, stride = contiguous.reshape(-1).cpu(), tuple(contiguous.stride())
        digest = hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().data if flat.numel() else b"")
        key = f"{digest.hexdigest()[:32]}-{str(tensor.dtype).removeprefix('torch.')}-{flat.numel()}"
        if key not in self._where:
            self._new.setdefault(key, flat.clone())
        return Stored(key, shape, stride)

    def save(self) -> None:
        """Write what was added since the last save into one new file."""
        if not self._new:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"tensors-{len(list(self._folder.glob('*.safetensors')))}.safetensors"
        save_file(self._new, path)
        self._where.update(dict.fromkeys(self._new, path))
        self._new = {}

    def load(self, stored: Stored, device: str) -> Tensor:
        """The tensor with its layout on a device; the elements are shared by all who load the same key."""
        if (stored.key, device) not in self._loaded:
            with safe_open(self._where[stored.key], framework="pt") as file:
                self._loaded[stored.key, device] = file.get_tensor(stored.key).to(device)
        flat: Tensor = self._loaded[stored.key, device]
        return flat.as_strided(stored.shape, stored.stride)


def _is_dense(tensor: Tensor) -> bool:
    """True where the elements fill one block of memory without gaps or overlap, in any order."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return expected == math.prod(tensor.shape)
