"""Which recipes are offered for a model on a machine, and which of them a pattern picks."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from torch import nn

from onecard.environment import Card
from onecard.errors import UsageError
from onecard.models.load import load_model
from onecard.recipe import ORIGINAL, Recipe
from onecard.search.recipes import Traits, default_recipes, parse_recipe, select_recipes, traits_of
from tests.unit.report.evidence_sample import environment

FLAGS = [name for name in Traits.__dataclass_fields__ if name != "alternatives"]
NONE = Traits(*[False] * len(FLAGS))


def traits(*names: str) -> Traits:
    programs = tuple(name for name in ("pruned", "qat") if name in names)
    return Traits(**{name: name in names for name in FLAGS}, alternatives=programs)


def ids(*names: str) -> list[str]:
    return [r.id for r in default_recipes(traits(*names))]


def test_the_original_is_always_first_and_nothing_comes_twice():
    for flags in itertools.product([False, True], repeat=len(FLAGS)):
        recipes = default_recipes(Traits(*flags, alternatives=("pruned", "qat")))
        assert recipes[0] == ORIGINAL
        assert len(set(recipes)) == len(recipes) > 1


def test_layers_decide_about_transforms():
    assert not [name for name in ids("cuda") + ids() if "fold_bn" in name or "channels_last" in name]
    assert "eager+channels_last+fold_bn" in ids("convs", "norms")
    assert "eager+fold_bn" in ids("norms")
    assert "inductor+channels_last+fold_bn+fp16@bucket" in ids("cuda", "convs", "norms")


def test_fusions_are_tried_where_there_may_be_something_to_fuse():
    assert "eager+channels_last+fold_bn+fuse_activation" in ids("convs", "norms")
    assert "cudagraph.eager+channels_last+fold_bn+fuse_activation+fp16@bucket" in ids("cuda", "convs", "norms")
    assert "eager+fuse_qkv" in ids("linears")
    assert "cudagraph.inductor+fuse_qkv+fp16@bucket" in ids("cuda", "linears")
    assert not [name for name in ids("linears", "convs") + ids() if "fuse" in name]


def test_the_card_decides_about_engines_and_precision():
    assert not [name for name in ids("cuda") if "openvino" in name or "tf32" in name]
    assert "eager+tf32" in ids("cuda", "tf32")
    assert not [name for name in ids() if "cuda" in name or "16" in name]
    assert "openvino.bf16" in ids("cpu_bf16")


def test_weights_are_streamed_where_the_devices_memory_is_limited():
    streamed = [name for name in ids("cuda", "bf16", "limited") if "stream" in name]
    assert streamed == ["stream+fp16", "stream+bf16", "stream"]
    assert [name for name in ids("limited") if "stream" in name] == ["stream"]
    assert not [name for name in ids("cuda") + ids("onnx", "limited") if "stream" in name]


def test_compression_is_offered_where_its_loss_can_be_known():
    assert not [r for r in default_recipes(traits("convs", "linears", "norms")) if r.compressions]
    assert "onnxruntime.cpu+fold_bn+int8" in ids("convs", "norms", "rows")
    assert "onnxruntime.cpu+int8_dynamic" in ids("linears", "rows")
    assert "onnxruntime.cpu+int8_dynamic" not in ids("linears", "convs", "rows")
    assert "cudagraph.inductor+fp16+fp8@bucket" in ids("cuda", "fp8", "rows")
    assert not [name for name in ids("cuda", "rows") if "fp8" in name or "sparse24" in name]


def test_programs_in_the_originals_place_are_tried_in_every_engine():
    assert {"eager+pruned", "onnxruntime.cpu+pruned", "openvino+pruned", "inductor+qat@bucket"} <= {
        *ids("pruned", "qat")
    }
    assert "onnxruntime.cpu+pruned+int8" in ids("pruned", "rows")
    assert "cudagraph.inductor+pruned+fp16@bucket" in ids("cuda", "pruned")


def test_a_dynamic_engine_is_only_worth_it_where_sizes_change():
    assert "inductor" in ids("symbols")
    assert "inductor" not in ids()


def test_an_onnx_model_runs_in_onnx_engines_only():
    assert ids("onnx") == ["eager", "onnxruntime.cpu", "openvino"]
    assert ids("onnx", "cuda") == ["eager", "onnxruntime.cuda", "onnxruntime.tensorrt"]


def test_own_backends_are_tried_too(monkeypatch):
    monkeypatch.setenv("ONECARD_BACKENDS", "mine=my.module:Mine")
    assert "mine" in ids()
    assert parse_recipe("mine.fast+fp16@bucket") == Recipe("mine", "fast", ("fp16",), static=True)


def test_traits_are_read_from_the_model_and_the_machine():
    model = load_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), inputs=["x: float32[B,3,8,8], B=1..4"]
    )
    on_gpu = traits_of(model, environment())
    assert on_gpu == traits("convs", "norms", "symbols", "cuda", "tf32", "bf16", "fp8", "sparse")
    turing = msgspec.structs.replace(environment(), card=Card("T4", "7.5", 1 << 34, "580"))
    old = traits_of(model, turing)
    assert not (old.tf32 or old.bf16 or old.fp8 or old.sparse)
    cpu = msgspec.structs.replace(environment(), card=None, device="cpu", cpu_flags=("avx2", "amx_bf16"))
    assert traits_of(model, cpu) == traits("convs", "norms", "symbols", "cpu_bf16")


def test_a_fixed_model_without_convolutions_has_none_of_them():
    model = load_model(nn.Linear(3, 4), inputs=["x: float32[2,3]"])
    cpu = msgspec.structs.replace(environment(), card=None, device="cpu", cpu_flags=())
    assert traits_of(model, cpu) == traits("linears")
    assert traits_of(model, cpu, True, ("qat",)) == traits("linears", "rows", "qat")


def test_no_pattern_means_all():
    assert select_recipes(NONE, []) == default_recipes(NONE)


def test_patterns_pick_and_the_original_stays():
    found = [r.id for r in select_recipes(traits("convs"), ["torchscript*", "eager*"])]
    assert found[0] == "eager"
    assert all(name.startswith(("torchscript", "eager")) for name in found)
    assert "torchscript.script" in found
    assert len(set(found)) == len(found)


def test_a_whole_id_that_is_not_offered_is_tried_all_the_same():
    assert select_recipes(NONE, ["eager+fold_bn+bf16"]) == [ORIGINAL, Recipe("eager", "", ("fold_bn", "bf16"))]


def test_a_pattern_that_picks_nothing_lists_what_is_on_offer():
    with pytest.raises(UsageError, match=r"no recipe matches 'tensor\*'\. On offer here: eager, onnxruntime\.cpu"):
        select_recipes(NONE, ["tensor*"])


@pytest.mark.parametrize(("capability", "offered"), [("7.0", False), ("7.5", False), ("8.0", True), ("12.0", True)])
def test_bf16_is_offered_on_cards_that_compute_in_it(capability, offered):
    model = load_model(nn.Linear(3, 4), inputs=["x: float32[B,3], B=1..4"])
    card = Card("a card", capability, 1 << 34, "580")
    found = traits_of(model, msgspec.structs.replace(environment(), card=card), rows=True, limited=True)
    names = [r.id for r in default_recipes(found)]
    in_bf16 = ["cudagraph.inductor+bf16@bucket", "stream+bf16"]
    assert [name for name in names if "bf16" in name] == (in_bf16 if offered else [])
    assert {"cudagraph.inductor+fp16@bucket", "stream+fp16"} <= set(names)
    assert [r.id for r in select_recipes(found, in_bf16)] == ["eager", *in_bf16]  # as the user wishes
