"""How many files the server's processes may have open: every connection is one."""

from __future__ import annotations

import errno
import resource

from onecard.server.http_types import LOGGER

_SHORT = (errno.EMFILE, errno.ENFILE)


def allow_open_files(wanted: int) -> None:
    """Raise the limit on open files of this process, and of those that it starts; warn if that does not go so far.

    Args:
        wanted: how many may have to be open at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        most = soft
    if most < wanted:
        LOGGER.warning(
            "--max-connections needs up to %d open files in each process, but %d are allowed: connections beyond that "
            "will fail. Raise the hard limit (ulimit -Hn, LimitNOFILE), or lower --max-connections.",
            wanted,
            most,
        )


def lacks_files(error: BaseException) -> bool:
    """Whether something failed because too many files were open, which may be over soon."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, OSError) and reason.errno in _SHORT:
            return True
        reason = reason.__cause__
    return False
