"""Which method stands, and which layers are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard.calibration.bench import NO_ROWS_CURE, Bench, Judgement
from onecard.calibration.settle import settle
from onecard.errors import Unsupported
from onecard.evidence import LayerError
from onecard.spec import parse_spec

LAYERS = tuple(f"layer{i}" for i in range(8))
RANKED = tuple(LayerError(name, 1.0 / (i + 1)) for i, name in enumerate(LAYERS))


def bench(errors: dict[tuple[str, int], float], limit: float = 0.1, **more: Any) -> Bench:
    """A bench whose judge knows the error of each (method, number of layers kept)."""

    def judge(run: Any) -> Judgement:
        error = errors[run]
        return Judgement(error, None, error <= limit)

    return Bench(parse_spec(["x: float32[B,3], B=2..8"]), "cpu", {}, judge=judge, **more)


def make(method: str, kept: tuple[str, ...]) -> Any:
    return method, len(kept)


def test_the_method_with_the_smallest_error_stands():
    found = settle("int8", LAYERS, ("a", "b", "c"), make, bench({("a", 0): 0.05, ("b", 0): 0.02, ("c", 0): 0.3}))
    assert (found.method, found.kept, len(found.trials)) == ("b", (), 3)
    assert [t.passed for t in found.trials] == [True, True, False]


def test_the_worst_layers_are_kept_until_it_passes():
    errors = {("a", 0): 0.5, ("b", 0): 0.4, ("b", 1): 0.3, ("b", 2): 0.05}
    found = settle("int8", LAYERS, ("a", "b"), make, bench(errors), lambda: RANKED)
    assert (found.method, found.kept) == ("b", ("layer0", "layer1"))
    assert found.sensitivity == RANKED


def test_no_more_than_half_is_kept_and_the_best_stands_then():
    errors = {("a", 0): 0.5, ("a", 1): 0.4, ("a", 2): 0.2, ("a", 4): 0.3}
    found = settle("int8", LAYERS, ("a",), make, bench(errors), lambda: RANKED)
    assert [len(t.kept) for t in found.trials] == [0, 1, 2, 4]
    assert len(found.kept) == 2
    assert not found.trials[-1].passed


def test_without_a_judge_the_first_method_stands_untried():
    found = settle("int8", LAYERS, ("a", "b"), make, Bench(parse_spec(["x: float32[2,3]"]), "cpu", {}))
    assert (found.method, found.trials) == ("a", ())


def test_a_scheme_is_settled_once_and_recorded_once():
    records: list[Any] = []
    place = bench({("a", 0): 0.0}, record=records.append)
    first = settle("int8", LAYERS, ("a",), make, place)
    assert settle("int8", LAYERS, ("a",), make, place) is first
    assert records == [first]


def test_one_methods_failure_leaves_the_others():
    def fails(method: str, kept: tuple[str, ...]) -> Any:
        if method == "a":
            raise RuntimeError("no such observer")
        return make(method, kept)

    found = settle("int8", LAYERS, ("a", "b"), fails, bench({("b", 0): 0.01}))
    assert found.method == "b"
    assert found.notes == ("a trial failed: RuntimeError: no such observer",)


def test_if_every_method_fails_the_first_reason_is_raised():
    def fails(method: str, kept: tuple[str, ...]) -> Any:
        raise Unsupported(f"{method} cannot")

    with pytest.raises(Unsupported, match="a cannot"):
        settle("int8", LAYERS, ("a", "b"), fails, bench({}))


def test_nothing_to_compress():
    with pytest.raises(Unsupported, match="no layer that int8 applies to"):
        settle("int8", (), ("a",), make, bench({}))


def test_batches_are_of_sizes_that_the_model_takes():
    rows = {"x": torch.arange(21.0).reshape(7, 3)}
    place = bench({}, calibration=rows)  # B=2..8
    assert [len(b["x"]) for b in place.batches(4)] == [4, 3]
    assert [len(b["x"]) for b in place.batches(3)] == [3, 3]  # a single row cannot be run
    assert [len(b["x"]) for b in place.batches(1)] == [2, 2, 2]
    assert bench({}, calibration=rows).rows == 7


def test_without_rows_there_are_no_batches():
    with pytest.raises(Unsupported, match="representative inputs") as caught:
        next(bench({}).batches())
    assert caught.value.cure == NO_ROWS_CURE


def test_past_the_deadline_nothing_more_is_tried():
    errors = {("a", 0): 0.5, ("b", 0): 0.01, ("a", 1): 0.01}
    found = settle("int8", LAYERS, ("a", "b"), make, bench(errors, deadline=0.0), lambda: RANKED)
    assert (found.method, len(found.trials), found.sensitivity) == ("a", 1, ())
    assert "--candidate-time-limit" in found.notes[0]


def test_a_metric_above_the_originals_is_luck_and_does_not_choose():
    judged = {"a": Judgement(0.06, 0.56, True), "b": Judgement(0.13, 0.59, True), "c": Judgement(0.01, 0.2, False)}
    place = Bench(parse_spec(["x: float32[2,3]"]), "cpu", {}, judge=lambda run: judged[run[0]])  # type: ignore[index]
    assert settle("int8", LAYERS, ("a", "b", "c"), make, place).method == "a"
