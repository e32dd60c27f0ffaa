"""Where workers keep Python's bytecode, if there is none beside the installed packages."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

_PREFIX = "PYTHONPYCACHEPREFIX"
_WRITES_NONE = "PYTHONDONTWRITEBYTECODE"


@functools.cache
def folder_name() -> str:
    """Of the folder in onecard's cache; one for each torch, since images may give all versions' files one time."""
    try:
        return f"pycache-torch-{metadata.version('torch')}"
    except metadata.PackageNotFoundError:  # built in place
        return "pycache"


@functools.cache
def torch_source() -> Path | None:
    """The file that ``import torch`` runs first, found without importing it; None where there is no torch."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin) if spec is not None and spec.origin else None


def keeping_bytecode(environment: Mapping[str, str], source: Path | None, folder: Path) -> dict[str, str]:
    """An environment in which the processes of a search compile each Python file once between them.

    A read-only installation, or one made without bytecode, makes every process compile all of torch anew, which takes
    longer than many a measurement.

    Args:
        environment: of a worker to be; its own ``PYTHONPYCACHEPREFIX`` stays.
        source: a file of the installation, whose bytecode tells of all the others.
        folder: where to keep the bytecode if there is none beside ``source``; made if it is missing. Since bytecode is
            run without another look, the folder must be the user's own, and closed to everybody else.

    Returns:
        The environment; unchanged where bytecode exists, or where the folder cannot be had.
    """
    found = dict(environment)
    if found.get(_PREFIX) or source is None or Path(importlib.util.cache_from_source(str(source))).exists():
        return found
    if _is_private(folder):
        found[_PREFIX] = str(folder.absolute())
        found.pop(_WRITES_NONE, None)
    return found


def _is_private(folder: Path) -> bool:
    """Whether a folder, made if it is missing, is a real one that nobody but this user may enter."""
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        about = folder.lstat()
        return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
    return False
