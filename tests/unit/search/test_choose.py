"""The choice: constraints first, then the objective, and the original unless a gain exceeds the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import pytest

from onecard.evidence import Candidate, Evidence, Measurement, OutputError, Timing, Verdict
from onecard.recipe import ORIGINAL, Recipe
from onecard.search.choose import Choice, Wishes, choose, cost, finalists, noise_of
from onecard.spec import Bucket
from tests.unit.report.evidence_sample import environment, sample

B1, B8 = {"B": 1}, {"B": 8}
MIB = 1 << 20
FAST, SMALL, EXACT = Recipe("inductor"), Recipe("onnxruntime", "cpu"), Recipe("torchscript", "trace")


def timing(bucket: Bucket, median: float, *, spread: float = 0.0, tail: float = 0.0) -> Timing:
    """Fifty samples whose five chunks differ by ``spread``, the last at ``tail``."""
    chunks = [median * (1 + spread * step) for step in (0, 1, -1, 0.5, -0.5)]
    samples = [chunk for chunk in chunks for _ in range(10)]
    samples[-1] = max(tail, samples[-1])
    return Timing(bucket, tuple(samples), tuple(samples[:-1]), rows=bucket["B"])


def candidate(
    recipe: Recipe, one: float, eight: float, *, peak: int = 100, size: int = 10, error: float = 1e-6, **shape: float
) -> Candidate:
    timings = (timing(B1, one, **shape), timing(B8, eight, **shape))
    measured = Measurement(timings, peak_process_bytes=peak * MIB, size_bytes=size * MIB)
    errors = () if recipe == ORIGINAL else (OutputError("y", error, 1.0, error, None, "B1"),)
    return Candidate(recipe, Verdict("ok"), measured, errors)


def evidence(*candidates: Candidate, playoff: Mapping[str, Sequence[Timing]] | None = None) -> Evidence:
    return Evidence(
        model="m",
        spec=sample().spec,
        buckets=(B1, B8),
        objective="latency",
        device="cpu",
        environment=environment(),
        candidates=candidates,
        chosen="",
        playoff={name: tuple(timings) for name, timings in (playoff or {}).items()},
    )


def chosen(*candidates: Candidate, **wishes: object) -> Choice:
    return choose(evidence(*candidates), Wishes(**wishes))


def firsts(choice: Choice) -> list[str]:
    return [rank.variants[0] for rank in choice.ranks]


def test_the_fastest_is_chosen_with_its_speedup():
    choice = chosen(candidate(ORIGINAL, 10, 80), candidate(FAST, 5, 20), candidate(SMALL, 8, 60))
    assert choice.chosen == FAST.id
    assert [rank.variants for rank in choice.ranks] == [(FAST.id, SMALL.id, ORIGINAL.id)] * 2
    assert [rank.speedup for rank in choice.ranks] == pytest.approx([2.0, 4.0])
    assert choice.notes == ()


def test_the_original_alone_is_chosen_without_a_note():
    choice = chosen(candidate(ORIGINAL, 10, 80))
    assert (choice.chosen, firsts(choice), choice.notes) == (ORIGINAL.id, [ORIGINAL.id] * 2, ())


@pytest.mark.parametrize(
    ("spread", "gain", "expected"), [(0.0, 0.005, ORIGINAL), (0.0, 0.05, FAST), (0.2, 0.1, ORIGINAL)]
)
def test_a_gain_within_the_noise_is_none(spread, gain, expected):
    slow, fast = (10 * (1 + gain), 80 * (1 + gain)), (10, 80)
    choice = chosen(candidate(ORIGINAL, *slow, spread=spread), candidate(FAST, *fast, spread=spread))
    assert choice.chosen == expected.id
    assert firsts(choice) == [expected.id] * 2


def test_a_gain_beyond_the_noise_is_one_on_a_noisy_machine_too():
    noisy = {"spread": 0.2}
    assert chosen(candidate(ORIGINAL, 15, 120, **noisy), candidate(FAST, 10, 80, **noisy)).chosen == FAST.id


def test_a_tie_of_the_best_must_beat_the_original_itself():
    slow = candidate(ORIGINAL, 10, 80, spread=0.03)
    choice = chosen(slow, candidate(FAST, 9.6, 76.8), candidate(SMALL, 9.87, 79, peak=50))
    assert choice.chosen == FAST.id


def test_a_variant_whose_own_times_move_by_more_than_its_gain_has_none():
    choice = chosen(candidate(ORIGINAL, 10, 80), candidate(FAST, 9.5, 76, spread=0.25))
    assert (choice.chosen, firsts(choice)) == (ORIGINAL.id, [ORIGINAL.id] * 2)


def test_where_the_original_is_chosen_for_its_noise_it_serves():
    choice = chosen(candidate(ORIGINAL, 10, 80, spread=0.2), candidate(FAST, 9.5, 76))
    assert (choice.chosen, firsts(choice), choice.notes) == (ORIGINAL.id, [ORIGINAL.id] * 2, ())


def test_a_large_gain_that_is_lost_in_noise_is_told():
    choice = chosen(candidate(ORIGINAL, 30, 240, spread=0.99), candidate(FAST, 16, 128))
    assert choice.chosen == ORIGINAL.id
    assert "1.88 times as good as the original, but the timings moved by 99%" in choice.notes[0]


def test_what_did_not_pass_is_never_chosen():
    wrong = msgspec.structs.replace(candidate(FAST, 1, 1), verdict=Verdict("wrong"))
    choice = chosen(candidate(ORIGINAL, 10, 80), wrong)
    assert choice.chosen == ORIGINAL.id
    assert all(FAST.id not in rank.variants for rank in choice.ranks)
    assert FAST.id not in choice.pareto


def test_a_specialist_serves_its_bucket_only_beyond_the_noise():
    slow, good = candidate(ORIGINAL, 20, 160), candidate(FAST, 10, 40)
    within = chosen(slow, good, candidate(SMALL, 9.8, 100))
    assert (within.chosen, firsts(within)) == (FAST.id, [FAST.id, FAST.id])
    beyond = chosen(slow, good, candidate(SMALL, 8, 100))
    assert (beyond.chosen, firsts(beyond)) == (FAST.id, [SMALL.id, FAST.id])


def test_of_equally_fast_ones_the_smaller_is_chosen():
    slow = candidate(ORIGINAL, 20, 160)
    choice = chosen(slow, candidate(FAST, 10, 80, peak=900), candidate(SMALL, 10.05, 80.4, peak=100))
    assert choice.chosen == SMALL.id


def test_the_play_off_decides_where_there_was_one():
    pair = candidate(ORIGINAL, 10, 80), candidate(FAST, 5, 40), candidate(SMALL, 1, 8)
    playoff = {ORIGINAL.id: [timing(B1, 10), timing(B8, 80)], FAST.id: [timing(B1, 30), timing(B8, 240)]}
    choice = choose(evidence(*pair, playoff=playoff), Wishes())
    assert choice.chosen == ORIGINAL.id  # the small one did not take part


def test_memory_and_size_are_objectives():
    three = (
        candidate(ORIGINAL, 20, 160, peak=500, size=100),
        candidate(FAST, 5, 40, peak=900, size=120),
        candidate(SMALL, 15, 90, peak=200, size=110),
        candidate(EXACT, 18, 150, peak=450, size=25),
    )
    assert chosen(*three, objective="memory").chosen == SMALL.id
    assert chosen(*three, objective="size").chosen == EXACT.id
    assert firsts(chosen(*three, objective="memory")) == [SMALL.id] * 2


def test_a_variant_that_saves_no_memory_is_not_chosen_for_it():
    pair = candidate(ORIGINAL, 20, 160, peak=500), candidate(FAST, 5, 40, peak=499)
    assert chosen(*pair, objective="memory").chosen == ORIGINAL.id


def test_throughput_is_that_of_the_best_bucket():
    choice = chosen(
        candidate(ORIGINAL, 10, 80), candidate(FAST, 4, 70), candidate(SMALL, 9, 20), objective="throughput"
    )
    assert choice.chosen == SMALL.id
    assert firsts(choice) == [FAST.id, SMALL.id]


def test_the_memory_limit_comes_before_the_objective():
    choice = chosen(
        candidate(ORIGINAL, 20, 160, peak=300), candidate(FAST, 5, 40, peak=900), max_memory_bytes=400 * MIB
    )
    assert choice.chosen == ORIGINAL.id
    assert all(FAST.id not in rank.variants for rank in choice.ranks)


def test_the_closest_is_offered_when_nothing_fits_into_memory():
    choice = chosen(
        candidate(ORIGINAL, 20, 160, peak=300), candidate(SMALL, 25, 200, peak=200), max_memory_bytes=100 * MIB
    )
    assert choice.chosen == SMALL.id
    assert choice.notes == (f"no variant fits into 100 MiB; the closest, {SMALL.id}, needs 200 MiB",)


def test_what_does_not_keep_to_the_devices_memory_is_no_choice_however_fast():
    stream = candidate(Recipe("stream"), 30, 240, size=500)
    choice = chosen(candidate(ORIGINAL, 10, 80, size=500), candidate(SMALL, 5, 40, size=300), stream, device_memory=MIB)
    assert choice.chosen == "stream"
    assert [rank.variants for rank in choice.ranks] == [("stream",)] * 2
    assert choice.notes == ()


def test_where_the_original_does_not_fit_the_others_are_compared_among_themselves():
    broken = Candidate(ORIGINAL, Verdict("out_of_memory", "2 GiB were asked for"))
    choice = chosen(broken, candidate(SMALL, 25, 200), candidate(FAST, 5, 20))
    assert choice.chosen == FAST.id
    assert [rank.variants for rank in choice.ranks] == [(FAST.id, SMALL.id)] * 2


def test_the_latency_limit_comes_before_the_objective():
    jittery = candidate(FAST, 5, 40, tail=500)
    choice = chosen(candidate(ORIGINAL, 20, 160), jittery, candidate(SMALL, 10, 80), max_latency_p99_ms=100)
    assert choice.chosen == SMALL.id
    assert firsts(choice) == [SMALL.id] * 2
    assert choice.notes == ()


def test_the_closest_is_offered_when_nothing_is_fast_enough():
    choice = chosen(candidate(ORIGINAL, 20, 160), candidate(FAST, 10, 80), max_latency_p99_ms=15)
    assert firsts(choice) == [FAST.id] * 2
    assert choice.notes == (f"no variant keeps p99 within 15 ms at B8; the closest, {FAST.id}, takes 80 ms",)


def test_the_front_holds_whatever_is_best_at_something():
    choice = chosen(
        candidate(ORIGINAL, 20, 160, peak=500, size=100),
        candidate(FAST, 5, 40, peak=900, size=120),
        candidate(SMALL, 15, 90, peak=200, size=110, error=1e-2),
        candidate(EXACT, 21, 170, peak=600, size=101, error=1e-3),
    )
    assert set(choice.pareto) == {ORIGINAL.id, FAST.id, SMALL.id}


def test_a_candidate_that_missed_a_bucket_is_not_the_overall_choice():
    partial = candidate(FAST, 1, 1)
    partial = msgspec.structs.replace(
        partial, measurement=msgspec.structs.replace(partial.measurement, timings=partial.measurement.timings[:1])
    )
    choice = chosen(candidate(ORIGINAL, 10, 80), partial)
    assert choice.chosen == ORIGINAL.id
    assert firsts(choice) == [FAST.id, ORIGINAL.id]


def test_nothing_passed_at_all():
    choice = chosen(msgspec.structs.replace(candidate(ORIGINAL, 1, 1), verdict=Verdict("crashed")))
    assert choice.chosen == ORIGINAL.id
    assert [rank.variants for rank in choice.ranks] == [(), ()]


def test_finalists_are_the_original_and_the_fastest_of_every_bucket():
    many = [candidate(Recipe("eager", str(i)), 5 + i, 100 - i) for i in range(10)]
    failed = msgspec.structs.replace(candidate(FAST, 1, 1), verdict=Verdict("wrong"))
    picked = [c.id for c in finalists([*many, candidate(ORIGINAL, 50, 900), failed], (B1, B8), "latency", most=4)]
    assert picked[0] == ORIGINAL.id
    assert set(picked[1:3]) == {"eager.0", "eager.9"}
    assert len(picked) == 4
    assert FAST.id not in picked


def test_finalists_for_memory_are_the_smallest_too():
    small = candidate(SMALL, 90, 900, peak=1)
    many = [candidate(Recipe("eager", str(i)), 5 + i, 100 - i) for i in range(10)]
    picked = finalists([candidate(ORIGINAL, 50, 900), *many, small], (B1, B8), "memory", most=3)
    assert SMALL.id in {c.id for c in picked}


def test_noise_is_half_the_spread_of_the_chunks_but_never_under_one_per_cent():
    assert noise_of(timing(B1, 10, spread=0.1), "latency") == pytest.approx(0.1)
    assert noise_of(timing(B1, 10), "latency") == 0.01
    assert noise_of(Timing(B1, (1.0,)), "latency") == 0.01
    assert noise_of(Timing(B1, ()), "latency") == 0.01


def test_cost_is_of_one_call():
    one = Timing(B8, (4.0, 6.0), (2.0, 2.0), rows=8)
    assert cost(one, "latency") == 5.0
    assert math.isclose(cost(one, "throughput"), 2.0)
