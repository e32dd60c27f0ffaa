"""Opening a bundle: digests, environment, self-test with the golden answers, and the way to the next best.

A bundle proves itself before it answers: every file is what the manifest says, the variant was made for a
processor like this one, and its answers to the golden inputs are the original's.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from onecard.bundle.files import damaged, unlisted
from onecard.bundle.manifest import GOLDEN, SOURCE, VARIANTS, Manifest, VariantEntry, read_manifest
from onecard.bundle.variant import Site, VariantRunner, load_variant
from onecard.environment import Environment, detect, differences, resolve_device
from onecard.errors import BundleError, NoVariantError, SpecError
from onecard.recipe import ORIGINAL
from onecard.spec import Bucket, Spec, bucket_label, smallest_fit
from onecard.verify.compare import compare

_PROBE_LIMIT_S = 180.0
_NATIVE_CODE = ("inductor", "aoti")  # compiled for one instruction set; the other engines choose when they load
_HARMLESS = ("cores", "threads", "main memory", "card memory", "numpy", "onecard")


class OnecardWarning(UserWarning):
    """Something about a bundle that its user should know: a variant that was passed over, and why."""


class Bundle:
    """A bundle that was opened and proved itself; call it with named inputs.

    Args:
        folder: where it lies.
        manifest: what it holds.
        device: where it runs.
        routes: for each bucket, the variant that serves it.

    Attributes:
        skipped: variants that were passed over, with the reason of each.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: str,
        routes: list[tuple[Bucket, VariantRunner]],
        skipped: dict[str, str],
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.device = device
        self.skipped = skipped
        self._routes = routes

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Answer one batch.

        Args:
            **inputs: one tensor or NumPy array per input of ``spec``, of its dtype, of any size in its range.

        Returns:
            Output name to answer: NumPy arrays if all inputs were, else tensors on the device of the first
            tensor that was passed.

        Raises:
            SpecError: a name, dtype or shape that does not fit; the message says what is expected.
        """
        given = [value for value in inputs.values() if isinstance(value, Tensor)]
        tensors = {name: self._enter(name, value) for name, value in inputs.items()}
        size = self.spec.bind({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        outputs = self.route(size)(tensors)
        if given:
            return {name: tensor.to(given[0].device) for name, tensor in outputs.items()}
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    @property
    def spec(self) -> Spec:
        """Inputs, outputs and symbols."""
        return self.manifest.spec

    @property
    def variants(self) -> dict[str, str]:
        """Which variant serves which bucket."""
        return {bucket_label(bucket): runner.recipe.id for bucket, runner in self._routes}

    def close(self) -> None:
        """Release all variants and their memory."""
        for runner in {id(r): r for _, r in self._routes}.values():
            runner.close()
        self._routes = []

    def __repr__(self) -> str:
        return f"<onecard bundle {self.manifest.name} on {self.device}: {self.variants}>"

    def route(self, size: Bucket) -> VariantRunner:
        """The variant that serves inputs of a size.

        Raises:
            BundleError: the bundle was closed.
        """
        if not self._routes:
            raise BundleError("this bundle was closed.", "Load it again.")
        buckets = [bucket for bucket, _ in self._routes]
        fit = smallest_fit(buckets, size)
        wanted = buckets[-1] if fit is None else fit
        return next(runner for bucket, runner in self._routes if bucket == wanted)

    def _enter(self, name: str, value: Any) -> Tensor:
        expected = next((t for t in self.spec.inputs if t.name == name), None)
        if expected is None:
            names = ", ".join(t.name for t in self.spec.inputs)
            raise SpecError(f"the model has no input '{name}': expected {names}.")
        if not isinstance(value, Tensor | np.ndarray):
            raise SpecError(
                f"input '{name}' is a {type(value).__name__}, expected a tensor or a NumPy array ({expected})."
            )
        tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        if tensor.dtype != getattr(torch, expected.dtype):
            have = str(tensor.dtype).removeprefix("torch.")
            raise SpecError(f"input '{name}' is {have}, expected {expected}.", f"Convert it to {expected.dtype} first.")
        return tensor.detach().to(self.device).contiguous()


def load_bundle(
    path: str | Path, device: str = "auto", *, check_files: bool = True, device_memory: int | None = None
) -> Bundle:
    """Open a bundle, prove it, and make it ready to answer.

    Args:
        path: the bundle's folder.
        device: ``auto`` (where it was made for, if that is here), ``cpu``, ``cuda:0`` ...
        check_files: compare every file with its digest (about a second a gigabyte).
        device_memory: most bytes of the device's memory to use; None for all that is free. It binds variants that
            stream their weights; others take what they need.

    Returns:
        The bundle. Where a bucket's best variant was passed over, a :class:`OnecardWarning` has said so.

    Raises:
        BundleError: damaged where that cannot be worked around, or of a newer format.
        NoVariantError: no variant runs here and answers rightly; the message has the reason of each.
    """
    folder = Path(path).absolute()
    manifest = read_manifest(folder)
    place = device_for(manifest, device)
    broken = unlisted(folder, manifest.files, (SOURCE, VARIANTS))
    if check_files:
        broken |= damaged(folder, manifest.files.items())
    skipped = broken_variants(folder, manifest, broken)
    here = detect(place)
    golden = _golden(folder)
    loaded: dict[str, VariantRunner] = {}
    routes = []
    for bucket in manifest.buckets or ({},):
        rank = next((r.variants for r in manifest.ranks if r.bucket == bucket), ())
        order = dict.fromkeys([*rank, *(v.recipe.id for v in manifest.variants)])
        entries = [manifest.variant(n) for n in order]
        runner = _first_good(folder, manifest, entries, (here, device_memory), golden, loaded, skipped)
        if rank and runner.recipe.id != rank[0]:
            warnings.warn(
                f"{manifest.name}: the best variant for {bucket_label(bucket)}, {rank[0]}, was passed over "
                f"({skipped[rank[0]]}); {runner.recipe.id} serves.",
                OnecardWarning,
                stacklevel=2,
            )
        routes.append((dict(bucket), runner))
    return Bundle(folder, manifest, place, routes, skipped)


def prove_variant(folder: Path, recipe_id: str, device: str) -> None:
    """Load one variant and compare its golden answers; for a process of its own.

    Raises:
        Exception: whatever goes wrong.
    """
    manifest = read_manifest(folder)
    entry = manifest.variant(recipe_id)
    if entry is None:
        raise BundleError(f"the bundle holds no variant {recipe_id}.")
    runner = _load(folder, manifest, entry, device)
    problem = _self_test(runner, entry, _golden(folder), device)
    if problem:
        raise BundleError(problem)


def _first_good(  # noqa: PLR0913, PLR0917 - one step of load_bundle, with its state
    folder: Path,
    manifest: Manifest,
    order: list[VariantEntry | None],
    where: tuple[Environment, int | None],
    golden: Mapping[str, Tensor],
    loaded: dict[str, VariantRunner],
    skipped: dict[str, str],
) -> VariantRunner:
    here, device_memory = where
    for entry in order:
        if entry is None or entry.recipe.id in skipped:
            continue
        name = entry.recipe.id
        if name not in loaded:
            problem = unfit(manifest, entry, here) or _probe(folder, manifest, name, here)
            if not problem:
                try:
                    runner = _load(folder, manifest, entry, here.device, device_memory)
                    problem = _self_test(runner, entry, golden, here.device)
                except Exception as error:  # any engine may fail in any way; the next variant serves
                    problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if problem:
                skipped[name] = problem
                continue
            loaded[name] = runner
        return loaded[name]
    reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
    raise NoVariantError(
        f"no variant of {manifest.name} runs on {here.device}: {reasons}.",
        "Optimise the model again on this machine.",
    )


def _load(
    folder: Path, manifest: Manifest, entry: VariantEntry, device: str, device_memory: int | None = None
) -> VariantRunner:
    site = Site(manifest.spec, manifest.buckets, device, folder / SOURCE, device_memory)
    return load_variant(folder / entry.folder, entry.recipe, site)


def _self_test(runner: VariantRunner, entry: VariantEntry, golden: Mapping[str, Tensor], device: str) -> str:
    """What is wrong with a variant's golden answers, or nothing."""
    inputs = {k.removeprefix("in."): v.to(device) for k, v in golden.items() if k.startswith("in.")}
    outputs = runner(inputs)
    for name, ref in golden.items():
        if name.startswith("out."):
            error = compare(name, outputs[name.removeprefix("out.")], ref, "golden")
            if not error.relative_l2 <= entry.threshold.relative_l2:
                return (
                    f"its self-test failed: output '{name.removeprefix('out.')}' differs from the golden answer by "
                    f"{error.relative_l2:.2e}, allowed {entry.threshold.relative_l2:.0e}"
                )
    return ""


