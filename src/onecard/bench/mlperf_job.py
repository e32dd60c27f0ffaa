"""What an MLPerf run is told: the scenario and its settings, the bundle and the data; and what its process says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from onecard.environment import Environment
from onecard.errors import UsageError

Scenario: TypeAlias = Literal["SingleStream", "MultiStream", "Server", "Offline"]
Mode: TypeAlias = Literal["performance", "accuracy"]

SCENARIOS: tuple[Scenario, ...] = ("SingleStream", "MultiStream", "Server", "Offline")
MODES: tuple[Mode, ...] = ("performance", "accuracy")
STREAMS = ("SingleStream", "MultiStream")
"""The scenarios in which a query is sent when the one before it was answered."""

LOG_PREFIX = "mlperf_log_"
"""How the names of LoadGen's own files begin."""
RESULT = "mlperf.json"
CRASH_LOG = "error.log"


@dataclass(frozen=True)
class MlperfSettings:
    """How LoadGen drives the system; the terms are those of MLPerf Inference.

    Args:
        scenario: one of :data:`SCENARIOS`.
        mode: ``performance``, or ``accuracy`` for every sample once and its answer in a log.
        qps: Server: queries a second to send on average. Offline: the samples a second to expect, from which LoadGen
            makes the length of its one query; None to measure it first.
        latency_s: Server: the bound that ``percentile`` of the latencies must keep. SingleStream and MultiStream: the
            latency of a query to expect, from which LoadGen makes the number of its queries; None to measure it first.
        percentile: of the latencies; None for LoadGen's own (0.9 in SingleStream, else 0.99).
        min_duration_s: for how long at least.
        min_queries: how many queries at least; in Offline, samples.
        samples_per_query: in MultiStream.

    Raises:
        UsageError: a setting that is out of range, missing, or means nothing in this scenario.
    """

    scenario: Scenario
    mode: Mode = "performance"
    qps: float | None = None
    latency_s: float | None = None
    percentile: float | None = None
    min_duration_s: float = 60.0
    min_queries: int = 100
    samples_per_query: int = 8

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise UsageError(f"unknown scenario '{self.scenario}': expected one of {', '.join(SCENARIOS)}.")
        if self.mode not in MODES:
            raise UsageError(f"unknown mode '{self.mode}': expected one of {', '.join(MODES)}.")
        for name in ("qps", "latency_s", "min_duration_s", "min_queries", "samples_per_query"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}, but must be a number above 0.")
        if self.percentile is not None and not 0 < self.percentile < 1:
            raise UsageError(f"the percentile is {self.percentile}, but must be between 0 and 1.", "Write 0.99.")
        self._check_scenario()

    def _check_scenario(self) -> None:
        if self.scenario == "Server" and (self.qps is None or self.latency_s is None):
            raise UsageError(
                "the Server scenario needs a rate and a bound on the latency.", "Pass --qps 200 --latency 15ms, say."
            )
        if self.scenario in STREAMS and self.qps is not None:
            raise UsageError(f"{self.scenario} sends a query when the last was answered: it has no --qps.")
        if self.scenario == "Offline" and (self.latency_s is not None or self.percentile is not None):
            raise UsageError("Offline counts samples a second: it has no --latency and no --percentile.")


@dataclass(frozen=True)
class MlperfJob:
    """One run.

    Args:
        bundle: its folder.
        data: the samples with their labels: an .npz or .safetensors file, or a function's reference.
        output: the folder for LoadGen's files and the result.
        settings: see :class:`MlperfSettings`.
        metric: for the accuracy mode; a name, or a function's reference.
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        command: to be recorded.
    """

    bundle: Path
    data: str
    output: Path
    settings: MlperfSettings
    metric: str = "accuracy"
    device: str = "auto"
    command: str = ""


@dataclass(frozen=True)
class MlperfProgress:
    """How far a run is.

    Args:
        stage: what is being done.
        issued: samples that LoadGen has asked for.
        answered: of these.
    """

    stage: str
    issued: int = 0
    answered: int = 0


@dataclass(frozen=True)
class Note:
    """Something the user should know, such as a variant of the bundle that was passed over."""

    text: str


@dataclass(frozen=True)
class Failure:
    """The run cannot go on.

    Args:
        kind: name of the class in :mod:`onecard.errors`.
        message: of the error.
        cure: of the error.
    """

    kind: str
    message: str
    cure: str


@dataclass(frozen=True)
class Finished:
    """LoadGen is done and its files are written.

    Args:
        samples: that the data holds.
        score: the metric's value in the accuracy mode, else None.
        environment: where it ran.
    """

    samples: int
    score: float | None
    environment: Environment


Message = MlperfProgress | Note | Failure | Finished
"""What the run's process says."""
