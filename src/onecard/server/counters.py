"""What became of a model's requests and batches since it was opened, for the statistics extension and for metrics."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

from onecard.runtime.stats import BatchStats
from onecard.server.oip_metadata import BatchCounts, Duration, InferCounts, ModelCounts
from onecard.telemetry.histogram import ROWS, Distribution, Histogram


@dataclass
class _Sum:
    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds * count

    @property
    def duration(self) -> Duration:
        return Duration(self.count, round(self.seconds * 1e9))


@dataclass
class _Batches:
    copy_in: _Sum = field(default_factory=_Sum)
    compute: _Sum = field(default_factory=_Sum)
    copy_out: _Sum = field(default_factory=_Sum)


class Counters:
    """Counts of one model; told from the event loop and from the engine's threads.

    Attributes:
        came_in: requests that reached the engine.
        rows: answered.
        padded_rows: run for nothing, in rows of their batch's size.
        executions: batches that were answered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.came_in = self.rows = self.executions = 0
        self.padded_rows = 0.0
        self._batch_rows = Histogram(ROWS)
        self._times = {name: Histogram() for name in ("queue_s", "batch_s", "copy_in_s", "compute_s", "copy_out_s")}
        self._success, self._fail, self._queue = _Sum(), _Sum(), _Sum()
        self._copy_in, self._compute, self._copy_out = _Sum(), _Sum(), _Sum()
        self._batches: defaultdict[int, _Batches] = defaultdict(_Batches)
        self._last_ms = 0

    def came(self) -> None:
        """A request came in."""
        self.came_in += 1
        self._last_ms = time.time_ns() // 1_000_000

    def ended(self, seconds: float, ok: bool) -> None:
        """A request was answered, or failed, so long after it came."""
        with self._lock:
            (self._success if ok else self._fail).add(seconds)

    def ran(self, stats: BatchStats) -> None:
        """The engine ran a batch; one without an answer is not counted."""
        if stats.error:
            return
        copy_in = stats.gather_s + stats.copy_in_s
        times = self._times
        with self._lock:
            self.rows += stats.rows
            self.executions += 1
            if stats.padding:
                self.padded_rows += stats.rows * stats.padding / (1.0 - stats.padding)
            self._queue.count += len(stats.queue_s)
            self._queue.seconds += sum(stats.queue_s)
            times["queue_s"].observe_many(stats.queue_s)
            times["batch_s"].observe(stats.total_s)
            times["copy_in_s"].observe(copy_in)
            times["compute_s"].observe(stats.compute_s)
            times["copy_out_s"].observe(stats.copy_out_s)
            self._batch_rows.observe(stats.rows)
            self._copy_in.add(copy_in, stats.requests)
            self._compute.add(stats.compute_s, stats.requests)
            self._copy_out.add(stats.copy_out_s, stats.requests)
            batch = self._batches[stats.rows]
            batch.copy_in.add(copy_in)
            batch.compute.add(stats.compute_s)
            batch.copy_out.add(stats.copy_out_s)

    def distributions(self) -> tuple[dict[str, Distribution], Distribution]:
        """Times by name, as :data:`onecard.telemetry.snapshot.HISTOGRAMS` has them, and the batches' rows."""
        with self._lock:
            return {name: each.copy() for name, each in self._times.items()}, self._batch_rows.copy()

    def stages_s(self) -> dict[str, float]:
        """Seconds of each stage, those of a batch counted for each of its requests."""
        with self._lock:
            sums = {"copy_in": self._copy_in, "compute": self._compute, "copy_out": self._copy_out}
            return {name: each.seconds for name, each in sums.items()}

    def read(self, name: str, version: str) -> ModelCounts:
        """All of it, in the protocol's form."""
        with self._lock:
            requests = InferCounts(
                success=self._success.duration,
                fail=self._fail.duration,
                queue=self._queue.duration,
                compute_input=self._copy_in.duration,
                compute_infer=self._compute.duration,
                compute_output=self._copy_out.duration,
            )
            batches = tuple(
                BatchCounts(rows, b.copy_in.duration, b.compute.duration, b.copy_out.duration)
                for rows, b in sorted(self._batches.items())
            )
            return ModelCounts(name, version, self._last_ms, self.rows, self.executions, requests, batches)
