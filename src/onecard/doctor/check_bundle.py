"""Will a bundle run here, which variant will serve each of its sizes, and why not the others.

The reasons are those that opening the bundle would give. Without loading anything they are what can be seen from
outside: damaged files, another device, a processor that lacks instructions, a package that is not installed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onecard.doctor.finding import Finding
from onecard.errors import OnecardError
from onecard.spec import bucket_label

if TYPE_CHECKING:
    from onecard.bundle.manifest import Manifest, VariantEntry
    from onecard.environment import Environment

AREA = "bundle"

NEEDED = {
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "tensorrt"),
}
"""Backends whose variants need a package when they are loaded: the module's name, and onecard's extra."""

_LOAD_LIMIT_S = 180.0
_ANEW = "Optimise the model again on this machine."
_COPY = "Copy the bundle again or make it anew."


class Obstacle(NamedTuple):
    """Why a variant will not run here, and the cure."""

    why: str
    cure: str


def bundle_device(folder: Path, wanted: str) -> str:
    """Where a bundle would run: what the user says, or where it was made for.

    Returns:
        The device, or ``wanted`` where the bundle or the device is not there; the checks will say so.
    """
    from onecard.bundle.manifest import read_manifest
    from onecard.bundle.open import device_for

    try:
        return device_for(read_manifest(folder.absolute()), wanted)
    except OnecardError:
        return wanted


def check_bundle(folder: Path, device: str, *, load: bool = False) -> list[Finding]:
    """Look at a bundle with the eyes of a process that is about to open it.

    Args:
        folder: of the bundle.
        device: ``cpu`` or ``cuda:N``, a device that is here.
        load: load every variant, each in a process of its own that may crash, and compare its golden answers.
    """
    from onecard.bundle.manifest import read_manifest
    from onecard.environment import detect

    folder = folder.absolute()
    try:
        manifest = read_manifest(folder)
        here = detect(device)
        damaged, remarks = _damaged(folder, manifest)
    except OnecardError as error:
        return [Finding(AREA, "error", error.message, "It cannot be opened.", error.cure)]
    total = sum(entry.size for entry in manifest.files.values())
    found = [Finding(AREA, "ok", f"{manifest.name}: {len(manifest.variants)} variants, {total / 2**20:,.1f} MiB")]
    found += [Finding(AREA, "warning", text, "What it holds is not what was made.", _COPY) for text in remarks]
    found += _changed(manifest, here)
    obstacles = {name: Obstacle(why, _COPY) for name, why in damaged.items()}
    for entry in manifest.variants:
        obstacle = obstacles.get(entry.recipe.id) or _obstacle(manifest, entry, here)
        if obstacle is None and load:
            obstacle = _prove(folder, entry.recipe.id, device)
        if obstacle is not None:
            obstacles[entry.recipe.id] = obstacle
    return found + _served(manifest, obstacles, device, load) + _passed_over(manifest, obstacles)


def _damaged(folder: Path, manifest: Manifest) -> tuple[dict[str, str], list[str]]:
    """Which variants damaged files rule out, and what else is damaged."""
    from onecard.bundle.files import damaged, unlisted
    from onecard.bundle.manifest import SOURCE, VARIANTS
    from onecard.bundle.open import broken_variants

    broken = unlisted(folder, manifest.files, (SOURCE, VARIANTS)) | damaged(folder, manifest.files.items())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ruled_out = broken_variants(folder, manifest, broken)
    return ruled_out, [str(warning.message) for warning in said]


def _changed(manifest: Manifest, here: Environment) -> list[Finding]:
    """What is another than where the bundle was made."""
    from onecard.environment import differences

    changed = differences(manifest.environment, here)
    if not changed:
        return [Finding(AREA, "ok", "made on a machine like this one, with the same versions")]
    why = (
        "The figures in it were measured elsewhere; on opening, variants may first be tried in a process of their own."
    )
    return [Finding(AREA, "note", f"it was made elsewhere: {'; '.join(changed)}.", why, _ANEW)]


def _obstacle(manifest: Manifest, entry: VariantEntry, here: Environment) -> Obstacle | None:
    """What keeps a variant from running here, as far as can be seen without loading it."""
    from onecard.bundle.open import unfit

    reason = unfit(manifest, entry, here)
    if reason:
        return Obstacle(reason, _ANEW)
    module, extra = NEEDED.get(entry.recipe.backend, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        gpu = here.device != "cpu" and extra == "onnxruntime"
        return Obstacle(f"{module} is not installed", f"pip install 'onecard[{extra}{'-gpu' if gpu else ''}]'")
    return None


def _prove(folder: Path, recipe_id: str, device: str) -> Obstacle | None:
    """Load one variant in a process of its own and compare its golden answers."""
    command = [sys.executable, "-m", "onecard.bundle.probe", str(folder), recipe_id, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Obstacle(f"it was not loaded within {_LOAD_LIMIT_S:.0f} s", _ANEW)
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
    return Obstacle(f"it does not load: {last}", _ANEW)


def _served(manifest: Manifest, obstacles: Mapping[str, Obstacle], device: str, loaded: bool) -> list[Finding]:
    """Which variant serves each size."""
    found = []
    for bucket in manifest.buckets or ({},):
        area = bucket_label(bucket)
        rank = next((list(r.variants) for r in manifest.ranks if r.bucket == bucket), [])
        order = list(dict.fromkeys([*rank, *(v.recipe.id for v in manifest.variants)]))
        server = next((name for name in order if name not in obstacles), None)
        if server is None:
            what = f"no variant runs on {device}: " + "; ".join(f"{name}: {obstacles[name].why}" for name in order)
            found.append(
                Finding(
                    area,
                    "error",
                    f"{what}.",
                    "The bundle cannot be opened.",
                    obstacles[order[0]].cure if order else _ANEW,
                )
            )
        elif rank and server != rank[0]:
            what = f"{server} serves, not {rank[0]}, which was measured as the best: {obstacles[rank[0]].why}."
            found.append(Finding(area, "warning", what, "It is slower than it could be.", obstacles[rank[0]].cure))
        else:
            proved = "loads and answers rightly" if loaded else "serves, as far as can be seen without --load"
            found.append(Finding(area, "ok", f"{server} {proved}"))
    return found


def _passed_over(manifest: Manifest, obstacles: Mapping[str, Obstacle]) -> list[Finding]:
    """The other variants that do not run here; the best of each size have been named."""
    best = {rank.variants[0] for rank in manifest.ranks if rank.variants}
    return [
        Finding("variant", "note", f"{name}: {obstacle.why}.", "It cannot stand in for another.", obstacle.cure)
        for name, obstacle in obstacles.items()
        if name not in best
    ]
