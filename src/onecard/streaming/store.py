"""Where weights come from and how they lie in memory: sources, part files, and one contiguous buffer for each part.

Part files are safetensors files, one for each part and one for what several parts share, whose tensors are the flat
elements in memory order. In memory every weight of a part starts at a multiple of 256 bytes of one page-aligned buffer
of just the size that it needs: PyTorch's own pinned memory comes in powers of two, which would double the need.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onecard.errors import BundleError, ModelError, OnecardError, UsageError
from onecard.host import usable_memory
from onecard.streaming.residency import aligned, text
from onecard.streaming.split import Split, Weight

SHARED = "shared"


class Source(Protocol):
    """Gives weights one at a time."""

    def take(self, weight: Weight) -> Tensor:
        """A weight's values: of its shape and dtype, on any device, with any strides."""
        ...

    def release(self, weight: Weight) -> None:
        """The weight was taken for the last time."""
        ...


@dataclass(frozen=True)
class Layout:
    """Where weights lie in one buffer.

    Args:
        offsets: of each weight, in bytes.
        nbytes: of the buffer.
    """

    offsets: Mapping[str, int]
    nbytes: int


def lay_out(names: Iterable[str], weights: Mapping[str, Weight]) -> Layout:
    """One weight behind the other, each where the device's own allocator might put it."""
    offsets: dict[str, int] = {}
    end = 0
    for name in names:
        offsets[name] = end
        end += aligned(weights[name].nbytes)
    return Layout(offsets, end)


