"""Worker processes under supervision: a time limit, a memory limit, and a reason for every end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from onecard.evidence import Verdict
from onecard.host import cache_folder
from onecard.search import bytecode

_POLL_S = 0.1
PARENT = "ONECARD_WORKER_PARENT"
_PR_SET_PDEATHSIG = 1
ON_CALL = "ONECARD_WORKER_ON_CALL"
_LOG_TAIL = 4000
_SIGNAL_CURES = {
    "SIGSEGV": "The engine itself crashed on this model; other candidates are not affected. Try its newest version.",
    "SIGILL": "The engine used an instruction that this processor lacks; install a build for it.",
    "SIGKILL": "Something outside onecard killed it, most often the kernel for lack of memory; free some.",
    "SIGABRT": "The engine gave up; the log says why.",
}
_SIGNALS_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


@dataclass(frozen=True)
class Task:
    """One worker process to run.

    Args:
        name: of the candidate.
        arguments: the worker's role and what follows.
        log: where its output is appended.
        limit_s: how long it may take, counted from :meth:`Supervisor.call` for one that is on call.
        stage: a file in which it says what it is doing.
        threads: compiler processes it may use, 0 for all cores.
        on_call: start it now, so that it imports what it needs, but let it wait for :meth:`Supervisor.call`.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    limit_s: float
    stage: Path | None = None
    threads: int = 0
    on_call: bool = False

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "onecard.search.worker", *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        added = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", PARENT: str(os.getpid())}
        if self.threads:
            added["TORCHINDUCTOR_COMPILE_THREADS"] = str(self.threads)
        if self.on_call:
            added[ON_CALL] = "1"
        folder = cache_folder() / bytecode.folder_name()
        return bytecode.keeping_bytecode({**os.environ, **added}, bytecode.torch_source(), folder)


@dataclass
class Running:
    """A task under way."""

    task: Task
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    verdict: Verdict | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def stage(self) -> str:
        """What the worker says it is doing."""
        if self.task.stage is None:
            return ""
        with contextlib.suppress(OSError):
            return self.task.stage.read_text()
        return ""


class Supervisor:
    """Runs tasks, as many at a time as it is asked to start, and kills what breaks its limits.

    Args:
        memory_bytes: what one worker with its children may hold before it is taken for out of memory.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.running: list[Running] = []
        self.waiting: list[Running] = []

    def start(self, task: Task) -> Running:
        """Start a worker in a process group of its own, its output going to the task's log."""
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            log.write(f"$ {' '.join(task.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                task.command,
                stdin=subprocess.PIPE if task.on_call else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=task.environment,
                start_new_session=True,
            )
        item = Running(task, process)
        (self.waiting if task.on_call else self.running).append(item)
        return item

    def call(self, item: Running) -> None:
        """Let a worker that is on call begin; its time counts from now."""
        self.waiting.remove(item)
        item.started = time.monotonic()
        if item.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                item.process.stdin.write(b"go\n")
                item.process.stdin.close()
        self.running.append(item)

    def wait(self) -> list[Running]:
        """Wait one polling interval, enforce the limits, and return what has ended since."""
        time.sleep(_POLL_S)
        ended = []
        for item in list(self.running):
            if item.process.poll() is None:
                self._enforce(item)
            if item.process.poll() is not None:
                self.running.remove(item)
                ended.append(item)
        return ended

    def kill_all(self) -> None:
        """End every worker and its children at once."""
        for item in (*self.running, *self.waiting):
            _kill(item.process)
        self.running.clear()
        self.waiting.clear()

    def _enforce(self, item: Running) -> None:
        if item.seconds > item.task.limit_s:
            detail = f"it did not end within {item.task.limit_s:.0f} s (while {item.stage or 'starting'})"
            item.verdict = Verdict("timeout", detail, "Raise --candidate-time-limit.")
        elif (held := _held_bytes(item.process.pid)) > self.memory_bytes:
            item.verdict = Verdict(
                "out_of_memory",
                f"it held {held / 2**30:.1f} GiB of main memory, the limit is {self.memory_bytes / 2**30:.1f} GiB",
                "Use smaller buckets (--batch) or a machine with more memory.",
            )
        if item.verdict is not None:
            _kill(item.process)


def verdict_of_exit(item: Running) -> Verdict:
    """Why a process ended that left no result of its own."""
    if item.verdict is not None:
        return item.verdict
    code = item.process.returncode
    if code < 0:
        name = _signal_name(-code)
        stage = f" while {item.stage}" if item.stage else ""
        return Verdict("crashed", f"killed by {name}{stage}", _SIGNAL_CURES.get(name, "See the log."))
    return Verdict("crashed", f"it ended with exit code {code} and no result", "See the log.")


def is_passing(item: Running) -> bool:
    """Whether a process that left no result was ended from outside, or for memory that others may have held.

    A crash of its own, and a time limit, would most likely come again.
    """
    if item.verdict is not None:
        return item.verdict.reason == "out_of_memory"
    return _signal_name(-item.process.returncode) in _SIGNALS_FROM_OUTSIDE


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        return signal.Signals(number).name
    return f"signal {number}"


def tail(log: Path) -> str:
    """The end of a log, for the report; the whole log stays in the job's folder."""
    with contextlib.suppress(OSError):
        return log.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
    return ""


def _held_bytes(pid: int) -> int:
    """Memory of a process and its children that nobody else holds (0 once it is gone)."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = member.memory_info()
                total += memory.rss - getattr(memory, "shared", 0)
    return total


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def die_with_parent() -> None:
    """In a worker: ask Linux to kill this process when its starter dies, so that kill -9 leaves nothing running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            sys.exit(1)  # it died before it could be asked for
