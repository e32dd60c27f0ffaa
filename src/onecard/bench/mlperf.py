"""MLPerf's LoadGen on a bundle: :func:`run_mlperf` runs it in a process of its own and reads what it found.

LoadGen cannot be interrupted, so Ctrl-C kills its process. A result is written when LoadGen is done, in one piece.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from onecard import errors
from onecard.bench.mlperf_job import (
    RESULT,
    Failure,
    Finished,
    Message,
    MlperfJob,
    MlperfProgress,
    MlperfSettings,
    Note,
)
from onecard.bench.mlperf_summary import MlperfSummary, read_summary
from onecard.environment import Environment
from onecard.errors import (
    EngineError,
    InterruptedSearch,
    MissingDependencyError,
    OnecardError,
    StorageError,
    UsageError,
)
from onecard.evidence import to_json

Observe = Callable[[MlperfProgress | Note], None]

_END_S = 30.0


@dataclass(frozen=True)
class MlperfResult:
    """One run that came to its end.

    Args:
        command: that started it.
        bundle: its folder's name.
        data: where the samples came from.
        samples: how many there were.
        settings: as they were asked for; what LoadGen used is in the summary.
        environment: where it ran.
        summary: what LoadGen found.
        metric: in the accuracy mode, else empty.
        score: its value over all samples, else None.
    """

    command: str
    bundle: str
    data: str
    samples: int
    settings: MlperfSettings
    environment: Environment
    summary: MlperfSummary
    metric: str = ""
    score: float | None = None


def run_mlperf(job: MlperfJob, observe: Observe = lambda message: None) -> MlperfResult:
    """Run one test.

    Args:
        job: see :class:`MlperfJob`. Its folder is made; an earlier run's files in it go when LoadGen begins.
        observe: told how far it is, and what else the user should know.

    Returns:
        What was found; it is in the folder as well, as ``mlperf.json``, beside LoadGen's own files.

    Raises:
        MissingDependencyError: LoadGen's package is not installed.
        BundleError: the bundle is damaged.
        NoVariantError: no variant of it runs here and answers rightly.
        DataError: the data cannot be read, does not fit the model, or lacks labels.
        UsageError: the model takes no single rows, or there is no such metric.
        EngineError: a request failed, or LoadGen's process ended before it was done.
        StorageError: the folder cannot be written.
        InterruptedSearch: stopped with Ctrl-C; LoadGen's logs so far are in the folder.
    """
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise MissingDependencyError(
            "MLPerf's LoadGen is not installed.", "Install it with: pip install 'onecard[mlperf]'"
        )
    if not job.bundle.is_dir():
        raise UsageError(f"there is no folder {job.bundle}.", "Pass one that 'onecard optimize' wrote.")
    _make_folder(job.output)
    try:
        with _worker(job) as (process, connection):
            finished = _listen(process, connection, observe)
    except KeyboardInterrupt:
        raise InterruptedSearch(
            "stopped; no result was written.", f"LoadGen's logs so far are in {job.output}; run it again for a result."
        ) from None
    result = _result(job, finished)
    _write(job.output / RESULT, to_json(result))
    return result


@contextlib.contextmanager
def _worker(job: MlperfJob) -> Iterator[tuple[subprocess.Popen[bytes], Connection[Any, Any]]]:
    """LoadGen's process, with its job. It is in a session of its own, and nothing of it is left afterwards."""
    ours, theirs = multiprocessing.Pipe()
    descriptor = theirs.fileno()
    command = [sys.executable, "-m", "onecard.bench.mlperf_worker", str(descriptor)]
    with ours:
        with theirs:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[descriptor], start_new_session=True
            )
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended at once, which is noticed when it is listened to
                ours.send(job)
            yield process, ours
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _listen(process: subprocess.Popen[bytes], connection: Connection[Any, Any], observe: Observe) -> Finished:
    """Wait for the end of the run, and pass on what is said meanwhile."""
    while True:
        try:
            message: Message = connection.recv()
        except (EOFError, OSError):
            code = process.wait(_END_S)
            how = f"exit status {code}" if code >= 0 else f"signal {-code}"
            raise EngineError(f"LoadGen's process ended before the run was over: {how}.") from None
        if isinstance(message, Finished):
            return message
        if isinstance(message, Failure):
            kind: type[OnecardError] = getattr(errors, message.kind, EngineError)
            raise kind(message.message, message.cure)
        observe(message)


def _result(job: MlperfJob, finished: Finished) -> MlperfResult:
    return MlperfResult(
        command=job.command,
        bundle=job.bundle.absolute().name,
        data=job.data,
        samples=finished.samples,
        settings=job.settings,
        environment=finished.environment,
        summary=read_summary(job.output, job.settings),
        metric=job.metric if finished.score is not None else "",
        score=finished.score,
    )


def _make_folder(folder: Path) -> None:
    """Make the folder, and see that it can be written: LoadGen says nothing where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"{folder} cannot be used: {error.strerror}.", "Choose another folder with -o.") from error


def _write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    aside = path.with_name(f".{path.name}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror}.", "Choose another folder with -o.") from error
