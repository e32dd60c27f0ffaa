"""A search's folder: what the workers read, and what they leave behind.

    <job>/job.json                      the question: spec, buckets, device, thresholds, effort
    <job>/notes.json                    what loading and saving the original had to say
    <job>/source/                       the original
    <job>/data.safetensors              rows of the user's data, if any
    <job>/calibration.safetensors       rows to calibrate on, if other than those
    <job>/alternatives/                 pruned.pt2, qat.pt2: programs in the original's place, if any
    <job>/reference/                    the original's answers
    <job>/candidates/<recipe>/variant/  the artifacts, as they will ship
    <job>/candidates/<recipe>/build.json, result.json, log.txt, stage
    <job>/playoff.json

Every file of results is renamed into place, so that its presence means that it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from onecard.environment import Environment
from onecard.evidence import Compression, Measurement, Metric, OutputError, Timing, Verdict
from onecard.recipe import Recipe
from onecard.spec import Bucket, Spec
from onecard.verify.compare import Threshold

T = TypeVar("T")


class EffortSpec(msgspec.Struct, frozen=True):
    """The seconds to spend on one bucket of one variant; see :class:`onecard.measure.timer.Effort`."""

    warmup_s: float = 1.5
    latency_s: float = 1.0
    period_s: float = 0.5
    playoff_rounds: int = 5


class Job(msgspec.Struct, frozen=True):
    """What a search asks of every candidate."""

    name: str
    spec: Spec
    buckets: tuple[Bucket, ...]
    device: str
    environment: Environment
    thresholds: dict[str, Threshold]
    effort: EffortSpec = EffortSpec()
    metric: str = ""
    max_drop: float = 0.01
    device_memory: int | None = None


class BuildResult(msgspec.Struct, frozen=True):
    """What building a candidate came to; ``passing`` if another search should not rely on it."""

    verdict: Verdict
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    compression: tuple[Compression, ...] = ()
    passing: bool = False


class RunResult(msgspec.Struct, frozen=True):
    """What loading, verifying and timing a candidate came to; ``passing`` as for a build."""

    verdict: Verdict
    measurement: Measurement = Measurement()
    errors: tuple[OutputError, ...] = ()
    metric: Metric | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    limit_s: float = 0.0
    passing: bool = False


class PlayoffResult(msgspec.Struct, frozen=True):
    """Interleaved timings of the finalists, and those that could not take part."""

    timings: dict[str, tuple[Timing, ...]]
    absent: dict[str, str] = {}


class JobFolder:
    """Paths inside a job's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.job = root / "job.json"
        self.source = root / "source"
        self.notes = root / "notes.json"
        self.data = root / "data.safetensors"
        self.calibration = root / "calibration.safetensors"
        self.alternatives = root / "alternatives"
        self.reference = root / "reference"
        self.playoff = root / "playoff.json"

    def candidate(self, recipe: Recipe) -> CandidateFolder:
        return CandidateFolder(self.root / "candidates" / recipe.id)

    def read_job(self) -> Job:
        return read(self.job, Job)


class CandidateFolder:
    """Paths of one candidate."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.variant = root / "variant"
        self.build = root / "build.json"
        self.result = root / "result.json"
        self.log = root / "log.txt"
        self.stage = root / "stage"


def read(path: Path, kind: type[T]) -> T:
    """Read one of the JSON files of a job."""
    return msgspec.json.decode(path.read_bytes(), type=kind)


def write(path: Path, value: Any) -> None:
    """Write one of the JSON files of a job, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(value))
    temporary.replace(path)


def forget_passing(folder: JobFolder, recipes: Iterable[Recipe]) -> None:
    """Drop results of an earlier search that may not hold any more: something is installed now, or freed.

    Args:
        folder: the job's folder; it need not be there.
        recipes: whose results to look at.
    """
    for recipe in recipes:
        place = folder.candidate(recipe)
        found: list[tuple[Path, BuildResult | RunResult]] = []
        found += [(place.build, read(place.build, BuildResult))] if place.build.exists() else []
        found += [(place.result, read(place.result, RunResult))] if place.result.exists() else []
        for path, result in found:
            if result.passing or result.verdict.reason == "unavailable":
                path.unlink()
