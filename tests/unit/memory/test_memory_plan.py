"""The plan's arithmetic, the largest batch, and the advice."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
import torch
from torch import nn

from onecard.errors import BundleError, UsageError
from onecard.evidence import Verdict
from onecard.memory.figures import BucketPlan, Measured, MemoryPart
from onecard.memory.parts import Place, parts_of, slot_bytes, staging
from onecard.memory.plan import MemoryPlan, PlanOptions, Prediction, make_plan
from onecard.spec import parse_spec
from tests.unit.memory.planned_models import IMAGE, ROW, ROW_BYTES, VECTOR, Asks, Chain, ResNet, Tied

MIB = 1 << 20
PREDICTION = Prediction(
    road="as written",
    weights_bytes=100 * MIB,
    inputs_bytes=4 * MIB,
    outputs_bytes=2 * MIB,
    answer_bytes=3 * MIB,
    activations_bytes=30 * MIB,
    peak_layer="body.1",
    peak_tensors=1,
    peak_bytes=32 * MIB,
    reserved_bytes=150 * MIB,
    convolution_bytes=10 * MIB,
    has_products=True,
)


def sizes(place: Place, graph_bytes: int = 0) -> dict[str, float]:
    return {part.name: part.nbytes / MIB for part in parts_of(PREDICTION, place, graph_bytes)}


def only(model: nn.Module, spec: str, **options: object) -> MemoryPlan:
    settled = PlanOptions(device="cpu", measure=False, **options)
    return make_plan(model, inputs=[spec], options=settled)


def test_the_parts_on_a_card():
    found = sizes(Place("cuda:0", "9.0", 3), 5 * MIB)
    assert found == {
        "weights": 100,
        "inputs": 4,
        "outputs": 2,
        "activations": 30,
        "workspace": 32 + 10,
        "graphs": 5,
        "slack": 150 - 136,
        "staging": 2 * (4 + 3),
    }
    assert sizes(Place("cuda:0", "8.6", 1))["workspace"] == 8.125 + 10
    assert "staging" not in sizes(Place("cuda:0", "8.6", 1))


def test_the_parts_on_a_cpu():
    found = sizes(Place("cpu", "", 2))
    assert (found["workspace"], found["slack"], found["staging"]) == (16, 32, 7)
    assert "graphs" not in found


def test_a_row_needs_what_was_measured_or_else_predicted():
    parts = (MemoryPart("weights", 10), MemoryPart("activations", 5), MemoryPart("staging", 3))
    row = BucketPlan({"B": 1}, parts=parts)
    assert (row.call_bytes, row.staging_bytes, row.predicted_bytes, row.need_bytes) == (15, 3, 18, 18)
    measured = msgspec.structs.replace(row, measured=Measured(10, 20, 30, 4), verdict=Verdict("ok"))
    assert measured.need_bytes == 27
    assert BucketPlan({"B": 1}).need_bytes is None
    unpredicted = msgspec.structs.replace(measured, parts=(MemoryPart("staging", 3),))
    assert (unpredicted.call_bytes, unpredicted.predicted_bytes, unpredicted.need_bytes) == (None, None, 27)


def test_the_slots_of_a_spec():
    spec = parse_spec(["x: float16[B,3], B=1..8", "mask: bool[B,S], S=1..4"])
    assert slot_bytes(spec, {"B": 2, "S": 4}) == 2 * 3 * 2 + 2 * 4
    assert staging(10, Place("cpu", "", 1)) == ()
    assert staging(10, Place("cpu", "", 4))[0].nbytes == 30


@pytest.mark.parametrize("limit", [17 * MIB + 100_000, 20 * MIB, 28 * MIB])
def test_the_largest_batch_is_the_largest(limit):
    plan = only(ResNet(), "image: float32[B,3,64,64], B=1..40", device_memory=limit, batches=(1, 40))
    everything = only(ResNet(), "image: float32[B,3,64,64], B=1..40", batches=tuple(range(1, 41)))
    fitting = [row.bucket["B"] for row in everything.buckets if (row.need_bytes or 0) <= limit]
    assert plan.largest is not None
    assert 1 < plan.largest.batch == max(fitting) < 40
    assert not plan.largest.verified
    assert plan.bucket({"B": plan.largest.batch}) is not None


def test_the_end_of_the_range_and_nothing_at_all():
    plan = only(Chain(), VECTOR)
    assert plan.largest is not None
    assert (plan.largest.batch, plan.largest.is_range_end, plan.advice) == (64, True, ())
    assert all(row.fits for row in plan.buckets)
    plan = only(Chain(), VECTOR, device_memory=2 * MIB)
    assert plan.largest is not None
    assert plan.largest.batch == 0
    assert not any(row.fits for row in plan.buckets)


def test_without_a_batch_there_is_no_largest():
    plan = only(Chain(), f"x: float32[2,{ROW}]")
    assert plan.largest is None
    assert [row.label for row in plan.buckets] == ["fixed"]


def test_each_slot_holds_one_calls_inputs_and_outputs():
    one, three = only(Chain(), VECTOR, depth=1), only(Chain(), VECTOR, depth=3)
    for a, b in zip(one.buckets, three.buckets, strict=True):
        assert (b.predicted_bytes or 0) - (a.predicted_bytes or 0) == 2 * 2 * ROW_BYTES * a.bucket["B"]


def test_what_cannot_be_predicted_is_a_row_with_its_reason():
    plan = only(Asks(), VECTOR, depth=3)
    assert all(row.fits is None and "asks what is in a tensor" in row.note for row in plan.buckets)
    assert all(row.call_bytes is None and row.staging_bytes == 16 * ROW * row.bucket["B"] for row in plan.buckets)
    assert plan.largest is None


class Heavy(nn.Module):
    """Many layers of weights and hardly an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(ROW, ROW, bias=False) for _ in range(16)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_advice_says_what_fits_first_and_what_each_would_take():
    plan = only(Heavy(), VECTOR, device_memory=40 * MIB)
    assert plan.advice_for == {"B": 64}
    found = {advice.what.split()[0]: advice for advice in plan.advice}
    assert set(found) == {"Run", "Stream"}
    need = next(row.need_bytes for row in plan.buckets if row.bucket == plan.advice_for) or 0
    assert found["Stream"].fits
    assert need - found["Stream"].need_bytes == (16 - 2) * 4 * ROW * ROW
    assert not found["Run"].fits
    assert 30 * MIB < need - found["Run"].need_bytes <= 33 * MIB
    assert "bf16" in found["Run"].what
    assert [advice.fits for advice in plan.advice] == sorted((a.fits for a in plan.advice), reverse=True)
    assert any("64.0 MiB" in note for note in plan.notes)


