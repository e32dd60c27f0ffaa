"""What is planned for: a model, or a bundle with its variants; where its original is, and what serves each size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onecard.errors import BundleError, OnecardError, UsageError
from onecard.recipe import Recipe
from onecard.spec import Bucket, Spec, default_buckets, smallest_fit

if TYPE_CHECKING:
    from torch import nn

    from onecard.bundle.manifest import Manifest
    from onecard.models.flat import FlatModule
    from onecard.models.model import Model

_SUFFIX = ".onecard"
_PREDICTED = ("fp16", "bf16")


@dataclass(frozen=True)
class Subject:
    """What is planned for.

    Args:
        name: what the user sees.
        spec: inputs, outputs and symbols.
        buckets: the sizes to plan for.
        flat: the original, for predictions; None where it cannot be had.
        model: the loaded model, or None for a bundle.
        folder: of the bundle, or None for a model.
        manifest: of the bundle, or None.
        notes: what the user should know.
    """

    name: str
    spec: Spec
    buckets: tuple[Bucket, ...]
    flat: FlatModule | None
    model: Model | None = None
    folder: Path | None = None
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()

    def recipe(self, bucket: Bucket) -> Recipe | None:
        """The variant that serves a size; None for a model."""
        if self.manifest is None:
            return None
        made = list(self.manifest.buckets) or [{}]
        fit = smallest_fit(made, bucket)
        wanted = made[-1] if fit is None else fit
        names = next((rank.variants for rank in self.manifest.ranks if rank.bucket == wanted), ())
        entry = self.manifest.variant(names[0] if names else self.manifest.chosen)
        return entry.recipe if entry is not None else None

    def run_size(self, bucket: Bucket) -> Bucket:
        """The size that a batch is really run at: a static variant pads up to a bucket, or splits at the largest."""
        recipe = self.recipe(bucket)
        if recipe is None or not recipe.static or self.manifest is None or not self.manifest.buckets:
            return bucket
        fit = smallest_fit(self.manifest.buckets, bucket)
        return fit or max(self.manifest.buckets, key=lambda made: math.prod(made.values()))

    def precision(self, bucket: Bucket, asked: str) -> str:
        """The arithmetic at a size: the variant's in a bundle, else what was asked for."""
        recipe = self.recipe(bucket)
        if recipe is None:
            return asked
        return recipe.precision if recipe.precision in _PREDICTED else "fp32"


def open_subject(
    target: str | Path | nn.Module | Model, inputs: Sequence[str], weights: Path | None, batches: Sequence[int]
) -> Subject:
    """Load what the user named.

    Args:
        target: a bundle's folder, a model's reference, a live module, or a loaded model.
        inputs: the inputs in the spec's text form; for a model only.
        weights: a state dict; for a model only.
        batches: batch sizes to plan for; by default those of the bundle, or the usual ones.

    Raises:
        BundleError: a folder that is no bundle, or a damaged one.
        UsageError: an option that does not go with a bundle, or a batch out of range.
        ModelError: the model cannot be found, built or called.
    """
    from onecard.models.load import load_model
    from onecard.models.model import Model

    if isinstance(target, str | Path) and _is_bundle(str(target)):
        if inputs or weights is not None:
            raise UsageError("a bundle has its inputs and weights already.", "Leave out --input and --weights.")
        return _open_bundle(Path(target), batches)
    if isinstance(target, Model):
        if inputs or weights is not None:
            raise UsageError("a loaded model has its inputs and weights already.", "Leave out inputs and weights.")
        model = target
    else:
        loadable = str(target) if isinstance(target, Path) else target
        model = load_model(loadable, inputs=inputs, weights=weights)
    return Subject(model.name, model.spec, tuple(default_buckets(model.spec, batches)), model.flat, model)


def _is_bundle(target: str) -> bool:
    """A folder that is meant to be a bundle: any but a Hugging Face model's, and whatever is named like one."""
    path = Path(target)
    return (path.is_dir() and not (path / "config.json").is_file()) or path.suffix == _SUFFIX


def _open_bundle(folder: Path, batches: Sequence[int]) -> Subject:
    from onecard.bundle.files import damaged, unlisted
    from onecard.bundle.manifest import SOURCE, VARIANTS, read_manifest
    from onecard.models.source import load_source

    manifest = read_manifest(folder)
    folder = folder.absolute()
    broken = unlisted(folder, manifest.files, (SOURCE, VARIANTS)) | damaged(folder, manifest.files.items())
    if broken:
        name, what = next(iter(broken.items()))
        raise BundleError(f"{folder / name} {what}.", "Copy the bundle again or make it anew.")
    flat, notes = None, []
    try:
        flat = load_source(folder / SOURCE).flat
    except (OnecardError, ImportError) as error:
        reason = str(error).strip().rstrip(".")
        notes.append(f"nothing can be predicted, since the original cannot be made here: {reason}")
    buckets = default_buckets(manifest.spec, batches) if batches else (manifest.buckets or ({},))
    return Subject(manifest.name, manifest.spec, tuple(buckets), flat, None, folder, manifest, tuple(notes))
