"""What was found out about a candidate: verdict, errors, timings, memory. Raw numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from onecard.environment import Environment
from onecard.recipe import Recipe
from onecard.spec import Bucket, Spec, bucket_label

Reason = Literal[
    "ok",
    "wrong",
    "slower",
    "crashed",
    "timeout",
    "out_of_memory",
    "unavailable",
    "unsupported",
    "skipped",
]


class Verdict(msgspec.Struct, frozen=True):
    """``ok``, or the one reason why not, with what happened and what would cure it."""

    reason: Reason
    detail: str = ""
    cure: str = ""

    @property
    def ok(self) -> bool:
        return self.reason == "ok"


INCOMPARABLE = 1e300
"""The error of an answer that cannot be compared (wrong shape, NaN in other places); JSON knows no infinity."""


class OutputError(msgspec.Struct, frozen=True):
    """How far one output is from the fp32 original's, at the worst of the cases it was tried on.

    ``relative_l2`` is ‖out - ref‖ / ‖ref‖, ``max_abs`` the largest difference, ``cosine`` that of the two
    flattened tensors, ``top1_agreement`` the share of rows with the same largest element (None where
    the output does not look like logits).
    """

    output: str
    relative_l2: float
    cosine: float
    max_abs: float
    top1_agreement: float | None
    case: str


class CardState(msgspec.Struct, frozen=True):
    """The card's own readings at one moment; what it does not report is None."""

    temperature_c: float | None = None
    power_w: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    utilisation: float | None = None
    throttle: tuple[str, ...] = ()


class Timing(msgspec.Struct, frozen=True):
    """Raw samples of one variant at one bucket.

    Args:
        bucket: the sizes that were timed.
        samples_ms: one call each, host clock, from the call to the answer being complete.
        period_ms: one block of back-to-back calls each, divided by the number of calls.
        device_ms: the same calls by CUDA events (empty on a CPU).
        rows: rows of the batch answered by one call (1 if there is no batch symbol).
        first_call_ms: the very first call at this bucket in a new process.
        before: the card before the samples; after: behind them.
    """

    bucket: Bucket
    samples_ms: tuple[float, ...]
    period_ms: tuple[float, ...] = ()
    device_ms: tuple[float, ...] = ()
    rows: int = 1
    first_call_ms: float = 0.0
    before: CardState = CardState()
    after: CardState = CardState()

    @property
    def label(self) -> str:
        return bucket_label(self.bucket)

    @property
    def median_ms(self) -> float:
        return quantile(self.samples_ms, 0.5)

    @property
    def p99_ms(self) -> float:
        return quantile(self.samples_ms, 0.99)

    @property
    def iqr_ms(self) -> float:
        return quantile(self.samples_ms, 0.75) - quantile(self.samples_ms, 0.25)

    @property
    def throughput(self) -> float:
        """Rows a second with calls back to back."""
        per_call = quantile(self.period_ms, 0.5) if self.period_ms else self.median_ms
        return 1000.0 * self.rows / per_call


class Measurement(msgspec.Struct, frozen=True):
    """Everything measured about one variant, in one process that only loaded and ran it.

    Memory is in bytes: ``peak_device_bytes`` is the allocator's peak while running (0 on a CPU),
    ``peak_process_bytes`` the highest resident set, ``size_bytes`` the files that the variant needs.
    """

    timings: tuple[Timing, ...] = ()
    build_s: float = 0.0
    load_s: float = 0.0
    peak_device_bytes: int = 0
    peak_process_bytes: int = 0
    size_bytes: int = 0

    def timing(self, bucket: Bucket) -> Timing | None:
        return next((t for t in self.timings if t.bucket == bucket), None)

    @property
    def peak_bytes(self) -> int:
        """The scarcer memory's peak: the device's if it was used, else the process's."""
        return self.peak_device_bytes or self.peak_process_bytes


class Metric(msgspec.Struct, frozen=True):
    """The task's own metric on labelled data; higher is better."""

    name: str
    value: float
    original: float
    samples: int

    @property
    def drop(self) -> float:
        return self.original - self.value


class LayerError(msgspec.Struct, frozen=True):
    """How far the model's answer moves (relative L2) when this one layer alone is compressed."""

    layer: str
    error: float


class Trial(msgspec.Struct, frozen=True):
    """One attempt at compressing: a calibration method, and the layers kept in higher precision.

    ``error`` is the relative L2 of the answers against the original's on the judged rows, ``metric`` the
    task's figure on labelled data, or None.
    """

    method: str
    kept: tuple[str, ...] = ()
    error: float = 0.0
    metric: float | None = None
    passed: bool = False


class Compression(msgspec.Struct, frozen=True):
    """What compressing a model came to: every trial, and the one that stands.

    Args:
        scheme: the transform's name (``int8``, ``fp8`` ...).
        layers: how many layers could be compressed.
        method: the calibration method that was chosen, or empty where there is nothing to choose.
        kept: the layers left in higher precision.
        trials: all attempts in their order.
        sensitivity: the layers by the error they cause alone, worst first; empty if no layer had to be kept.
        rows: calibration rows used; 0 where none are needed.
        notes: what else the user should know.
    """

    scheme: str
    layers: int
    method: str = ""
    kept: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    sensitivity: tuple[LayerError, ...] = ()
    rows: int = 0
    notes: tuple[str, ...] = ()


class Candidate(msgspec.Struct, frozen=True):
    """One recipe and all that was found out about it: a row of the report."""

    recipe: Recipe
    verdict: Verdict
    measurement: Measurement = Measurement()
    errors: tuple[OutputError, ...] = ()
    metric: Metric | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    command: str = ""
    log: str = ""
    compression: tuple[Compression, ...] = ()

    @property
    def id(self) -> str:
        return self.recipe.id

    @property
    def worst_error(self) -> float:
        return max((e.relative_l2 for e in self.errors), default=math.nan)


class Rank(msgspec.Struct, frozen=True):
    """Which variants serve a bucket, best first, and how the first compares with the original.

    ``speedup`` is the original's median (or period, for throughput) over the first variant's, from the
    play-off; ``noise`` the relative spread that a gain had to exceed.
    """

    bucket: Bucket
    variants: tuple[str, ...]
    speedup: float
    noise: float


class Evidence(msgspec.Struct, frozen=True):
    """The whole outcome of a search: what the report shows and the bundle carries."""

    model: str
    spec: Spec
    buckets: tuple[Bucket, ...]
    objective: str
    device: str
    environment: Environment
    candidates: tuple[Candidate, ...]
    chosen: str
    ranks: tuple[Rank, ...] = ()
    pareto: tuple[str, ...] = ()
    playoff: dict[str, tuple[Timing, ...]] = {}
    reference_error: float | None = None
    notes: tuple[str, ...] = ()
    command: str = ""
    started: str = ""
    seconds: float = 0.0
    params: int = 0

    def candidate(self, recipe_id: str) -> Candidate | None:
        return next((c for c in self.candidates if c.id == recipe_id), None)

    def timing(self, recipe_id: str, bucket: Bucket) -> Timing | None:
        """The play-off's timing of a variant at a bucket, or else its own measurement's."""
        for timing in self.playoff.get(recipe_id, ()):
            if timing.bucket == bucket:
                return timing
        candidate = self.candidate(recipe_id)
        return candidate.measurement.timing(bucket) if candidate else None


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation (Hyndman and Fan type 7, NumPy's default); NaN if empty."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def to_json(value: Any) -> bytes:
    """Any of these types as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1)
