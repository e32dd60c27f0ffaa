"""Whether there is something to compare with: the original ran, or was only too large."""

import pytest

from onecard.errors import SearchError
from onecard.evidence import Candidate, Verdict
from onecard.recipe import ORIGINAL, Recipe
from onecard.search.outcome import check_original

STREAM = Candidate(Recipe("stream"), Verdict("ok"))


def done(reason: str, *others: Candidate) -> dict[str, Candidate]:
    return {c.id: c for c in (Candidate(ORIGINAL, Verdict(reason, "2 GiB", "Buy more.")), *others)}


def test_an_original_that_runs_needs_no_word():
    assert check_original(done("ok", STREAM)) == []


def test_one_that_is_too_large_is_noted_where_something_else_runs():
    (note,) = check_original(done("out_of_memory", STREAM))
    assert "does not fit" in note


def test_an_original_that_is_never_the_same_is_told_what_to_look_for():
    with pytest.raises(SearchError, match="does not agree with itself: 2 GiB") as caught:
        check_original(done("wrong", STREAM))
    for cause in ("model.eval()", "random", "state", "in place"):
        assert cause in caught.value.cure
    assert "Buy more" not in caught.value.cure


@pytest.mark.parametrize("candidates", [done("out_of_memory"), done("crashed", STREAM)])
def test_without_an_original_there_is_no_search(candidates):
    with pytest.raises(SearchError, match=r"does not run here: 2 GiB.*Buy more"):
        check_original(candidates)