def views(buffer: Tensor, layout: Layout, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The weights in a buffer of bytes, by name; nothing is copied."""
    found = {}
    with torch.inference_mode(False):  # an inference tensor could not require a gradient
        for name, offset in layout.offsets.items():
            weight = weights[name]
            elements = buffer[offset : offset + weight.nbytes].view(weight.dtype)
            whole = elements.as_strided(weight.shape, weight.stride)
            # Detached, it is a leaf as a parameter is; a mere view would hand no requires_grad on to its own views.
            found[name] = whole.detach().requires_grad_(weight.requires_grad)
    return found


def host_buffer(nbytes: int) -> Tensor:
    """Page-aligned bytes of main memory, given back to the system when the tensor goes.

    Returns:
        ``uint8[nbytes]``, not pinned.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    region = mmap.mmap(-1, nbytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages; they only make pinning quicker
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def require_main_memory(needed_bytes: int) -> None:
    """Refuse early what would be killed later.

    Raises:
        ModelError: this process may not have that much more main memory; the message says how much there is.
    """
    free = min(psutil.virtual_memory().available, usable_memory() - psutil.Process().memory_info().rss)
    if needed_bytes > free:
        raise ModelError(
            f"streaming needs {text(needed_bytes)} more of main memory for the weights; {text(max(0, free))} is free.",
            "Free some, pass consume=True so that the module's own copy is given up, or use a lower precision.",
        )


class ModuleSource:
    """A module's own parameters and buffers, or the values of a safetensors file in their place.

    Args:
        module: the original; on any device, on the meta device where the file has the values.
        files: a ``.safetensors`` file, or a folder of them, with the names of the module's state dict.
        consume: replace each weight in the module by an empty one on the meta device once it was taken.
    """

    def __init__(self, module: nn.Module, files: Path | None, consume: bool) -> None:
        self._places: dict[str, list[tuple[nn.Module, dict[str, Any], str]]] = {}
        self._aliases: dict[str, list[str]] = {}
        by_identity: dict[int, list[str]] = {}
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for held in (owner._parameters, owner._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        name = f"{prefix}.{key}" if prefix else key
                        self._places[name] = [(owner, held, key)]
                        by_identity.setdefault(id(tensor), []).append(name)
        for names in by_identity.values():
            places = [place for name in names for place in self._places[name]]
            for name in names:
                self._places[name], self._aliases[name] = places, names
        self._consume = consume
        self._files = _Files(files) if files is not None else None

    def take(self, weight: Weight) -> Tensor:
        found = self._from_files(weight.name)
        if found is None:
            _, held, key = self._places[weight.name][0]
            found = held[key].detach()
        if found.is_meta:
            raise ModelError(
                f"the weight '{weight.name}' is on the meta device, and no file holds its values.",
                "Pass weights=FILE.safetensors that has it, or load the module's weights first.",
            )
        _check(weight, found, ModelError)
        return found

    def release(self, weight: Weight) -> None:
        if self._consume:
            for _, held, key in self._places[weight.name]:
                old = held[key]
                empty = torch.empty_like(old, device="meta")
                held[key] = nn.Parameter(empty, False) if isinstance(old, nn.Parameter) else empty

    def new_bytes(self, weights: Iterable[Weight]) -> int:
        """Main memory that taking copies of all these weights adds: with ``consume`` no more than one at a time."""
        new = 0
        largest = 0
        for weight in weights:
            _, held, key = self._places[weight.name][0]
            is_freed = self._consume and held[key].device.type == "cpu"
            new += 0 if is_freed else weight.nbytes
            largest = max(largest, weight.nbytes)
        return new + largest

    def _from_files(self, name: str) -> Tensor | None:
        if self._files is None:
            return None
        return next((self._files.get(alias) for alias in self._aliases[name] if alias in self._files), None)


class PartFiles:
    """The weights of a written split.

    Args:
        folder: where :func:`write_parts` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._files = _Files(folder)

    def take(self, weight: Weight) -> Tensor:
        if weight.name not in self._files:
            raise BundleError(f"the part files lack the weight '{weight.name}'.", "Copy the bundle again.")
        flat = self._files.get(weight.name)
        count = torch.Size(weight.shape).numel()
        if flat.dim() != 1 or flat.numel() != count or flat.dtype != weight.dtype:
            raise BundleError(f"the weight '{weight.name}' does not fit the program.", "Copy it again.")
        return flat.as_strided(weight.shape, weight.stride)

    def release(self, weight: Weight) -> None:
        """Nothing is held."""


def write_parts(folder: Path, split: Split, source: Source) -> None:
    """Write a split's weights, a file for each part, holding no more than one part's in memory.

    Args:
        folder: made if it is not there.
        split: which weights, and in which part.
        source: of their values; released after their part is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uses = Counter(name for part in split.parts for name in part.weights)
    shared = [name for name, count in uses.items() if count > 1]
    files = {SHARED: shared} | {p.name: [n for n in p.weights if uses[n] == 1] for p in split.parts}
    for stem, names in files.items():
        tensors = {name: _flat(split.weights[name], source) for name in names}
        if tensors:
            save_file(tensors, folder / f"{stem}.safetensors")
        for name in names:
            source.release(split.weights[name])


def _flat(weight: Weight, source: Source) -> Tensor:
    """A weight's elements in memory order."""
    flat = torch.empty(torch.Size(weight.shape).numel(), dtype=weight.dtype)
    flat.as_strided(weight.shape, weight.stride).copy_(source.take(weight))
    return flat


def _check(weight: Weight, found: Tensor, error: type[OnecardError]) -> None:
    if tuple(found.shape) != weight.shape or found.dtype != weight.dtype:
        raise error(
            f"the weight '{weight.name}' is {found.dtype}{list(found.shape)}, "
            f"expected {weight.dtype}{list(weight.shape)}.".replace("torch.", "")
        )


class _Files:
    """The tensors of one safetensors file, or of all in a folder; the files stay open and mapped."""

    def __init__(self, path: Path) -> None:
        paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not paths or not all(p.is_file() for p in paths):
            raise UsageError(f"there is no safetensors file at '{path}'.")
        self._where: dict[str, Any] = {}
        with ExitStack() as stack:
            for file in paths:
                try:
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ModelError(f"{file} cannot be read: {error}.") from error
                self._where.update(dict.fromkeys(opened.keys(), opened))
            self._stack = stack.pop_all()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor
