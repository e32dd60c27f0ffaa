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

import hashlib
import inspect
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from onecard.environment import Environment, fingerprint
from onecard.evidence import Compression, Measurement, Metric, OutputError, Timing, Verdict
from onecard.models.model import Model
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
    """What building a candidate came to."""

    verdict: Verdict
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    compression: tuple[Compression, ...] = ()


class RunResult(msgspec.Struct, frozen=True):
    """What loading, verifying and timing a candidate came to."""

    verdict: Verdict
    measurement: Measurement = Measurement()
    errors: tuple[OutputError, ...] = ()
    metric: Metric | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    limit_s: float = 0.0


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


def job_key(model: Model, job: Job, data_digest: str) -> str:
    """A digest of everything that the results depend on: weights, code, spec, versions, card, onecard itself.

    Never the name: two models of one name are two jobs.
    """
    digest = hashlib.sha256()
    for name, tensor in model.flat.inner.state_dict().items():
        if not hasattr(tensor, "untyped_storage"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_tensor_bytes(tensor))
    for path in sorted(model.files.values()):
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    digest.update(_code_of(model))
    asked = {name: getattr(job, name) for name in job.__struct_fields__ if name != "environment"}
    parts = [model.flat.plan, model.origin, asked, fingerprint(job.environment)]
    digest.update(msgspec.json.encode(parts, order="sorted"))
    digest.update(data_digest.encode())
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _tensor_bytes(tensor: Any) -> bytes:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).digest() if flat.numel() else b""


def _code_of(model: Model) -> bytes:
    """A digest of the source of every class the model is made of."""
    digest = hashlib.sha256()
    for kind in sorted({type(m) for m in model.flat.inner.modules()}, key=lambda k: (k.__module__, k.__qualname__)):
        digest.update(f"{kind.__module__}.{kind.__qualname__}".encode())
        try:
            digest.update(inspect.getsource(kind).encode())
        except (OSError, TypeError):  # defined at a prompt or generated: its graph stands in for its source
            code = getattr(kind.forward, "__code__", None)
            digest.update(code.co_code if code else b"")
    graph_code = getattr(model.flat.inner, "code", "")
    digest.update(str(graph_code).encode())
    return digest.digest()
