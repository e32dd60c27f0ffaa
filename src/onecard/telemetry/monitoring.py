"""Files for Prometheus and Grafana, written out: what to scrape, alert rules, dashboards, and how to start both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from onecard.errors import StorageError, UsageError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

TARGETS = "targets.yml"
_SERVER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")


def monitoring_files() -> dict[str, bytes]:
    """The files by relative path, as they come."""
    return dict(_read(resources.files("onecard.telemetry") / "data", ""))


def write_monitoring(folder: Path, servers: Sequence[str] = (), force: bool = False) -> list[Path]:
    """Write the files into a folder.

    Args:
        folder: made if need be.
        servers: ``HOST:PORT`` of those to watch; none for the default address on this machine.
        force: also over files that somebody changed.

    Returns:
        The files.

    Raises:
        UsageError: a server that is no ``HOST:PORT``, or a file that is there with other content.
        StorageError: the folder cannot be written.
    """
    files = monitoring_files()
    if servers:
        files[TARGETS] = _targets(servers, files[TARGETS].decode())
    paths = {folder / name: content for name, content in files.items()}
    try:
        changed = [path for path, content in paths.items() if path.exists() and path.read_bytes() != content]
        if changed and not force:
            raise UsageError(
                f"{changed[0]} is there and differs.", "Name another folder, or say --force to replace it."
            )
        for path, content in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise StorageError(f"{error.filename or folder} cannot be written: {error.strerror}.") from error
    return sorted(paths)


def _read(place: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in place.iterdir():
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        else:
            found.append((f"{prefix}{entry.name}", entry.read_bytes()))
    return found


def _targets(servers: Sequence[str], template: str) -> bytes:
    """The file of targets, with its remark."""
    wrong = next((server for server in servers if not _SERVER.fullmatch(server)), None)
    if wrong is not None:
        raise UsageError(f"'{wrong}' is not HOST:PORT.", "Name each server like 127.0.0.1:8000.")
    remark = template.splitlines()[0]
    return "\n".join([remark, "- targets:", *(f'    - "{server}"' for server in servers), ""]).encode()