def test_a_smaller_batch_and_fewer_slots_are_advised():
    plan = only(ResNet(), IMAGE, device_memory=20 * MIB)
    texts = [advice.what for advice in plan.advice if advice.fits]
    assert plan.largest is not None
    assert any(f"--batch {plan.largest.batch}" in text for text in texts)


@pytest.mark.timeout(600)
def test_a_live_module_is_measured_and_the_largest_batch_verified(cache):
    limit = 120 * MIB
    said: list[str] = []
    options = PlanOptions(device="cpu", device_memory=limit, batches=(1, 64), time_limit_s=200, depth=1)
    plan = make_plan(Wide(), inputs=["x: float32[B,262144], B=1..64"], options=options, observe=said.append)
    assert plan.largest is not None
    assert plan.largest.verified
    assert 1 < plan.largest.batch < 64
    assert plan.largest.need_bytes <= limit
    for row in plan.buckets:
        assert row.verdict.ok
        assert row.measured is not None
        assert row.measured.peak_bytes >= (row.part("inputs") + row.part("outputs") + row.part("activations")) * 0.95
        assert row.measured.peak_bytes <= (row.call_bytes or 0) + 64 * MIB
        assert row.fits == ((row.need_bytes or 0) <= limit)
    assert "measuring B1" in said
    assert list((cache / "plans").iterdir()) == []
    assert msgspec.json.decode(msgspec.json.encode(plan), type=MemoryPlan) == plan


class Wide(nn.Module):
    """One MiB a row, three times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return (y * 2).sum(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "expected one of fp32, fp16, bf16"),
        ({"depth": 0}, "no slot"),
        ({"time_limit_s": 0}, "more than nothing"),
        ({"device_memory": 0}, "leaves nothing"),
        ({"device_memory": 1 << 60, "measure": True}, "more than cpu has"),
        ({"device": "abacus"}, "cpu"),
        ({"batches": (65,)}, "outside B=1..64"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        make_plan(Chain(), inputs=[VECTOR], options=PlanOptions(**{"device": "cpu", "measure": False, **options}))


def test_another_machine_may_be_planned_for_without_measuring():
    plan = only(Tied(), VECTOR, device_memory=1 << 60)
    assert all(row.fits for row in plan.buckets)


def test_a_folder_that_is_no_bundle(tmp_path):
    for path in (tmp_path, tmp_path / "absent.onecard"):
        with pytest.raises(BundleError, match="no onecard bundle"):
            make_plan(path, options=PlanOptions(device="cpu", measure=False))


def test_the_types_cost_no_torch():
    code = (
        "import sys, onecard.memory.plan, onecard.device_memory, onecard.cli_memory; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
