"""The choice: constraints first, then the objective; the original stays unless a gain exceeds the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onecard.evidence import Candidate, Evidence, Rank, Timing, quantile
from onecard.recipe import ORIGINAL
from onecard.spec import Bucket

OBJECTIVES = ("latency", "throughput", "memory", "size")
_MIN_NOISE = 0.01  # below one per cent no machine repeats itself
_WORTH_A_NOTE = 0.1
_MAX_TIE = 0.03  # variants this close are equally fast, however noisy the machine
_CHUNKS = 5


@dataclass(frozen=True)
class Wishes:
    """What the user asked of the chosen variant.

    Args:
        objective: one of :data:`OBJECTIVES`.
        max_latency_p99_ms: no bucket is served slower than this, if given.
        max_memory_bytes: the most memory at once, if given.
        device_memory: the most of the device's memory, if given; what needs more is no choice, not even the original.
    """

    objective: str = "latency"
    max_latency_p99_ms: float | None = None
    max_memory_bytes: int | None = None
    device_memory: int | None = None


@dataclass(frozen=True)
class Choice:
    """What came out: the best variant over all buckets, the ranking of each bucket, the front, and notes."""

    chosen: str
    ranks: tuple[Rank, ...]
    pareto: tuple[str, ...]
    notes: tuple[str, ...]


def cost(timing: Timing, objective: str) -> float:
    """Milliseconds: of one call for latency, of one call back to back for throughput."""
    return 1000.0 * timing.rows / timing.throughput if objective == "throughput" else timing.median_ms


def noise_of(timing: Timing, objective: str) -> float:
    """How far this timing would move if it were repeated, as a share of it.

    The samples are cut into five chunks in the order they were taken (the rounds of the play-off); half of the
    spread of the chunks' medians is what a repetition of the same measurement may be off by.
    """
    samples = timing.period_ms if objective == "throughput" and len(timing.period_ms) >= _CHUNKS else timing.samples_ms
    size = max(1, len(samples) // _CHUNKS)
    medians = [quantile(samples[i : i + size], 0.5) for i in range(0, size * _CHUNKS, size) if samples[i : i + size]]
    middle = quantile(medians, 0.5)
    spread = (max(medians) - min(medians)) / 2 / middle if medians and middle > 0 else 0.0
    return max(_MIN_NOISE, spread)


def choose(evidence: Evidence, wishes: Wishes) -> Choice:
    """Choose among the candidates of an evidence whose play-off is done.

    Returns:
        The original alone where no other variant passed or none is better by more than the noise.
    """
    notes: list[str] = []
    passed = [c for c in evidence.candidates if c.verdict.ok]
    played = [c for c in passed if not evidence.playoff or c.id in evidence.playoff]
    allowed = within_memory(played, wishes, notes)
    buckets = evidence.buckets or ({},)
    ranks = []
    for bucket in buckets:
        rank = _rank(evidence, allowed, bucket, wishes)
        ranks.append(rank)
        _note_latency(evidence, rank, wishes, notes)
    chosen = _overall(evidence, allowed, buckets, wishes, notes)
    settled = tuple(_settle(evidence, rank, chosen, wishes) for rank in ranks)
    return Choice(chosen, settled, pareto_front(evidence, passed), tuple(notes))


def finalists(
    candidates: Sequence[Candidate], buckets: Sequence[Bucket], objective: str, most: int = 6
) -> list[Candidate]:
    """The original and the few fastest at each bucket, for the play-off; for memory and size, the smallest.

    Args:
        candidates: all of them; only those that passed count.
        buckets: the timed sizes.
        objective: what the choice will be by.
        most: how many at most, the original included.
    """
    passed = [c for c in candidates if c.verdict.ok and c.measurement.timings]
    original = [c for c in passed if c.id == ORIGINAL.id]
    orders: list[list[Candidate]] = []
    if objective in ("memory", "size"):
        orders.append(sorted(passed, key=lambda c: _static_cost(c, objective)))
    for bucket in buckets or ({},):
        timed = [(t, c) for c in passed if (t := c.measurement.timing(bucket)) is not None]
        orders.append([c for _, c in sorted(timed, key=lambda pair: cost(pair[0], objective))])
    picked = {c.id: c for c in original}
    for place in range(len(passed)):
        for order in orders:
            if place < len(order) and len(picked) < most:
                picked.setdefault(order[place].id, order[place])
    return list(picked.values())


def pareto_front(evidence: Evidence, passed: Sequence[Candidate]) -> tuple[str, ...]:
    """The candidates that no other beats in latency, throughput, memory, size and error at once."""
    points = {c.id: _point(evidence, c) for c in passed}
    return tuple(
        name
        for name, point in points.items()
        if not any(_dominates(other, point) for rival, other in points.items() if rival != name)
    )


def _point(evidence: Evidence, candidate: Candidate) -> tuple[float, ...]:
    timings = [t for b in (evidence.buckets or ({},)) if (t := evidence.timing(candidate.id, b)) is not None]
    measured = candidate.measurement
    error = 0.0 if candidate.id == ORIGINAL.id or math.isnan(candidate.worst_error) else candidate.worst_error
    latency = [t.median_ms for t in timings]
    throughput = [-t.throughput for t in timings]
    return (*latency, *throughput, float(measured.peak_bytes), float(measured.size_bytes), error)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def device_need(candidate: Candidate) -> int:
    """Bytes that a variant holds on its device: measured on a GPU; on a CPU its files, which are mostly weights.

    0 for one that streams its weights: it keeps to any limit that it was loaded with.
    """
    measured = candidate.measurement
    return 0 if candidate.recipe.backend == "stream" else measured.peak_device_bytes or measured.size_bytes


def within_memory(passed: list[Candidate], wishes: Wishes, notes: list[str]) -> list[Candidate]:
    """Those that fit into the memory limits, or else the one that comes closest, with a note."""
    if wishes.device_memory is not None:
        small = [c for c in passed if device_need(c) <= wishes.device_memory]
        if not small and passed:
            notes.append(f"no variant keeps to {wishes.device_memory / 2**20:.0f} MiB of the device's memory")
        passed = small or passed
    limit = wishes.max_memory_bytes
    if limit is None:
        return passed
    fits = [c for c in passed if c.measurement.peak_bytes <= limit]
    if not fits and passed:
        closest = min(passed, key=lambda c: c.measurement.peak_bytes)
        notes.append(
            f"no variant fits into {limit / 2**20:.0f} MiB; the closest, {closest.id}, needs "
            f"{closest.measurement.peak_bytes / 2**20:.0f} MiB"
        )
        return [closest]
    return fits


def _note_latency(evidence: Evidence, rank: Rank, wishes: Wishes, notes: list[str]) -> None:
    limit = wishes.max_latency_p99_ms
    timing = evidence.timing(rank.variants[0], rank.bucket) if rank.variants else None
    if limit is not None and timing is not None and timing.p99_ms > limit:
        notes.append(
            f"no variant keeps p99 within {limit:g} ms at {timing.label}; the closest, {rank.variants[0]}, "
            f"takes {timing.p99_ms:.3g} ms"
        )


def _static_cost(candidate: Candidate, objective: str) -> float:
    measured = candidate.measurement
    return float(measured.peak_bytes if objective == "memory" else measured.size_bytes)


def _rank(evidence: Evidence, allowed: Sequence[Candidate], bucket: Bucket, wishes: Wishes) -> Rank:
    """Order the variants at one bucket; those that keep the latency limit come first."""
    timed = {c.id: (c, t) for c in allowed if (t := evidence.timing(c.id, bucket)) is not None}
    limit = wishes.max_latency_p99_ms or math.inf

    def key(name: str) -> tuple[bool, float, float]:
        candidate, timing = timed[name]
        late = timing.p99_ms > limit
        if wishes.objective in ("memory", "size"):
            return late, _static_cost(candidate, wishes.objective), timing.median_ms
        by_p99 = timing.p99_ms if late else cost(timing, wishes.objective)
        return late, by_p99, float(candidate.measurement.peak_bytes)

    order = sorted(timed, key=key)
    if not order:
        return Rank(bucket, (), 1.0, 0.0)
    return _compared(evidence, Rank(bucket, tuple(order), 1.0, 0.0), wishes)


def _compared(evidence: Evidence, rank: Rank, wishes: Wishes) -> Rank:
    """The rank with its first variant compared with the original at this bucket."""
    first = evidence.timing(rank.variants[0], rank.bucket)
    original = evidence.timing(ORIGINAL.id, rank.bucket)
    if first is None or original is None:
        return rank
    objective = wishes.objective
    noise = max(noise_of(first, objective), noise_of(original, objective))
    return Rank(rank.bucket, rank.variants, cost(original, objective) / cost(first, objective), noise)


def _overall(
    evidence: Evidence, allowed: Sequence[Candidate], buckets: Sequence[Bucket], wishes: Wishes, notes: list[str]
) -> str:
    """The variant that is best over all buckets, by the geometric mean of its cost.

    Relative to the original's, or as it is where the original cannot run within the device's memory. One whose gain
    over the original is within the noise of either is none, and is no tie of the best either.
    """
    if not allowed:
        return ORIGINAL.id
    scores: dict[str, float] = {}
    noises: dict[str, float] = {}
    yardstick = _timings(evidence, ORIGINAL.id, buckets)
    for candidate in allowed:
        known = _timings(evidence, candidate.id, buckets)
        if not known:
            continue
        if wishes.objective in ("memory", "size"):
            scores[candidate.id] = _static_cost(candidate, wishes.objective)
        elif wishes.objective == "throughput":
            scores[candidate.id] = 1.0 / max(t.throughput for t in known)
        else:
            ones = [cost(t, "latency") for t in yardstick] or [1.0] * len(known)
            logs = [math.log(cost(t, "latency") / one) for t, one in zip(known, ones, strict=True)]
            scores[candidate.id] = math.exp(sum(logs) / len(logs))
        noises[candidate.id] = max(noise_of(t, wishes.objective) for t in known)
    late = {c for c in scores if _is_late(evidence, c, buckets, wishes)}
    if len(late) < len(scores):
        scores = {c: s for c, s in scores.items() if c not in late}
    if not scores:
        return ORIGINAL.id
    if ORIGINAL.id in scores:
        if wishes.objective in ("memory", "size"):  # of which a variant's own times tell nothing
            noises = dict.fromkeys(noises, noises[ORIGINAL.id])
        own = noises[ORIGINAL.id]
        better = {c: s for c, s in scores.items() if s * (1 + max(own, noises[c])) < scores[ORIGINAL.id]}
        if not better:
            _note_noise(scores, noises, notes)
            return ORIGINAL.id
        scores = better
    best = min(scores, key=lambda c: scores[c])
    reach = 1 + min(noises.get(ORIGINAL.id, _MIN_NOISE), _MAX_TIE)
    ties = [c for c in allowed if scores.get(c.id, math.inf) <= scores[best] * reach]
    return min(ties, key=lambda c: (c.measurement.peak_bytes, c.measurement.size_bytes)).id


def _note_noise(scores: dict[str, float], noises: dict[str, float], notes: list[str]) -> None:
    """Say it where a gain was lost in noise that no quiet machine has."""
    best = min(scores, key=lambda c: scores[c])
    noise = max(noises[best], noises[ORIGINAL.id])
    gain = scores[ORIGINAL.id] / scores[best]
    if gain > 1 + _WORTH_A_NOTE and noise > _WORTH_A_NOTE:
        notes.append(
            f"{best} was {gain:.3g} times as good as the original, but the timings moved by {noise:.0%} from round to "
            "round, so nothing was chosen over the original: measure again on a quieter machine"
        )


def _timings(evidence: Evidence, name: str, buckets: Sequence[Bucket]) -> list[Timing]:
    """A variant's timings at every bucket; none if one of them is missing."""
    found = [t for b in buckets if (t := evidence.timing(name, b)) is not None]
    return found if len(found) == len(buckets) else []


