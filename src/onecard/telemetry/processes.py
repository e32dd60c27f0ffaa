"""What the server's own processes use of the machine."""

from __future__ import annotations

import psutil

from onecard.telemetry.snapshot import ProcessFigures


def read_process(role: str, pid: int | None = None) -> ProcessFigures | None:
    """Some tenths of a millisecond.

    Args:
        role: what to call it: ``front``, ``engine``.
        pid: of the process; None for this one.

    Returns:
        None where there is no such process, or its figures may not be read.
    """
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            return ProcessFigures(
                role=role,
                started_s=process.create_time(),
                cpu_s=times.user + times.system,
                resident_bytes=process.memory_info().rss,
                threads=process.num_threads(),
                open_files=process.num_fds(),
            )
    except (psutil.Error, OSError):
        return None
