"""The figures that the page and the terminal both show, derived from the raw evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from onecard.evidence import Candidate, Evidence, Rank, Timing
from onecard.recipe import ORIGINAL
from onecard.report import format as fmt
from onecard.spec import Bucket

Fragment = tuple[Literal["text", "code", "number"], str]
"""A piece of a sentence: raw text, and how it is set off; whoever shows it escapes it."""

LABELS = {
    "ok": ("✓", "passed"),
    "wrong": ("✗", "wrong"),
    "slower": ("≈", "slower"),
    "crashed": ("!", "crashed"),
    "timeout": ("!", "timeout"),
    "out_of_memory": ("!", "out of memory"),
    "unavailable": ("○", "unavailable"),
    "unsupported": ("○", "unsupported"),
    "skipped": ("○", "skipped"),
}
_UNTRIED = ("skipped", "unavailable")
_ORDER = {reason: position for position, reason in enumerate(LABELS)}


def by_throughput(evidence: Evidence) -> bool:
    """Whether the search was after rows a second, not after the shortest call."""
    return "throughput" in evidence.objective


def timing_pair(evidence: Evidence, recipe_id: str, bucket: Bucket) -> tuple[Timing | None, Timing | None]:
    """A variant's timing and the original's under the same conditions.

    The play-off interleaves its candidates, so its figures compare only with one another: a variant
    that was not in it is set against the original's own, earlier measurement.
    """
    timing = _sound(evidence.timing(recipe_id, bucket))
    reference = _sound(evidence.timing(ORIGINAL.id, bucket))
    in_playoff = any(t.bucket == bucket for t in evidence.playoff.get(recipe_id, ()))
    original = evidence.candidate(ORIGINAL.id)
    if not in_playoff and original and recipe_id != ORIGINAL.id:
        reference = _sound(original.measurement.timing(bucket)) or reference
    return timing, reference


def _sound(timing: Timing | None) -> Timing | None:
    """The timing, if it can be divided by."""
    return timing if timing and timing.samples_ms and timing.median_ms > 0 else None


def speedup(evidence: Evidence, recipe_id: str, bucket: Bucket) -> float:
    """How many times faster than the original, by the search's objective; NaN if not measured."""
    timing, reference = timing_pair(evidence, recipe_id, bucket)
    if timing is None or reference is None:
        return math.nan
    if by_throughput(evidence):
        return timing.throughput / reference.throughput
    return reference.median_ms / timing.median_ms


def buckets(evidence: Evidence) -> tuple[Bucket, ...]:
    """The sizes to report; a model without symbols has one, without a name."""
    return evidence.buckets or tuple(rank.bucket for rank in evidence.ranks) or ({},)


def rank_of(evidence: Evidence, bucket: Bucket) -> Rank | None:
    """The ranking of one bucket, if there is one that names a variant."""
    return next((r for r in evidence.ranks if r.bucket == bucket and r.variants), None)


def winner(evidence: Evidence, bucket: Bucket) -> str:
    """The variant that serves a bucket."""
    rank = rank_of(evidence, bucket)
    return rank.variants[0] if rank else evidence.chosen


def won_speedup(evidence: Evidence, bucket: Bucket) -> float:
    """The winner's speed-up as the search decided it, or else from the timings."""
    rank = rank_of(evidence, bucket)
    return rank.speedup if rank else speedup(evidence, evidence.chosen, bucket)


def ordered(evidence: Evidence) -> list[Candidate]:
    """Every candidate: the chosen one first, then the sound ones by speed, then by kind of failure."""

    def key(candidate: Candidate) -> tuple[bool, int, float, str]:
        gains = [speedup(evidence, candidate.id, b) for b in buckets(evidence)]
        finite = [math.log(g) for g in gains if g > 0]
        gain = sum(finite) / len(finite) if finite else -math.inf
        return (candidate.id != evidence.chosen, _ORDER[candidate.verdict.reason], -gain, candidate.id)

    return sorted(evidence.candidates, key=key)


def worst_agreement(candidate: Candidate) -> float | None:
    """The lowest top-1 agreement over the outputs that have one."""
    known = [e.top1_agreement for e in candidate.errors if e.top1_agreement is not None]
    return min(known, default=None)


def outcome(evidence: Evidence) -> list[Fragment]:
    """The whole report in one sentence, in fragments for whoever shows it."""
    return list(_outcome(evidence))


def outcome_text(evidence: Evidence) -> str:
    """The whole report in one sentence of plain text."""
    parts = (f"`{text}`" if kind == "code" else text for kind, text in outcome(evidence))
    return fmt.clean("".join(parts)).replace("\n", " ")


def headline_bucket(evidence: Evidence) -> Bucket:
    """The bucket the sentence speaks of: the first one that the chosen variant wins."""
    won = (b for b in buckets(evidence) if winner(evidence, b) == evidence.chosen)
    return next(won, buckets(evidence)[0])


def _outcome(evidence: Evidence) -> Iterator[Fragment]:
    bucket = headline_bucket(evidence)
    timing, reference = timing_pair(evidence, evidence.chosen, bucket)
    at = f" at {fmt.sizes(bucket)}" if len(buckets(evidence)) > 1 else ""
    if evidence.candidate(evidence.chosen) is None:
        yield ("text", "No variant was chosen: nothing ran and agreed with the original.")
        return
    yield ("code", evidence.chosen)
    if timing is None:
        yield ("text", " was chosen; it was not timed.")
        return
    if by_throughput(evidence):
        yield from (("text", " answers "), ("number", f"{fmt.count(timing.throughput)} rows/s{at}"))
    else:
        yield from (("text", " answers in "), ("number", f"{fmt.duration_ms(timing.median_ms)}{at}"))
    if evidence.chosen == ORIGINAL.id:
        yield ("text", f". It is the original{_why_original(evidence)}.")
        return
    if reference is not None:
        was = (
            f"{fmt.count(reference.throughput)} rows/s"
            if by_throughput(evidence)
            else fmt.duration_ms(reference.median_ms)
        )
        yield from _faster(won_speedup(evidence, bucket), was)
    yield from _agrees(evidence)


def _why_original(evidence: Evidence) -> str:
    others = [c for c in evidence.candidates if c.id != ORIGINAL.id]
    if all(c.verdict.reason in _UNTRIED for c in others):
        return "; nothing else was tried"
    elsewhere = [fmt.sizes(b) for b in buckets(evidence) if winner(evidence, b) != ORIGINAL.id]
    if elsewhere:
        return f"; another variant serves {', '.join(elsewhere)}" if len(buckets(evidence)) > 1 else ""
    return ": no variant that agrees with it was faster by more than the noise"


def _faster(ratio: float, was: str) -> Iterator[Fragment]:
    if not math.isfinite(ratio):
        return
    if ratio >= 1:
        yield from (("text", ", "), ("number", f"{fmt.plain_times(ratio)} times faster"))
    else:  # chosen for memory or size, at a cost in time
        yield from (("text", ", at "), ("number", f"{ratio:.2f} times the speed"))
    yield ("text", f"{' than' if ratio >= 1 else ' of'} the original ({was})")


def _agrees(evidence: Evidence) -> Iterator[Fragment]:
    candidate = evidence.candidate(evidence.chosen)
    if candidate is None:
        return
    error = candidate.worst_error
    if candidate.verdict.ok and math.isfinite(error):
        yield from (("text", ", and agrees with it (relative error "), ("number", fmt.relative_error(error)))
        if candidate.metric:
            m = candidate.metric
            yield ("text", f"; {m.name} {m.value:.4g}, original {m.original:.4g}")
        yield ("text", ")")
    yield ("text", ".")
