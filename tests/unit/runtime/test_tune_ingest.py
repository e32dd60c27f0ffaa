"""Tuning with inputs in a raw form: what is sent, what is written, and what opens with it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from onecard.api_tuning import plan_tuning
from onecard.bundle.amend import amend
from onecard.bundle.manifest import read_manifest
from onecard.bundle.open import OnecardWarning
from onecard.bundle.tuning_file import TUNING
from onecard.environment import detect
from onecard.errors import SpecError, UsageError
from onecard.runtime import staging
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.ingest import Picture
from onecard.runtime.ingest_text import make_ingests
from onecard.runtime.null import NullModel
from onecard.runtime.open_loop import Load
from onecard.runtime.rate_search import Candidate
from onecard.runtime.tune import TuneOptions, make_plan, tune, tuned_options
from onecard.runtime.tune_bench import Bench
from onecard.spec import parse_spec
from onecard.tuning import LoadPoint, Tuning, tuning_from_bytes, tuning_to_bytes
from tests.services.running_server import golden_of_here

FORMS = ("image=uint8  NHWC mean=0.5", "ids=int32")
SPEC = msgspec.structs.replace(
    parse_spec(["image: float32[B,3,4,5], B=1..4", "ids: int64[B] in 0..9"]),
    outputs=parse_spec(["y: float32[B,3,4,5], B=1..4"]).inputs,
)


def model() -> NullModel:
    return NullModel(SPEC)


FORM = {("image", torch.float32), ("ids", torch.int64)}
RAW = {("image", torch.uint8), ("ids", torch.int32)}


@pytest.fixture
def sent(monkeypatch) -> set[tuple[str, torch.dtype]]:
    """What stages are given: inputs and their dtypes."""
    seen: set[tuple[str, torch.dtype]] = set()
    launch = staging.CpuStage.launch

    def watched(stage, sources, rows, size):
        for source in sources:
            seen.update((name, torch.as_tensor(array).dtype) for name, array in source.inputs.items())
        return launch(stage, sources, rows, size)

    monkeypatch.setattr(staging.CpuStage, "launch", watched)
    return seen


@pytest.mark.timeout(120)
def test_the_curve_is_measured_with_raw_inputs_and_the_tuning_says_so(sent):
    found = tune(model, TuneOptions((0.0001,), (1, 4), (1,), point_s=0.05, time_limit_s=60.0, ingest=FORMS))
    assert sent == RAW, "no batch is that quick: there was nothing but the curve"
    assert not any(point.failed for point in found.points)
    assert found.ingest == ("image=uint8 NHWC mean=0.5", "ids=int32")
    assert any("sent as image=uint8 NHWC mean=0.5, ids=int32" in note for note in found.notes)
    assert tuning_from_bytes(tuning_to_bytes(found)) == found


def test_so_are_the_settings(sent):
    with Bench(model(), model, EngineOptions(ingest=make_ingests(FORMS))) as bench:
        bench.load(Candidate(4, 0.0, 1, 1000.0), 4, Load(500.0, 1, 1))
        assert sent == RAW | FORM, "an engine is warmed up with both"
        sent.clear()
        result, _ = bench.load(Candidate(4, 0.0, 1, 1000.0), 4, Load(500.0, 1, 20))
    assert sent == RAW
    assert len(result.latencies_s) == 20 and not result.error


def test_what_is_sent_is_of_the_models_range():
    options = EngineOptions(ingest=(Picture("image"),))
    with Bench(model(), model, options, rows=2) as bench:
        request = bench.requests[0]
    assert (request["image"].shape, request["image"].dtype) == ((2, 4, 5, 3), np.uint8)
    assert len(np.unique(request["image"])) > 50
    assert request["ids"].dtype == np.int64 and 0 <= request["ids"].min() <= request["ids"].max() <= 9


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        (("picture=uint8 NHWC",), "no input 'picture'"),
        (("ids=int64",), "without loss"),
        (("ids=int32 ids=int16",), "two raw forms"),
    ],
)
def test_forms_that_do_not_fit_the_model_are_refused_before_anything_is_measured(forms, message):
    with pytest.raises(SpecError, match=message):
        make_plan(model(), TuneOptions(ingest=forms))
    with pytest.raises(SpecError, match=message):
        tune(model, TuneOptions(ingest=forms))


def test_forms_that_cannot_be_read_or_name_a_model():
    with pytest.raises(SpecError, match="cannot read"):
        TuneOptions(ingest=("image=uint8 HWC",))
    with pytest.raises(UsageError, match="'first:' is too much"):
        TuneOptions(ingest=("first:image=uint8 NHWC",))


def test_the_plan_of_a_bundle_says_what_is_sent():
    plan = plan_tuning(golden_of_here(), device="cpu", options=TuneOptions(ingest=("image=uint8 NHWC",)))
    assert plan.ingest == ("image=uint8 NHWC",)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_of_here(), tmp_path / "small.onecard"))


def write(bundle: Path, ingest: tuple[str, ...], cpu: str = "") -> None:
    point, here = LoadPoint(2, 1, 9000.0, 5.0, 6.0, 100), detect("cpu")
    found = Tuning("cpu", msgspec.structs.replace(here, cpu=cpu or here.cpu), (point,), point, (), ingest=ingest)
    amend(bundle, {TUNING: tuning_to_bytes(found)}, read_manifest(bundle))


def test_a_bundle_tuned_so_is_opened_so(bundle):
    write(bundle, ("image=uint8 NHWC scale=1",))
    options = tuned_options(bundle)
    assert (options.policy.max_rows, options.ingest) == (2, (Picture("image", (0.0,), (1.0,)),))
    raw = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)  # an engine may be missing here: the next variant serves
        engine = Engine.open(bundle, "cpu")
    with engine:
        same = engine.infer({"image": raw.transpose(0, 3, 1, 2).astype(np.float32)})["output"]
        np.testing.assert_allclose(engine.infer({"image": raw})["output"], same, rtol=1e-3, atol=1e-4)


def test_on_another_machine_the_settings_are_passed_over_but_not_what_clients_send(bundle):
    write(bundle, ("image=uint8 NHWC",), "an abacus")
    with pytest.warns(OnecardWarning, match="was made on an abacus"):
        assert tuned_options(bundle) == EngineOptions(ingest=(Picture("image"),))


def test_forms_that_nobody_could_have_tuned_with_are_damage(bundle):
    write(bundle, ("image=uint8 NHWC scale=0",))
    with pytest.warns(OnecardWarning, match="the tuning is passed over: cannot read the raw form"):
        assert tuned_options(bundle) == EngineOptions()
