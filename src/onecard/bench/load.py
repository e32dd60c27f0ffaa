"""What load to put on a target: the scenario, how much of it, and for how long."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from onecard.arrivals import poisson_times
from onecard.errors import DataError, UsageError

Scenario = Literal["server", "offline", "single-stream", "multi-stream", "closed-loop"]
SCENARIOS: dict[str, str] = {
    "server": "requests at random times (Poisson) that do not wait for answers",
    "offline": "all requests at once",
    "single-stream": "one request after another",
    "multi-stream": "queries of several requests, one query after another",
}
"""As MLPerf Inference defines them."""
CLOSED_LOOP: Scenario = "closed-loop"
MOST_REQUESTS = 20_000_000
_HEADLINE = {"server": 99.0, "single-stream": 90.0, "multi-stream": 99.0, "closed-loop": 99.0}


class Load(msgspec.Struct, frozen=True):
    """One run.

    Args:
        scenario: how requests follow one another.
        duration_s: of the schedule; what is under way at its end is still waited for.
        qps: requests a second, on average (``server``).
        requests: at most so many; 0 for as many as the duration has.
        arrivals: times of a trace, instead of random ones at ``qps`` (``server``).
        samples: requests of a query (``multi-stream``).
        concurrency: callers that each wait for their answer before they ask again (``closed-loop``).
        most_in_flight: requests under way at once; the next waits, and its time counts.
        drain_s: how long answers are waited for at the end.
        seed: of the arrival times.
    """

    scenario: Scenario
    duration_s: float
    qps: float = 0.0
    requests: int = 0
    arrivals: tuple[float, ...] = ()
    samples: int = 1
    concurrency: int = 1
    most_in_flight: int = 900
    drain_s: float = 10.0
    seed: int = 0

    @property
    def is_open(self) -> bool:
        """Whether requests come when they are due, whatever became of those before them."""
        return self.scenario in ("server", "offline")

    @property
    def headline(self) -> float | None:
        """The percentile that the scenario is judged by; None for throughput."""
        return _HEADLINE.get(self.scenario)


def check_load(load: Load) -> None:
    """Refuse a load that cannot be made.

    Raises:
        UsageError: a figure out of range, or more requests than fit in memory.
    """
    if load.scenario == "server" and not load.arrivals and not 0 < load.qps < math.inf:
        raise UsageError("the scenario 'server' needs a rate or a trace:", "pass --qps 100, --arrivals FILE or both.")
    for name, value in (("--samples", load.samples), ("--concurrency", load.concurrency),
                        ("--connections", load.most_in_flight)):  # fmt: skip
        if value < 1:
            raise UsageError(f"{name} is {value}, but must be 1 or more.")
    if load.requests < 0:
        raise UsageError(f"--requests is {load.requests}, but must be 0 or more.")
    if max(load.requests, len(load.arrivals), load.qps * load.duration_s) > MOST_REQUESTS:
        raise UsageError(f"this is more than {MOST_REQUESTS:,} requests.", "Choose a shorter --duration.")


def due_times(load: Load) -> list[float]:
    """When the requests of an open-loop load are due, in seconds from its start, ascending."""
    if load.scenario == "offline":
        return [0.0] * load.requests
    if load.arrivals:
        times = list(load.arrivals)
    else:
        count = load.requests or _enough(load.qps * load.duration_s)
        times = poisson_times(load.qps, count, load.seed)
        if load.requests:
            return times
    times = [due for due in times if due < load.duration_s]
    return times[: load.requests] if load.requests else times


def _enough(mean: float) -> int:
    """So many arrivals that the last comes after the end: a Poisson count is never 6 deviations above its mean."""
    return math.ceil(mean + 6 * math.sqrt(mean) + 10)


def read_arrivals(path: Path, qps: float = 0.0) -> tuple[float, ...]:
    """Read a trace: one time in seconds a line, or an array in a ``.npy`` file; the first arrival is the start.

    Args:
        path: of the file. Empty lines and lines that begin with ``#`` are passed over.
        qps: the trace is stretched or squeezed to this mean rate; 0 leaves it as it is.

    Raises:
        DataError: missing, empty, or not numbers.
    """
    try:
        times = np.load(path, allow_pickle=False) if path.suffix == ".npy" else list(map(float, _lines(path)))
        times = np.sort(np.asarray(times, np.float64).reshape(-1))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"the arrivals in {path} cannot be read: {error}.", "Write one time in seconds a line.") from (
            error
        )
    if not len(times) or not np.isfinite(times).all():
        raise DataError(f"{path} has no arrivals, or some that are not finite.", "Write one time in seconds a line.")
    times = times - times[0]
    if qps and times[-1] > 0:
        times *= (len(times) - 1) / times[-1] / qps
    return tuple(times.tolist())


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
