"""Which variants are not even tried where they are."""

from __future__ import annotations

import msgspec
import pytest

from onecard.bundle.manifest import VariantEntry
from onecard.bundle.open import unfit
from onecard.evidence import Measurement
from onecard.recipe import ORIGINAL, Recipe
from onecard.verify.compare import THRESHOLDS
from tests.unit.bundle.test_manifest import manifest
from tests.unit.report.evidence_sample import environment

INDUCTOR = Recipe("inductor", static=True)
GRAPH = Recipe("cudagraph", mode="inductor", static=True)
EAGER = Recipe("eager", transforms=("fp16",))


def reason(recipe: Recipe, made_on: str, here: str) -> str:
    made = manifest(environment=msgspec.structs.replace(environment(), device=made_on))
    entry = VariantEntry(recipe, THRESHOLDS["fp32"], Measurement(), True)
    return unfit(made, entry, msgspec.structs.replace(made.environment, device=here))


@pytest.mark.parametrize("recipe", [INDUCTOR, GRAPH])
def test_compiled_code_names_its_card(recipe):
    assert not reason(recipe, "cuda:1", "cuda:1")
    assert "CUDA_VISIBLE_DEVICES" in reason(recipe, "cuda:0", "cuda:1")


@pytest.mark.parametrize("recipe", [EAGER, ORIGINAL])
def test_what_is_not_compiled_runs_on_any_card(recipe):
    assert not reason(recipe, "cuda:0", "cuda:1")


def test_another_kind_of_device_runs_the_original_alone():
    assert reason(EAGER, "cuda:0", "cpu") == "it was made for cuda, not for cpu"
    assert "not for cuda:0" in reason(INDUCTOR, "cpu", "cuda:0")
    assert not reason(ORIGINAL, "cuda:0", "cpu")
