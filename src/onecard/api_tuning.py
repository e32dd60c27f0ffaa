"""The Python face of tuning: :func:`tune` measures a bundle behind the engine and writes into it what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onecard.bundle.manifest import Manifest
    from onecard.runtime.served import Served
    from onecard.runtime.tune import TuneOptions, TunePlan, TuneProgress
    from onecard.tuning import Tuning


def tune(
    bundle: str | Path,
    *,
    device: str = "auto",
    options: TuneOptions | None = None,
    observe: Callable[[TuneProgress], None] | None = None,
    command: str = "",
) -> Tuning:
    """Find by measuring how to run a bundle, and write it into the bundle and its report.

    Args:
        bundle: its folder; it is exchanged for one with the tuning at the very end.
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        options: what to measure; see :class:`onecard.runtime.tune.TuneOptions`.
        observe: told how far it is.
        command: to be recorded.

    Returns:
        What was found. :func:`onecard.runtime.tune.tuned_options` makes an engine's options of it.

    Raises:
        UsageError: options that do not fit the model.
        BundleError: the bundle is damaged, or was replaced meanwhile.
        NoVariantError: no variant of it runs here and answers rightly.
        EngineError: no batch size could be measured.
        StorageError: the bundle cannot be written, or the disk is full.
        InterruptedSearch: stopped with Ctrl-C; the bundle is as it was.
    """
    from onecard.bundle.manifest import read_manifest
    from onecard.bundle.write import check_writable
    from onecard.errors import InterruptedSearch
    from onecard.runtime import tune as measuring

    folder = Path(bundle).resolve()
    manifest = read_manifest(folder)
    check_writable(folder)
    try:
        found = measuring.tune(_opener(folder, device), options, observe or (lambda progress: None), command)
    except KeyboardInterrupt:
        raise InterruptedSearch(
            f"stopped; {folder.name} is as it was.", "What was measured so far is not kept: a tuning is run in one go."
        ) from None
    _write(folder, manifest, found)
    return found


def plan_tuning(bundle: str | Path, *, device: str = "auto", options: TuneOptions | None = None) -> TunePlan:
    """What :func:`tune` would measure, and about how long it would take; arguments and errors are its."""
    from onecard.runtime.tune import TuneOptions, make_plan

    model = _opener(Path(bundle).resolve(), device)()
    try:
        return make_plan(model, options or TuneOptions())
    finally:
        model.close()


def _opener(folder: Path, device: str) -> Callable[[], Served]:
    """Opens one more of a bundle's model; its files are compared with their digests the first time."""
    from onecard.runtime.served import BundleModel

    opened = 0

    def open_model() -> Served:
        nonlocal opened
        model = BundleModel.open(folder, device, check_files=not opened)
        opened += 1
        return model

    return open_model


def _write(folder: Path, manifest: Manifest, found: Tuning) -> None:
    """The tuning and, where the bundle carries its evidence, a report with it."""
    from onecard.bundle.amend import amend
    from onecard.bundle.evidence_file import read_evidence
    from onecard.bundle.manifest import REPORT
    from onecard.bundle.tuning_file import TUNING
    from onecard.errors import BundleError
    from onecard.report.html import render
    from onecard.tuning import tuning_to_bytes

    changes = {TUNING: tuning_to_bytes(found)}
    with contextlib.suppress(BundleError):  # evidence that is damaged or was left out is no reason to lose the tuning
        changes[REPORT] = render(read_evidence(folder), folder.name, found).encode("utf-8", "replace")
    amend(folder, changes, manifest)
