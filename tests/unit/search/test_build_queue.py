"""The order of builds: side by side, and alone where memory was too little for several."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.evidence import Verdict
from onecard.recipe import Recipe
from onecard.search.build_queue import BuildQueue

OK, FULL, BROKEN = (Verdict(reason, "") for reason in ("ok", "out_of_memory", "crashed"))
A, B, C = (Recipe("eager", transforms=(precision,)) for precision in ("fp32", "fp16", "bf16"))


def test_as_many_at_a_time_as_there_are_places():
    queue = BuildQueue([A, B, C], 2)
    assert [queue.next(), queue.next(), queue.next()] == [A, B, None]
    assert queue.ended(A, OK)
    assert queue.next() == C


def test_what_ran_out_of_memory_beside_others_is_built_alone_after_them():
    queue = BuildQueue([A, B, C], 2)
    assert [queue.next(), queue.next()] == [A, B]
    assert not queue.ended(A, FULL)
    assert queue.next() == C
    assert not queue.ended(B, FULL)
    assert queue.next() is None  # C is still building
    assert queue.ended(C, OK)
    assert [queue.next(), queue.next()] == [A, None]
    assert queue.ended(A, FULL)  # alone: that counts
    assert queue.next() == B
    assert queue.ended(B, OK)
    assert queue.next() is None


def test_what_fails_alone_or_otherwise_is_not_tried_again():
    queue = BuildQueue([A, B], 2)
    assert queue.next() == A
    assert queue.ended(A, FULL)
    assert queue.next() == B
    assert queue.ended(B, BROKEN)
    assert queue.next() is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(st.integers(1, 4), st.lists(st.sampled_from([OK, FULL, BROKEN]), min_size=60, max_size=60), st.randoms())
def test_every_candidate_ends_once_and_the_last_word_on_memory_is_spoken_alone(width, verdicts, random):
    recipes = [Recipe("eager", transforms=(p,)) for p in ("fp32", "tf32", "fp16", "bf16", "autocast_fp16")]
    queue, running, final = BuildQueue(recipes, width), [], []
    for verdict in verdicts:
        while (recipe := queue.next()) is not None:
            running.append((recipe, []))
            for other, beside in running:
                beside.extend(r for r, _ in running if r != other)
        assert len(running) <= width
        if not running:
            break
        recipe, beside = running.pop(random.randrange(len(running)))
        if queue.ended(recipe, verdict):
            final.append(recipe)
            assert verdict != FULL or not beside
        else:
            assert verdict == FULL
            assert beside
    assert not running
    assert sorted(r.id for r in final) == sorted(r.id for r in recipes)
