"""Timing one runner honestly: warm until stable, rotate the inputs, keep every sample.

Latency is the host clock from the call to the answer being complete. Throughput comes from blocks of
back-to-back calls, which is what a busy server does. On a GPU the same blocks are timed by CUDA events too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onecard.evidence import CardState, Timing, quantile
from onecard.measure.card import CardSampler, is_throttled
from onecard.spec import Bucket

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]

_CACHE_BYTES = 256 << 20  # inputs are rotated over more than any last-level cache holds
_STABLE = 0.05
_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Effort:
    """How long to measure one variant at one bucket.

    Args:
        warmup_s: the longest warm-up; it ends sooner once two windows agree within 5 %.
        latency_s: the time for single calls.
        period_s: the time for blocks of back-to-back calls.
        min_samples: single calls to take even where they last longer than ``latency_s``.
        max_samples: single calls that are enough.
    """

    warmup_s: float = 2.0
    latency_s: float = 1.0
    period_s: float = 0.5
    min_samples: int = 7
    max_samples: int = 200


@dataclass
class Stopwatch:
    """Times one runner at one bucket; samples can be taken in several goes, in turn with others'.

    Args:
        run: the variant.
        inputs: input sets on the device, used in turn.
        device: ``cpu`` or ``cuda:N``.
        bucket: what the inputs' sizes are.
        rows: rows of the batch that one call answers.
        first_call_ms: of the very first call, which was timed before.
    """

    run: Run
    inputs: Sequence[Tensors]
    device: str
    bucket: Bucket
    rows: int
    samples_ms: list[float] = field(default_factory=list)
    period_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    first_call_ms: float = 0.0
    _next: int = 0

    def warm_up(self, effort: Effort) -> None:
        """Call until two windows of calls take the same time, or the warm-up's time is over."""
        end = time.perf_counter() + effort.warmup_s
        previous = 0.0
        self._once()
        while time.perf_counter() < end:
            window_end = time.perf_counter() + effort.warmup_s / 8
            window = [self._once()]
            while time.perf_counter() < window_end:
                window.append(self._once())
            median = quantile(window, 0.5)
            if previous and abs(median - previous) <= _STABLE * previous:
                return
            previous = median

    def sample(self, effort: Effort) -> None:
        """Take single calls, then blocks of back-to-back calls; all are kept."""
        end = time.perf_counter() + effort.latency_s
        count = 0
        while count < effort.max_samples and (count < effort.min_samples or time.perf_counter() < end):
            self.samples_ms.append(self._once())
            count += 1
        block = max(1, min(100, int(effort.period_s * 1000 / 8 / max(quantile(self.samples_ms, 0.5), 1e-3))))
        end = time.perf_counter() + effort.period_s
        while not self.period_ms or time.perf_counter() < end:
            self._block(block)

    def clear(self) -> None:
        """Forget the samples, to measure again."""
        self.samples_ms.clear()
        self.period_ms.clear()
        self.device_ms.clear()

    def timing(self, before: CardState, after: CardState) -> Timing:
        """What was measured so far."""
        return Timing(
            bucket=self.bucket,
            samples_ms=tuple(round(s, 5) for s in self.samples_ms),
            period_ms=tuple(round(s, 5) for s in self.period_ms),
            device_ms=tuple(round(s, 5) for s in self.device_ms),
            rows=self.rows,
            first_call_ms=round(self.first_call_ms, 3),
            before=before,
            after=after,
        )

    def _take(self) -> Tensors:
        self._next = (self._next + 1) % len(self.inputs)
        return self.inputs[self._next]

    def _once(self) -> float:
        inputs = self._take()
        start = time.perf_counter_ns()
        outputs = self.run(inputs)
        synchronise(self.device)
        elapsed = (time.perf_counter_ns() - start) / 1e6
        del outputs
        return elapsed

    def _block(self, calls: int) -> None:
        if self.device == "cpu":
            start = time.perf_counter_ns()
            for _ in range(calls):
                self.run(self._take())
            self.period_ms.append((time.perf_counter_ns() - start) / 1e6 / calls)
            return
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self.device)  # of this card, which need not be the current one
        start = time.perf_counter_ns()
        begin.record(stream)
        for _ in range(calls):
            self.run(self._take())
        finish.record(stream)
        synchronise(self.device)
        self.period_ms.append((time.perf_counter_ns() - start) / 1e6 / calls)
        self.device_ms.append(begin.elapsed_time(finish) / calls)


def measure(watch: Stopwatch, effort: Effort, card: CardSampler) -> tuple[Timing, list[str]]:
    """Warm up and take all samples of one stopwatch; a run during which the card throttled is repeated.

    Returns:
        The timing, and warnings: a spread so wide that the median says little, or throttling to the end.
    """
    warnings: list[str] = []
    for attempt in range(_MAX_ATTEMPTS):
        watch.clear()
        watch.warm_up(effort)
        with no_garbage_collection():
            before = card.read()
            watch.sample(effort)
            after = card.read()
        if not is_throttled(after):
            break
        time.sleep(2.0 * (attempt + 1))
    else:
        warnings.append(f"{', '.join(after.throttle)}: the card slowed itself down while {watch.bucket} was timed")
    timing = watch.timing(before, after)
    if timing.iqr_ms > 0.3 * timing.median_ms:
        warnings.append(
            f"the samples at {timing.label} spread widely: IQR {timing.iqr_ms:.3g} ms of {timing.median_ms:.3g} ms"
        )
    return timing, warnings


def rotation(make: Callable[[int], Tensors]) -> list[Tensors]:
    """Enough different input sets that none is still cached when its turn comes again, 2 to 8.

    Args:
        make: input set number i, on the device.
    """
    first = make(0)
    size = sum(t.nbytes for t in first.values())
    count = max(2, min(8, -(-_CACHE_BYTES // max(size, 1))))
    return [first, *(make(i) for i in range(1, count))]


def synchronise(device: str) -> None:
    """Wait until the device has done all that was asked of it; nothing to wait for on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


class no_garbage_collection:
    """Keep Python's collector from stopping a timed call."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        gc.enable()