def _is_late(evidence: Evidence, name: str, buckets: Sequence[Bucket], wishes: Wishes) -> bool:
    limit = wishes.max_latency_p99_ms or math.inf
    return all((t := evidence.timing(name, b)) is None or t.p99_ms > limit for b in buckets)


def _settle(evidence: Evidence, rank: Rank, chosen: str, wishes: Wishes) -> Rank:
    """Put the overall choice first unless this bucket's own best beats it by more than the noise.

    So a bundle holds a second engine only where that pays, and the original where nothing does.
    """
    if not rank.variants or chosen not in rank.variants or wishes.objective in ("memory", "size"):
        return rank
    best, own = evidence.timing(rank.variants[0], rank.bucket), evidence.timing(chosen, rank.bucket)
    if best is None or own is None or rank.variants[0] == chosen:
        return rank
    limit = wishes.max_latency_p99_ms or math.inf
    gain = cost(own, wishes.objective) / cost(best, wishes.objective) - 1
    both = noise_of(best, wishes.objective), noise_of(own, wishes.objective)
    needed = max(_MAX_TIE, max(both) if chosen == ORIGINAL.id else min(both))
    if gain > needed or own.p99_ms > limit >= best.p99_ms:
        return rank
    order = (chosen, *(v for v in rank.variants if v != chosen))
    return _compared(evidence, Rank(rank.bucket, order, 1.0, 0.0), wishes)
