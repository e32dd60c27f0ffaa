"""What a user may ask of a search, and what a search tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from onecard.evidence import Candidate
from onecard.recipe import Recipe
from onecard.search.choose import Wishes
from onecard.search.job import EffortSpec
from onecard.search.processes import Running


@dataclass(frozen=True)
class Options:
    """What a user may ask of a search; the defaults stand here and nowhere else.

    Args:
        objective: ``latency``, ``throughput``, ``memory`` or ``size``.
        batches: batch sizes to build for and time; empty means the smallest, 8 and the largest.
        max_latency_p99_ms: no bucket may be slower.
        max_memory_bytes: the variant may hold no more at once.
        max_drop: how far the metric on labelled data may fall.
        recipes: globs over recipe ids; empty means the default list.
        time_limit_s: after it no candidate is started any more.
        candidate_time_limit_s: for building, and again for running, one candidate.
        device: ``cpu``, ``cuda:0`` ...
        metric: name of the metric on labelled data, or empty.
        fresh: forget what an earlier search of the same job found.
        thresholds: relative L2 by precision, in place of the default ones.
        effort: how long to measure.
        device_memory: most bytes of the device's memory that a variant may take. The original is run beyond
            it, to compare with, but is no choice then.
        worker_memory_bytes: kill a worker that holds more main memory; None means most of the machine's.
    """

    objective: str = "latency"
    batches: tuple[int, ...] = ()
    max_latency_p99_ms: float | None = None
    max_memory_bytes: int | None = None
    max_drop: float = 0.01
    recipes: tuple[str, ...] = ()
    time_limit_s: float = 1800.0
    candidate_time_limit_s: float = 300.0
    device: str = "cpu"
    metric: str = ""
    fresh: bool = False
    thresholds: dict[str, float] = field(default_factory=dict)
    effort: EffortSpec = field(default_factory=EffortSpec)
    device_memory: int | None = None
    worker_memory_bytes: int | None = None

    @property
    def wishes(self) -> Wishes:
        return Wishes(self.objective, self.max_latency_p99_ms, self.max_memory_bytes, self.device_memory)


@dataclass
class Progress:
    """The state of a search, for whoever shows it."""

    recipes: list[Recipe]
    done: dict[str, Candidate]
    running: list[Running]
    elapsed_s: float
    time_limit_s: float
    resumed: int
    phase: str


Observer = Callable[[Progress], None]
