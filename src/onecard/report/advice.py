"""What to try next: rules that read the evidence and say one thing to do, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onecard.evidence import Candidate, Evidence, Reason, Timing, quantile
from onecard.recipe import ORIGINAL
from onecard.report import figures
from onecard.report import format as fmt

WIDE_SPREAD = 0.10
"""Share of the median that the middle half of the samples may span before the machine counts as noisy."""
WIDE_NOISE = 0.05
FEW_SAMPLES = 10
HOT_C = 85.0
LONG_FIRST_CALL_MS = 5000.0
_IDLE_SHARE = 0.6
_FREE_GROWTH = 1.5
_FREE_ROWS = 4
_HARMLESS_THROTTLE = frozenset({"idle", "gpu_idle", "none"})


@dataclass(frozen=True)
class Advice:
    """One thing to try: what to do, why the evidence says so, and the recipes it is about."""

    action: str
    why: str
    recipes: tuple[str, ...] = ()


def advice(evidence: Evidence) -> tuple[Advice, ...]:
    """Everything the evidence suggests, what spoils the figures first."""
    rules: tuple[Callable[[Evidence], Iterator[Advice]], ...] = (
        _throttled,
        _noisy,
        _unavailable,
        _wrong,
        _timeouts,
        _out_of_memory,
        _crashed,
        _idle_card,
        _small_batch,
        _long_first_call,
        _compressed_fell,
        _not_compressed,
        _no_metric,
        _nothing_won,
    )
    return tuple(item for rule in rules for item in rule(evidence))


def _failed(evidence: Evidence, reason: Reason) -> list[Candidate]:
    return [c for c in evidence.candidates if c.verdict.reason == reason]


def _ids(candidates: list[Candidate]) -> tuple[str, ...]:
    return tuple(c.id for c in candidates)


def _playoff_timings(evidence: Evidence) -> list[Timing]:
    """The timings that the choice rests on."""
    return [t for timings in evidence.playoff.values() for t in timings] or [
        t for c in evidence.candidates if c.verdict.ok for t in c.measurement.timings
    ]


def _throttled(evidence: Evidence) -> Iterator[Advice]:
    timings = _playoff_timings(evidence)
    states = [s for t in timings for s in (t.before, t.after)]
    reasons = sorted({r for s in states for r in s.throttle} - _HARMLESS_THROTTLE)
    hottest = max((s.temperature_c for s in states if s.temperature_c is not None), default=0.0)
    if reasons:
        heat = f" at up to {hottest:.0f} °C" if hottest else ""
        yield Advice(
            "Cool the card or raise its power limit, then measure again.",
            f"The card slowed itself down during the play-off ({', '.join(reasons)}){heat}: "
            "the figures are lower than this card can do.",
        )
    elif hottest >= HOT_C:
        yield Advice("Look after the cooling.", f"The card reached {hottest:.0f} °C; soon above it will slow down.")


def _noisy(evidence: Evidence) -> Iterator[Advice]:
    timings = _playoff_timings(evidence)
    spreads = [t.iqr_ms / t.median_ms for t in timings if t.samples_ms and t.median_ms > 0]
    noise = max((r.noise for r in evidence.ranks), default=0.0)
    widest = max(spreads, default=0.0)
    if widest > WIDE_SPREAD or noise > WIDE_NOISE:
        yield Advice(
            "Measure again on a quieter machine.",
            f"The middle half of the samples spans up to {fmt.percent(widest)} of the median, and a gain had to "
            f"exceed {fmt.percent(noise)} to count. Stop other work, fix the clocks, and smaller gains will show.",
        )
    fewest = min((len(t.samples_ms) for t in timings), default=FEW_SAMPLES)
    if fewest < FEW_SAMPLES:
        yield Advice(
            "Give the measurement more time.",
            f"Some timings rest on {fewest} sample{'' if fewest == 1 else 's'}: their spread says little.",
        )


def _unavailable(evidence: Evidence) -> Iterator[Advice]:
    groups: dict[str, list[Candidate]] = {}
    for candidate in _failed(evidence, "unavailable"):
        groups.setdefault(candidate.verdict.cure or candidate.verdict.detail, []).append(candidate)
    for cure, candidates in groups.items():
        plural = "recipe" if len(candidates) == 1 else "recipes"
        yield Advice(
            f"Make {candidates[0].recipe.backend} available: {cure}",
            f"{len(candidates)} {plural} could not be tried here. {candidates[0].verdict.detail}".strip(),
            _ids(candidates),
        )


def _wrong(evidence: Evidence) -> Iterator[Advice]:
    for candidate in _failed(evidence, "wrong"):
        gain = max((figures.speedup(evidence, candidate.id, b) for b in figures.buckets(evidence)), default=0.0)
        if not gain > 1 or not candidate.errors:  # a wrong answer that is also slow is no loss
            continue
        worst = max(candidate.errors, key=lambda e: (e.relative_l2 != e.relative_l2, e.relative_l2))
        cure = candidate.verdict.cure or _cure_for(candidate.recipe.precision)
        yield Advice(
            f"Look at output “{worst.output}” of {candidate.id}. {cure}",
            f"It would be {fmt.times(gain)} the original's speed, but its relative error is "
            f"{fmt.relative_error(worst.relative_l2) if worst.relative_l2 == worst.relative_l2 else 'NaN'} "
            f"({worst.case}).",
            (candidate.id,),
        )


def _cure_for(precision: str) -> str:
    if precision in ("bf16", "fp16"):
        return f"Try autocast_{precision}, which keeps sensitive operations in fp32."
    return "With labelled data the task's own metric decides instead of this error."


def _timeouts(evidence: Evidence) -> Iterator[Advice]:
    late = _failed(evidence, "timeout")
    if late:
        longest = max(c.seconds for c in late)
        yield Advice(
            "Give slow candidates longer with --candidate-time-limit.",
            f"{len(late)} ran out of time (after up to {fmt.duration_s(longest)}).",
            _ids(late),
        )


def _out_of_memory(evidence: Evidence) -> Iterator[Advice]:
    big = _failed(evidence, "out_of_memory")
    if big:
        yield Advice(
            "Lower the largest batch, or free the card's memory.",
            f"{len(big)} ran out of memory; the largest size tried was "
            f"{fmt.sizes(evidence.spec.largest()) if evidence.spec.symbols else 'the fixed shape'}.",
            _ids(big),
        )


def _crashed(evidence: Evidence) -> Iterator[Advice]:
    broken = _failed(evidence, "crashed")
    if broken:
        yield Advice(
            "Run a crashed candidate alone with the command in its row.",
            f"{len(broken)} crashed in a process of their own; nothing else was touched. A newer version of the "
            "backend often cures it.",
            _ids(broken),
        )


def _idle_card(evidence: Evidence) -> Iterator[Advice]:
    for bucket in figures.buckets(evidence):
        name = figures.winner(evidence, bucket)
        timing = evidence.timing(name, bucket)
        if timing is None or not timing.device_ms or not timing.samples_ms:
            continue
        share = quantile(timing.device_ms, 0.5) / timing.median_ms
        if 0 < share < _IDLE_SHARE:
            yield Advice(
                f"At {fmt.sizes(bucket)}, spare the host: a CUDA-graph recipe, or larger batches.",
                f"{name} keeps the card busy for {fmt.percent(share)} of a call only; the rest goes to the host.",
                (name,),
            )


def _small_batch(evidence: Evidence) -> Iterator[Advice]:
    timings = [evidence.timing(figures.winner(evidence, b), b) for b in figures.buckets(evidence)]
    good = sorted((t for t in timings if t and t.samples_ms and t.median_ms > 0), key=lambda t: t.rows)
    if not evidence.device.startswith("cuda") or not good:
        return
    small, large = good[0], good[-1]
    if large.rows >= _FREE_ROWS * small.rows and large.median_ms < _FREE_GROWTH * small.median_ms:
        yield Advice(
            "Send requests in batches: the card has room.",
            f"{large.rows} rows take {fmt.duration_ms(large.median_ms)}, {small.rows} take "
            f"{fmt.duration_ms(small.median_ms)}: at the small size the time goes into launching, not computing.",
        )


def _long_first_call(evidence: Evidence) -> Iterator[Advice]:
    candidate = evidence.candidate(evidence.chosen)
    timings = candidate.measurement.timings if candidate else ()
    longest = max((t.first_call_ms for t in timings), default=0.0)
    if longest > LONG_FIRST_CALL_MS:
        yield Advice(
            "Warm the variant up before it gets traffic.",
            f"Its first call in a new process takes {fmt.duration_ms(longest)}.",
            (evidence.chosen,),
        )


def _compressed_fell(evidence: Evidence) -> Iterator[Advice]:
    fallen = [c for c in _failed(evidence, "wrong") if c.recipe.compressions]
    if not fallen:
        return
    schemes = ", ".join(dict.fromkeys(name for c in fallen for name in c.recipe.compressions))
    rows = max((found.rows for c in fallen for found in c.compression), default=0)
    given = f", more than the {rows:,} used here" if rows else ""
    kept = any(trial.kept for c in fallen for found in c.compression for trial in found.trials)
    tried = ", even with the most sensitive layers kept in higher precision" if kept else ""
    trained = any(not {"qat", "pruned"}.isdisjoint(c.recipe.compressions) for c in fallen)
    train = "Train for more epochs" if trained else "Train with the rounding in place ('onecard qat', then --qat)"
    yield Advice(
        f"{train}, or give more calibration rows with --calibration{given}.",
        f"{len(fallen)} compressed variant{'s' * (len(fallen) > 1)} ({schemes}) fell at the gate{tried}.",
        _ids(fallen),
    )


def _not_compressed(evidence: Evidence) -> Iterator[Advice]:
    if not any(c.compression or c.recipe.compressions for c in evidence.candidates):
        yield Advice(
            "Give representative inputs with --calibration, or labelled ones with --data: then INT8 and FP8 are tried.",
            "Without data there is nothing to set their scales by, nor to say what they cost.",
        )


def _no_metric(evidence: Evidence) -> Iterator[Advice]:
    if not any(c.metric for c in evidence.candidates):
        yield Advice(
            "Give labelled data, so that the task's own metric is the gate.",
            "Here the answers were only compared with the original's, which says nothing about the task.",
        )


def _nothing_won(evidence: Evidence) -> Iterator[Advice]:
    if evidence.chosen == ORIGINAL.id and len(evidence.candidates) > 1:
        yield Advice(
            "Allow more: a lower precision, larger batches, or the backends that are missing here.",
            "Nothing that agrees with the original was faster by more than the noise.",
        )
