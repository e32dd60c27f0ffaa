"""A variant answers any size: by padding up to a bucket, by splitting what is larger than all of them."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from onecard.bundle.variant import DYNAMIC, Site, VariantRunner, artifact_targets
from onecard.errors import SpecError
from onecard.recipe import Recipe
from onecard.spec import Bucket, Spec, TensorSpec, bucket_label, parse_spec

RECIPE = Recipe("eager", static=True)
IMAGE = msgspec.structs.replace(
    parse_spec(["x: float32[B,3], B=1..64"]), outputs=(TensorSpec("y", "float32", ("B", 3)),)
)
TEXT = msgspec.structs.replace(
    parse_spec(["ids: int64[B,S], B=1..64, S=1..32", "mask: int64[B,S]"]),
    outputs=(TensorSpec("last", "float32", ("B", "S", 2)), TensorSpec("pooled", "float32", ("B", 2))),
)


class Part:
    """What stands behind one bucket: takes just its shapes, and remembers its calls."""

    def __init__(self, spec: Spec, bucket: Bucket | None) -> None:
        self.spec, self.bucket = spec, bucket
        self.calls: list[dict[str, Tensor]] = []
        self.closed = False

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        for t in self.spec.inputs:
            assert inputs[t.name].is_contiguous()
            assert self.bucket is None or tuple(inputs[t.name].shape) == t.concrete(self.bucket)
        self.calls.append(inputs)
        return answer(inputs)

    def close(self) -> None:
        self.closed = True


def answer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if "x" in inputs:
        return {"y": inputs["x"] * 2}
    masked = (inputs["ids"] * inputs["mask"]).float()
    return {
        "last": torch.stack([masked, -masked], -1),
        "pooled": torch.stack([masked.sum(1), inputs["mask"].float().sum(1)], -1),
    }


def variant(spec: Spec, *buckets: Bucket | None) -> tuple[VariantRunner, dict[str, Part]]:
    parts = [Part(spec, b) for b in buckets]
    runner = VariantRunner(RECIPE, spec, "cpu", [(p.bucket, p) for p in parts])
    return runner, {DYNAMIC if p.bucket is None else bucket_label(p.bucket): p for p in parts}


def rows(count: int) -> dict[str, Tensor]:
    return {"x": torch.arange(3.0 * count).reshape(count, 3)}


def text(batch: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.arange(batch * length).reshape(batch, length) + 1, "mask": torch.ones(batch, length).long()}


def counts(parts: dict[str, Part]) -> dict[str, int]:
    return {name: len(p.calls) for name, p in parts.items() if p.calls}


@pytest.mark.parametrize(
    ("size", "calls"),
    [
        (1, {"B1": 1}),
        (4, {"B4": 1}),
        (3, {"B4": 1}),
        (5, {"B16": 1}),
        (16, {"B16": 1}),
        (17, {"B16": 1, "B1": 1}),
        (35, {"B16": 2, "B4": 1}),
        (64, {"B16": 4}),
    ],
)
def test_every_batch_is_answered_by_the_buckets_there_are(size, calls):
    runner, parts = variant(IMAGE, {"B": 16}, {"B": 1}, {"B": 4})
    inputs = rows(size)
    assert torch.equal(runner(inputs)["y"], inputs["x"] * 2)
    assert counts(parts) == calls


def test_padding_is_zeros_behind_the_rows():
    runner, parts = variant(IMAGE, {"B": 4})
    inputs = rows(3)
    before = inputs["x"].clone()
    runner(inputs)
    padded = parts["B4"].calls[0]["x"]
    assert torch.equal(padded[:3], before)
    assert not padded[3].any()
    assert torch.equal(inputs["x"], before)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5), (4, 8), (3, 9), (4, 32), (9, 7), (10, 32)])
def test_sequences_are_padded_and_cropped(batch, length):
    buckets = [{"B": b, "S": s} for b in (1, 4) for s in (8, 32)]
    runner, _ = variant(TEXT, *buckets)
    inputs = text(batch, length)
    found, wanted = runner(inputs), answer(inputs)
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_sequence_padding_is_masked():
    runner, parts = variant(TEXT, {"B": 2, "S": 8})
    runner(text(1, 5))
    padded = parts["B2-S8"].calls[0]["mask"]
    assert padded.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [0] * 8]


def test_the_order_of_a_buckets_symbols_does_not_matter():
    runner, parts = variant(TEXT, {"B": 2, "S": 8})
    runner(text(2, 8))
    assert counts(parts) == {"B2-S8": 1}


def test_a_bucket_of_another_sequence_is_used_for_its_batch():
    """Of the buckets that hold the sequence, the one with the largest batch takes the parts."""
    runner, parts = variant(TEXT, {"B": 16, "S": 8}, {"B": 2, "S": 32})
    assert runner(text(5, 20))["last"].shape == (5, 20, 2)
    assert counts(parts) == {"B2-S32": 3}


def test_an_output_with_a_size_of_its_own_is_left_whole_behind_the_batch():
    spec = msgspec.structs.replace(IMAGE, outputs=(TensorSpec("y", "float32", ("B", "y_1")),))
    runner, _ = variant(spec, {"B": 4})
    assert runner(rows(2))["y"].shape == (2, 3)


def test_a_size_that_no_bucket_holds_is_refused():
    runner, _ = variant(TEXT, {"B": 4, "S": 8})
    with pytest.raises(SpecError, match=r"no bucket of \['B4-S8'\] holds B1-S9"):
        runner(text(1, 9))


def test_without_a_batch_symbol_nothing_is_split():
    spec = msgspec.structs.replace(IMAGE, outputs=(TensorSpec("y", "float32", (3,)),))
    runner, _ = variant(spec, {"B": 4})
    with pytest.raises(SpecError, match="no bucket"):
        runner(rows(5))


def test_a_size_out_of_range_is_refused():
    runner, _ = variant(IMAGE, {"B": 4})
    with pytest.raises(SpecError, match="outside the range"):
        runner(rows(65))


def test_a_dynamic_variant_takes_the_inputs_as_they_are():
    runner, parts = variant(IMAGE, None)
    inputs = rows(37)
    runner(inputs)
    assert parts[DYNAMIC].calls[0]["x"] is inputs["x"]


def test_close_closes_every_part():
    for runner, parts in (variant(IMAGE, {"B": 1}, {"B": 4}), variant(IMAGE, None)):
        runner.close()
        assert all(p.closed for p in parts.values())


def test_artifacts_of_a_static_variant_share_and_come_largest_first(tmp_path):
    buckets = [{"B": 1}, {"B": 16}, {"B": 4}]
    found = list(artifact_targets(tmp_path, RECIPE, Site(IMAGE, tuple(buckets), "cpu", tmp_path / "source")))
    assert [folder.name for folder, _ in found] == ["B16", "B4", "B1"]
    assert len({id(target.memo) for _, target in found}) == 1
    assert {target.shared for _, target in found} == {tmp_path / "shared"}


def test_a_dynamic_variant_is_one_artifact(tmp_path):
    found = list(artifact_targets(tmp_path, Recipe("eager"), Site(IMAGE, ({"B": 1}, {"B": 4}), "cpu", tmp_path)))
    assert [(folder.name, target.bucket) for folder, target in found] == [(DYNAMIC, None)]


@pytest.mark.parametrize("inputs", [{}, {"y": torch.ones(2, 3)}, {"x": torch.ones(2, 3), "z": torch.ones(2, 3)}])
def test_a_bucket_s_own_size_is_no_way_around_the_names(inputs):
    run, parts = variant(IMAGE, {"B": 2})
    with pytest.raises(SpecError, match="takes inputs"):
        run(inputs)
    assert not parts["B2"].calls
