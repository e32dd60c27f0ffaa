"""The folders of engines' sockets: what they are called, and removing those of servers that were killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from pathlib import Path

from onecard.ipc import packets

PREFIX = "onecard-engine-"
_LEFT_S = 3600.0  # a server that is just starting does not listen yet


def sweep(folder: Path) -> None:
    """Remove the sockets' folders that servers left there which were killed: old ones where nobody listens."""
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            about = left.lstat()
            old = time.time() - about.st_mtime > _LEFT_S
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and old and not _is_in_use(left):
                shutil.rmtree(left, ignore_errors=True)


def _is_in_use(folder: Path) -> bool:
    for path in folder.iterdir():
        with contextlib.suppress(ConnectionError), contextlib.closing(packets.connect(path)):
            return True
    return False
