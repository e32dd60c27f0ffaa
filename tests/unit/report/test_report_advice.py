from msgspec.structs import replace

from onecard.evidence import CardState, Rank, Verdict
from onecard.report.advice import advice
from tests.unit.report.evidence_sample import B1, B8, sample, timing


def actions(evidence):
    return " | ".join(item.action for item in advice(evidence))


def with_playoff(*timings, **changes):
    return replace(sample(), playoff={sample().chosen: timings}, **changes)


def test_missing_backends_are_grouped_by_their_cure():
    items = [item for item in advice(sample()) if "onecard[tensorrt]" in item.action]
    assert [item.recipes for item in items] == [("tensorrt", "tensorrt+fp16")]


def test_time_memory_and_wrong_answers_each_have_their_cure():
    said = actions(sample())
    assert "--candidate-time-limit" in said
    assert "Lower the largest batch" in said
    assert "“logits” of onnxruntime+fold_bn+int8. Calibrate" in said
    assert "quieter" not in said


def test_a_wrong_bf16_without_a_cure_is_pointed_to_autocast():
    bf16 = next(c for c in sample().candidates if c.id == "inductor+bf16")
    wrong = replace(bf16, verdict=Verdict("wrong", "too far off"))
    said = actions(replace(sample(), candidates=(*sample().candidates[:5], wrong)))
    assert "autocast_bf16" in said


def test_a_throttled_card_comes_first():
    hot = timing(B1, 4.1, 1, after=CardState(temperature_c=91.0, throttle=("thermal_slowdown",)))
    first = advice(with_playoff(hot))[0]
    assert "Cool the card" in first.action
    assert "thermal_slowdown" in first.why
    assert "91 °C" in first.why


def test_idle_is_not_a_throttle():
    idle = timing(B1, 4.1, 1, before=CardState(temperature_c=40.0, throttle=("gpu_idle",)))
    assert "Cool the card" not in actions(with_playoff(idle))


def test_wide_spread_and_few_samples():
    evidence = with_playoff(timing(B1, 4.1, 1, count=3), ranks=(Rank(B1, (sample().chosen,), 6.2, 0.2),))
    assert "quieter machine" in actions(evidence)
    assert "more time" in actions(evidence)


def test_a_card_with_room_wants_batches_and_a_waiting_one_graphs():
    waiting = timing(B1, 1.0, 1, device_ms=(0.2, 0.2))
    said = actions(with_playoff(waiting, timing(B8, 1.2, 2), ranks=()))
    assert "in batches" in said
    assert "CUDA-graph" in said


def test_without_labelled_data_it_asks_for_some():
    bare = tuple(replace(c, metric=None) for c in sample().candidates)
    assert "labelled data" in actions(replace(sample(), candidates=bare))
