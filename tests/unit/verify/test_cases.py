"""The trials cover what will be served: batch 1, odd sizes, every bucket, both ends of every range, ragged rows."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.spec import Spec, TensorSpec, default_buckets, parse_spec
from onecard.verify.cases import Case, make_cases


def spec_of(*texts: str) -> Spec:
    spec = parse_spec(texts)
    shape = ("B", "S") if "S" in spec.symbols else ("B", 4)
    return msgspec.structs.replace(spec, outputs=(TensorSpec("y", "float32", shape),) if spec.symbols else ())


IMAGE = spec_of("image: float32[B,3,8,8], B=1..64")
TEXT = spec_of("input_ids: int64[B,S], B=1..8, S=1..384", "attention_mask: int64[B,S]")


def test_batches_one_odd_every_bucket_and_the_largest():
    cases = make_cases(IMAGE, default_buckets(IMAGE))
    assert [c.bucket["B"] for c in cases] == [1, 3, 8, 64]


def test_shortest_and_longest_sequence_and_ragged_rows():
    cases = make_cases(TEXT, default_buckets(TEXT))
    sizes = {(c.bucket["B"], c.bucket["S"]) for c in cases}
    assert {(1, 1), (3, 1), (3, 384), (8, 384), (1, 96), (8, 96)} <= sizes
    ragged = [c for c in cases if c.ragged]
    assert len(ragged) == 1
    assert ragged[0].bucket["B"] % 2 == ragged[0].bucket["S"] % 2 == 1
    assert ragged[0].name.endswith("-ragged")


def test_no_batch_is_larger_than_will_be_served():
    cases = make_cases(IMAGE, [{"B": 1}, {"B": 4}])
    assert max(c.bucket["B"] for c in cases) == 4


def test_without_buckets_the_whole_range_is_tried():
    assert [c.bucket["B"] for c in make_cases(IMAGE, [])] == [1, 3, 64]


def test_a_fixed_model_has_one_case():
    assert make_cases(spec_of("x: float32[3]"), [{}]) == [Case({}, 0)]
    assert Case({}, 0).name == "fixed"


@pytest.mark.parametrize(("low", "high", "odd"), [(1, 2, 1), (2, 2, 2), (4, 8, 5), (2, 64, 3)])
def test_the_odd_batch_stays_inside(low, high, odd):
    cases = make_cases(spec_of(f"x: float32[B,4], B={low}..{high}"), [{"B": high}])
    assert odd in {c.bucket["B"] for c in cases}
    assert all(low <= c.bucket["B"] <= high for c in cases)


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 500), st.integers(0, 500))
def test_cases_are_distinct_in_range_and_smallest_first(batch, more, length, longer):
    spec = spec_of(f"ids: int64[B,S], B={batch}..{batch + more}, S={length}..{length + longer}", "mask: int64[B,S]")
    cases = make_cases(spec, default_buckets(spec))
    names = [c.name for c in cases]
    assert len(set(names)) == len(names)
    assert len({c.seed for c in cases}) == len(cases)
    assert all(size in spec.symbols[name] for c in cases for name, size in c.bucket.items())
    assert cases[0].bucket == spec.smallest()
    assert spec.largest() in [c.bucket for c in cases]
