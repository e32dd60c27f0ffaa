"""Measuring sizes one after the other, each in a process of its own: a crash or a lack of memory is a row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from onecard import host
from onecard.evidence import Verdict
from onecard.memory.figures import Measured
from onecard.recipe import Recipe
from onecard.search.processes import Supervisor, Task, tail, verdict_of_exit
from onecard.spec import Bucket, Spec, bucket_label

_MACHINE_SHARE = 0.9  # of main memory; beyond it the worker is ended before the kernel ends something else


class Job(msgspec.Struct, frozen=True):
    """What one worker is to measure.

    Args:
        folder: of the original's source, or of the bundle.
        spec: inputs, outputs and symbols.
        bucket: the size to run.
        device: ``cpu`` or ``cuda:N``.
        result: the file for the outcome.
        stage: the file in which the worker says what it is doing.
        precision: of the original.
        limit_bytes: what the device's allocator, or on a CPU a variant that streams, may take; 0 for no limit.
        recipe: the bundle's variant to run, or None for the original.
        buckets: the sizes that the bundle was made for.
    """

    folder: str
    spec: Spec
    bucket: Bucket
    device: str
    result: str = ""
    stage: str = ""
    precision: str = "fp32"
    limit_bytes: int = 0
    recipe: Recipe | None = None
    buckets: tuple[Bucket, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    """What a worker leaves behind."""

    verdict: Verdict
    measured: Measured | None = None


@dataclass(frozen=True)
class _MeasuringTask(Task):
    """A task that runs this package's worker."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "onecard.memory.worker", *self.arguments]


class Meter:
    """Runs one worker at a time.

    Args:
        work: a folder for jobs, results and logs.
        limit_s: how long one size may take.
        watch: told what the worker is doing, several times a second.
    """

    def __init__(self, work: Path, limit_s: float, watch: Callable[[str], None]) -> None:
        self._work = work
        self._limit_s = limit_s
        self._watch = watch
        self._count = 0

    def measure(self, job: Job) -> Outcome:
        """Measure one size; whatever goes wrong is the outcome's verdict."""
        self._count += 1
        place = self._work / f"{self._count}-{bucket_label(job.bucket)}"
        place.mkdir(parents=True)
        job = msgspec.structs.replace(job, result=str(place / "result.json"), stage=str(place / "stage"))
        (place / "job.json").write_bytes(msgspec.json.encode(job))
        task = _MeasuringTask(
            bucket_label(job.bucket), (str(place / "job.json"),), place / "log.txt", self._limit_s, place / "stage"
        )
        supervisor = Supervisor(int(host.usable_memory() * _MACHINE_SHARE))
        try:
            item = supervisor.start(task)
            while not supervisor.wait():
                self._watch(item.stage)
        finally:
            supervisor.kill_all()
        if Path(job.result).is_file():
            return msgspec.json.decode(Path(job.result).read_bytes(), type=Outcome)
        return Outcome(_explained(verdict_of_exit(item), task.log))


def _explained(verdict: Verdict, log: Path) -> Verdict:
    """A verdict of the supervisor with the options of this command, and the log's last line as it will be gone."""
    if verdict.reason == "timeout":
        return msgspec.structs.replace(verdict, cure="Raise --time-limit.")
    if verdict.reason != "crashed":
        return verdict
    lines = [line.strip() for line in tail(log).splitlines() if line.strip() and not line.startswith("$ ")]
    detail = f"{verdict.detail}: {lines[-1]}" if lines else verdict.detail
    cure = verdict.cure.replace("; other candidates are not affected", "")
    cure = cure.replace("See the log.", "Run the model by itself to see the whole error.")
    return Verdict("crashed", detail, cure)