def unfit(manifest: Manifest, entry: VariantEntry, here: Environment) -> str:
    """Why a variant must not even be tried here, if so: other device, or code that would end the process."""
    made_for = manifest.environment.device.partition(":")[0]
    if made_for != here.device.partition(":")[0] and entry.recipe != ORIGINAL:
        return f"it was made for {made_for}, not for {here.device}"
    there = manifest.environment.device
    if made_for == "cuda" and "inductor" in (entry.recipe.backend, entry.recipe.mode) and there != here.device:
        return (
            f"its code names the card that it was made on, {there}, and this is {here.device}: "
            "let CUDA_VISIBLE_DEVICES give this card that number"
        )
    missing = set(manifest.environment.cpu_flags) - set(here.cpu_flags)
    if missing and entry.recipe.backend in _NATIVE_CODE and here.card is None:
        return f"it was made for a processor with {', '.join(sorted(missing))}, which this one lacks"
    return ""


def _probe(folder: Path, manifest: Manifest, recipe_id: str, here: Environment) -> str:
    """Where the machine or the software changed, first try a variant in a process that may crash."""
    changed = [d for d in differences(manifest.environment, here) if not d.startswith(_HARMLESS)]
    if not changed:
        return ""
    command = [sys.executable, "-m", "onecard.bundle.probe", str(folder), recipe_id, here.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"its trial run did not end within {_PROBE_LIMIT_S:.0f} s ({'; '.join(changed)})"
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return f"its trial run failed here ({'; '.join(changed)}): {last}"


def broken_variants(folder: Path, manifest: Manifest, broken: Mapping[str, str]) -> dict[str, str]:
    """Which variants damaged files rule out; raises where the damage cannot be worked around."""
    if GOLDEN in broken or GOLDEN not in manifest.files:
        raise BundleError(
            f"{folder / GOLDEN} {broken.get(GOLDEN, 'is not listed')}: the bundle cannot prove itself.",
            "Copy the bundle again or make it anew.",
        )
    skipped: dict[str, str] = {}
    for name, what in broken.items():
        for entry in manifest.variants:
            if name.startswith(entry.folder + "/") or (entry.needs_source and name.startswith(SOURCE + "/")):
                skipped.setdefault(entry.recipe.id, f"{name} {what}")
        if not name.startswith("variants/"):
            warnings.warn(f"{manifest.name}: {folder / name} {what}.", OnecardWarning, stacklevel=3)
    return skipped


def _golden(folder: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(folder / GOLDEN))
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{folder / GOLDEN} cannot be read: {error}.", "Copy the bundle again.") from error


def device_for(manifest: Manifest, wanted: str) -> str:
    """Where to run: what the user says, else the kind of device that the bundle was made for, if it is here."""
    if wanted == "auto" and manifest.environment.device == "cpu":
        return "cpu"
    return resolve_device(wanted)
