"""One variant on disk: building all its artifacts, and running it for inputs of any size.

A static variant has an artifact per bucket. Inputs between two buckets are padded up to the next, inputs
larger than the largest are split along the batch; both along symbols of the spec only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.backends import get_backend
from onecard.backends.base import Runner, Target, Tensors
from onecard.errors import SpecError
from onecard.recipe import Recipe
from onecard.spec import Bucket, Spec, TensorSpec, bucket_label, smallest_fit
from onecard.transforms.precision import precision_scope

DYNAMIC = "dynamic"


@dataclass(frozen=True)
class Site:
    """What all variants of one model have in common where they run.

    Args:
        spec: inputs, outputs and symbols.
        buckets: the sizes that static variants are built for.
        device: ``cpu`` or ``cuda:N``.
        source: the folder of the original.
        device_memory: most bytes of the device's memory to use; None for all that is free.
    """

    spec: Spec
    buckets: tuple[Bucket, ...]
    device: str
    source: Path
    device_memory: int | None = None


def artifact_targets(folder: Path, recipe: Recipe, site: Site) -> Iterator[tuple[Path, Target]]:
    """Every artifact that a variant consists of: its folder and its target."""
    memo: dict[Any, Any] = {}
    target = Target(recipe, site.spec, site.device, None, site.source, folder / "shared", memo=memo)
    target = dataclasses.replace(target, device_memory=site.device_memory)
    if not recipe.static:
        yield folder / DYNAMIC, target
        return
    for bucket in sorted(site.buckets, key=lambda b: -math.prod(b.values())):  # what the largest frees, others find
        yield folder / bucket_label(bucket), dataclasses.replace(target, bucket=bucket)


def load_variant(folder: Path, recipe: Recipe, site: Site) -> VariantRunner:
    """Load all artifacts of a variant.

    Raises:
        Exception: whatever the backend raises; the caller turns it into a verdict or falls back.
    """
    backend = get_backend(recipe.backend)
    runners: list[tuple[Bucket | None, Runner]] = []
    with _scope(recipe, site.device)():
        for artifact, target in artifact_targets(folder, recipe, site):
            runners.append((target.bucket, backend.load(artifact, target)))
    return VariantRunner(recipe, site.spec, site.device, runners)


class VariantRunner:
    """A loaded variant for inputs of any size that the spec allows.

    Args:
        recipe: what it is.
        spec: what it takes.
        device: where.
        runners: one per bucket, or one under None for the whole range.
    """

    def __init__(
        self, recipe: Recipe, spec: Spec, device: str, runners: Sequence[tuple[Bucket | None, Runner]]
    ) -> None:
        self.recipe = recipe
        self.spec = spec
        self.device = device
        # A CUDA graph's launches were made when it was captured.
        self._scope = contextlib.nullcontext if recipe.backend == "cudagraph" else _scope(recipe, device)
        self._dynamic = next((runner for bucket, runner in runners if bucket is None), None)
        self._buckets = [b for b, _ in runners if b is not None]
        self._batch = spec.batch_symbol
        self._names = tuple(t.name for t in spec.inputs)
        self._static = {tuple(t.concrete(b) for t in spec.inputs): runner for b, runner in runners if b is not None}

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run on inputs that are on the device, in the spec's dtypes, contiguous, and in its range.

        Returns:
            Named outputs on the device, owned by the caller.
        """
        with self._scope(), torch.inference_mode():
            if self._dynamic is not None:
                return self._dynamic(inputs)
            exact = self._static.get(tuple(inputs[name].shape for name in self._names if name in inputs))
            if exact is not None and len(inputs) == len(self._names):
                return exact(inputs)
            return self._fit(inputs, self.spec.bind({name: tensor.shape for name, tensor in inputs.items()}))

    @property
    def is_static(self) -> bool:
        """Whether it runs at its buckets' sizes alone, and pads what is smaller."""
        return self._dynamic is None

    def close(self) -> None:
        """Release every runner."""
        for runner in [*self._static.values(), *([self._dynamic] if self._dynamic else [])]:
            runner.close()

    def _fit(self, inputs: Tensors, size: Bucket) -> Tensors:
        bucket = smallest_fit(self._buckets, size)
        if bucket is None:
            return self._split(inputs, size)
        padded = {t.name: _pad(inputs[t.name], t, bucket) for t in self.spec.inputs}
        outputs = self._static[tuple(tensor.shape for tensor in padded.values())](padded)
        return {t.name: _crop(outputs[t.name], t, size) for t in self.spec.outputs}

    def _split(self, inputs: Tensors, size: Bucket) -> Tensors:
        """Answer a batch larger than every bucket in parts of the largest batch that fits."""
        batch = self._batch
        fits = [b for b in self._buckets if batch and all(b[s] >= v for s, v in size.items() if s != batch)]
        if not fits or batch is None:
            raise SpecError(f"no bucket of {list(map(bucket_label, self._buckets))} holds {bucket_label(size)}.")
        step = max(b[batch] for b in fits)
        parts = [
            self({name: tensor[start : start + step].contiguous() for name, tensor in inputs.items()})
            for start in range(0, size[batch], step)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _pad(tensor: Tensor, spec: TensorSpec, bucket: Bucket) -> Tensor:
    """Zeros behind the data in every symbolic dimension, up to the bucket's size."""
    shape = spec.concrete(bucket)
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return padded


def _crop(tensor: Tensor, spec: TensorSpec, size: Bucket) -> Tensor:
    """The part of an answer that belongs to the unpadded input."""
    keep = tuple(slice(0, size[d]) if isinstance(d, str) and d in size else slice(None) for d in spec.shape)
    return tensor[keep]


def _scope(recipe: Recipe, device: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What launches of a recipe run within: the fp32 switches matter on a GPU only, where fp32 arithmetic is left."""
    if device == "cpu" or recipe.precision in ("fp16", "bf16"):
        return contextlib.nullcontext
    return functools.partial(precision_scope, recipe.precision)
