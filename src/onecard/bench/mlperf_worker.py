"""The process in which LoadGen runs: it is given one job over a connection, says how far it is, and ends.

``python -m onecard.bench.mlperf_worker FD``, where FD is a connection of :mod:`multiprocessing` that was inherited.
Whoever started it may kill it at any time; when that one dies, it ends by itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

from onecard.bench.mlperf_job import CRASH_LOG, Failure, Message, MlperfJob, Note
from onecard.errors import EngineError, OnecardError


class _Line:
    """The connection to the parent, which several threads speak into."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, message: Message) -> None:
        with self._lock, contextlib.suppress(OSError):  # the parent is gone: the other thread ends this process
            self._connection.send(message)

    def end_with_parent(self) -> None:
        """Wait for the parent's end, which never sends a second thing; LoadGen may hold the main thread for minutes."""
        with contextlib.suppress(EOFError, OSError):
            self._connection.recv()
        os._exit(1)


def main(descriptor: int) -> None:
    """Do one job."""
    connection: Connection[Any, Any] = Connection(descriptor)
    job: MlperfJob = connection.recv()
    line = _Line(connection)
    threading.Thread(target=line.end_with_parent, daemon=True).start()

    def note(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if category.__module__.startswith("onecard"):  # those of other libraries are not the user's
            line.say(Note(str(message)))

    def fail(error: BaseException) -> None:
        line.say(_failure(error, job))

    warnings.showwarning = note
    try:
        from onecard.bench.mlperf_run import run

        line.say(run(job, line.say, fail))
    except Exception as error:
        fail(error)


def _failure(error: BaseException, job: MlperfJob) -> Failure:
    """An error as the parent can raise it; one that nobody foresaw leaves its traceback in the folder."""
    if isinstance(error, OnecardError):
        return Failure(type(error).__name__, error.message, error.cure)
    path = job.output / CRASH_LOG
    with contextlib.suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)), "utf-8")
    return Failure(EngineError.__name__, f"the run failed with {type(error).__name__}: {error}.", f"See {path}.")


if __name__ == "__main__":
    main(int(sys.argv[1]))
