"""The curve of throughput and latency over batch sizes: every lane kept busy, from host memory to host memory.

What is measured is a stage, not the engine: whole batches, launched as soon as there is room, without a queue.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onecard.errors import UsageError
from onecard.evidence import quantile
from onecard.inputs import make_inputs
from onecard.models.wording import first_line
from onecard.runtime.entries import Source
from onecard.runtime.faults import explained, is_device_lost, is_out_of_memory
from onecard.runtime.served import Served
from onecard.runtime.staging import Flight, Stage
from onecard.runtime.work import Lengths
from onecard.spec import Bucket, Spec
from onecard.tuning import LoadPoint

ROUNDS = 3
"""Each size is measured so many times, the sizes in turn, so that drift of the machine hits all alike."""

_LEAST_BATCHES = 2  # a round and lane, beside the first, which only fills the pipeline
_NOT_REACHED = "not measured: the time was over"


class LanePlace(NamedTuple):
    """A lane of the curve.

    Args:
        model: that runs on it.
        stage: where.
        sent: the spec of what is sent; None for the model's own.
    """

    model: Served
    stage: Stage
    sent: Spec | None = None


@dataclass
class _Lane:
    """A lane with its thread, and what was measured on it."""

    place: LanePlace
    thread: ThreadPoolExecutor


@dataclass
class _Series:
    """What was measured of one batch size."""

    batch: int
    size: Bucket
    rates: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    failed: str = ""

    def point(self, lanes: int) -> LoadPoint:
        if self.failed or not self.rates:
            return LoadPoint(self.batch, lanes, failed=self.failed or _NOT_REACHED)
        p50_ms, p99_ms = (1e3 * quantile(self.latencies_s, q) for q in (0.5, 0.99))
        return LoadPoint(self.batch, lanes, quantile(self.rates, 0.5), p50_ms, p99_ms, len(self.latencies_s))


def lengths_of(model: Served) -> Lengths:
    """The sizes of the symbols beside the batch's that a model is tuned at: those of its largest size."""
    batch = model.spec.batch_symbol
    return model.lengths_of(tuple(n for name, n in model.sizes()[0].items() if name != batch))


def batches_of(model: Served, asked: Sequence[int] = ()) -> tuple[int, ...]:
    """The batch sizes of the curve: those that the model was built for, and the powers of two that run as they are.

    Args:
        model: what is tuned.
        asked: just these, if any.

    Raises:
        UsageError: one that the model cannot run.
    """
    batch = model.spec.batch_symbol
    low, most = (1, 1) if batch is None else (model.spec.symbols[batch].low, model.max_rows(lengths_of(model)))
    for rows in asked:
        if not low <= rows <= most:
            raise UsageError(f"batch {rows} cannot be run: this model takes {low} to {most} rows a batch.")
    if asked or batch is None:
        return tuple(sorted({*asked})) or (1,)
    built = {size[batch] for size in model.sizes() if size[batch] <= most}
    whole = {rows for rows in (*(1 << n for n in range(most.bit_length())), most) if rows >= low}
    return tuple(sorted(built | {n for n in whole if model.fit(n, lengths_of(model))[batch] == n}))


def measure_curve(
    places: Sequence[LanePlace],
    batches: Iterable[int],
    point_s: float,
    until: float,
    observe: Callable[[int, int], None] = lambda batch, done: None,
) -> list[LoadPoint]:
    """Measure every batch size on these lanes side by side.

    Args:
        places: one for each lane.
        batches: the sizes.
        point_s: how long each is measured at least, all rounds together.
        until: of ``time.monotonic``; what is not measured by then is a point that failed, and says so.
        observe: told of every size before it is measured, and how many measurements are done.

    Returns:
        A point for each batch size, in ascending order. One that runs out of memory, or that the model cannot run,
        is a point that failed.

    Raises:
        EngineError: the device was lost.
    """
    model = places[0].model
    series = [_Series(batch, model.fit(batch, lengths_of(model))) for batch in sorted({*batches})]
    inputs: dict[str, Tensor | np.ndarray[Any, Any]] = {**make_inputs(places[0].sent or model.spec, series[-1].size)}
    with ExitStack() as stack:
        lanes = [_Lane(place, stack.enter_context(ThreadPoolExecutor(1, "onecard-tune"))) for place in places]
        stop = threading.Event()
        stack.callback(stop.set)  # before the threads are waited for, also after Ctrl-C
        done = 0
        for turn in range(ROUNDS + 1):  # the first warms up
            for one in series if turn % 2 else series[::-1]:
                if not one.failed and time.monotonic() < until:
                    observe(one.batch, done)
                    _measure(lanes, one, Source(inputs, 0, one.batch), point_s / ROUNDS if turn else 0.0, stop)
                done += 1
    return [one.point(len(places)) for one in series]


class _Lap(NamedTuple):
    """One round of one lane."""

    rows_per_s: float
    latencies_s: list[float]


def _measure(lanes: Sequence[_Lane], one: _Series, source: Source, seconds: float, stop: threading.Event) -> None:
    """One size on all lanes at once; with 0 seconds a batch or so each, which does not count."""
    gate = threading.Barrier(len(lanes))
    try:
        tasks = [lane.thread.submit(_run, lane.place.stage, source, one.size, (seconds, gate, stop)) for lane in lanes]
        errors = [error for task in tasks if isinstance(error := task.exception(), Exception)]
    finally:
        gate.abort()  # Ctrl-C may have come before the last lane was there
    if errors:
        one.failed = _explain(errors, lanes[0].place.model.device)
    elif seconds:
        laps = [task.result() for task in tasks]
        one.rates.append(sum(lap.rows_per_s for lap in laps))
        one.latencies_s += [s for lap in laps for s in lap.latencies_s]


def _explain(errors: Sequence[Exception], device: str) -> str:
    """Why a size has no figures; memory that was short is given back."""
    for error in errors:
        if is_device_lost(error):
            raise explained(error)
    if not any(is_out_of_memory(error) for error in errors):
        return first_line(errors[0])
    if device != "cpu":
        torch.cuda.empty_cache()
    return "out of memory"


def _run(stage: Stage, source: Source, size: Bucket, how: tuple[float, threading.Barrier, threading.Event]) -> _Lap:
    """Keep a lane busy for a while; runs on the lane's own thread."""
    seconds, gate, stop = how
    gate.wait()
    return _keep_busy(stage, source, size, seconds, stop)


def _keep_busy(stage: Stage, source: Source, size: Bucket, seconds: float, stop: threading.Event) -> _Lap:
    under_way: deque[tuple[Flight, float]] = deque()
    latencies_s: list[float] = []
    first = last = 0.0
    end = time.perf_counter() + seconds
    least = _LEAST_BATCHES if seconds else 0
    try:
        while not stop.is_set():
            while len(under_way) < stage.depth:
                began = time.perf_counter()
                under_way.append((stage.launch([source], source.rows, size), began))
            flight, began = under_way[0]
            flight.wait()
            last = time.perf_counter()
            under_way.popleft()
            flight.release()
            if first:
                latencies_s.append(last - began)
            else:
                first = last
            if last >= end and len(latencies_s) >= least:
                break
    finally:
        for flight, _ in under_way:
            flight.release()
    rate = source.rows * len(latencies_s) / (last - first) if latencies_s else 0.0
    return _Lap(rate, latencies_s)
