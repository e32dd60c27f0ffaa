"""Output for programs: standard output is kept for one JSON document alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def user_code_on_stderr(json: bool) -> Iterator[None]:
    """Where standard output is to be JSON: keep off it what a user's model, run in this process, prints there.

    The file descriptor is turned, for native code writes to it too.

    Args:
        json: whether it is; otherwise nothing is done.
    """
    if not json:
        yield
        return
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)
