"""The folder in which a plan's workers find the original, and which is gone when the plan is made."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onecard import host
from onecard.cache.contents import is_working_in
from onecard.cache.use import in_use, renew
from onecard.errors import StorageError
from onecard.memory.measure import Meter
from onecard.search import bytecode

if TYPE_CHECKING:
    from onecard.memory.plan import PlanOptions
    from onecard.memory.subject import Subject


class Workplace(NamedTuple):
    """A meter, and for a model the folder with its original."""

    meter: Meter
    source: Path | None


@contextlib.contextmanager
def workplace(subject: Subject, options: PlanOptions, observe: Callable[[str], None]) -> Iterator[Workplace]:
    """What measuring needs, for the time of one plan.

    Raises:
        StorageError: the cache folder cannot be written, or its disk is full.
    """
    root = host.cache_folder() / "plans"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
    except OSError as error:
        raise _storage(root, error) from error
    try:
        renew(host.cache_folder() / bytecode.folder_name())  # its reading leaves no trace
        with in_use(folder):
            yield Workplace(Meter(folder, options.time_limit_s, _staged(observe)), _save(subject, folder, observe))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(subject: Subject, folder: Path, observe: Callable[[str], None]) -> Path | None:
    if subject.model is None:
        return None
    from onecard.models.source import save_source

    observe("saving the original for the workers")
    try:
        save_source(subject.model, folder / "source", live=True)
    except OSError as error:
        raise _storage(folder, error) from error
    return folder / "source"


def _sweep(root: Path) -> None:
    """Remove what plans left that were killed."""
    for folder in root.iterdir():
        pid = folder.name.partition("-")[0]
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if pid.isdigit() and not is_working_in("plan", folder, folder.stat().st_mtime):
                shutil.rmtree(folder, ignore_errors=True)


def _staged(observe: Callable[[str], None]) -> Callable[[str], None]:
    return lambda stage: observe(f"the worker is {stage or 'starting'}")


def _storage(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder} cannot be written: {error.strerror or error}.",
        "Free some space or set ONECARD_CACHE to another folder.",
    )
