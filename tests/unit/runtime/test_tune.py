"""A whole tuning of models whose time is known, in a real engine; and the options that come of it."""

from __future__ import annotations

import gc
import shutil
import time
import warnings
from pathlib import Path

import msgspec
import pytest
import torch

from onecard.bundle.amend import amend
from onecard.bundle.manifest import read_manifest
from onecard.bundle.open import OnecardWarning
from onecard.bundle.tuning_file import TUNING
from onecard.environment import Card, detect
from onecard.errors import BundleError, DeviceMemoryError, EngineError, UsageError
from onecard.runtime import tune_bench
from onecard.runtime.engine import EngineOptions
from onecard.runtime.knee import knee
from onecard.runtime.null import NullModel
from onecard.runtime.open_loop import Load
from onecard.runtime.rate_search import Candidate
from onecard.runtime.setting_search import SettingSearch
from onecard.runtime.tune import (
    DEFAULT_LANES,
    DEFAULT_LIMITS_MS,
    TuneOptions,
    TunePlan,
    TuneProgress,
    make_plan,
    tune,
    tuned_options,
)
from onecard.runtime.tune_bench import Bench
from onecard.tuning import LoadPoint, Setting, Tuning, tuning_to_bytes
from tests.unit.runtime.test_curve import Picky, spec

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"


class Opened:
    """Opens models and counts those that are open."""

    def __init__(self, **model) -> None:
        self.model = model
        self.count = 0
        self.open = 0

    def __call__(self) -> NullModel:
        self.count += 1
        self.open += 1
        made = NullModel(spec(), **self.model)
        made.close = self._close
        return made

    def _close(self) -> None:
        self.open -= 1


def test_a_tuning_from_end_to_end():
    def delay(size) -> float:
        return 5e-3 + 1e-4 * size["B"]

    opened = Opened(delay_s=delay)
    told: list[TuneProgress] = []
    options = TuneOptions((0.5, 100.0), (1, 4, 16), (1, 2), point_s=0.1, time_limit_s=120.0)
    found = tune(opened, options, told.append, "onecard tune x")
    assert opened.count == 2
    assert opened.open == 0
    assert [(p.batch, p.lanes) for p in found.points] == [(b, n) for n in (1, 2) for b in (1, 4, 16)]
    assert found.knee == knee(found.points)
    assert found.knee is not None and found.knee.batch == 16, "the fixed cost is most of it"
    tight, loose = found.settings
    assert "no batch is that quick" in tight.failed
    assert loose.failed == ""
    assert loose.p99_ms <= 100.0
    assert 1 < loose.batch_mean <= loose.batch <= 16
    assert loose.requests >= 500
    assert loose.rows_per_s > 1 / delay({"B": 1}), "batches are worth it"
    assert found.device == "cpu"
    assert found.environment == detect("cpu")
    assert found.command == "onecard tune x"
    assert found.request_rows == 1
    assert found.seconds > 2
    assert told[0].what == "batch 16"
    assert any(p.what.startswith("p99 <= 100 ms") for p in told)
    assert all(p.left_s >= 0 for p in told)
    assert [p.seconds for p in told] == sorted(p.seconds for p in told)


def test_the_time_limit_holds():
    """A first step at 53 rows a second and its confirmation would last 19 s; the curve may last 7.5 s."""
    began = time.monotonic()
    options = TuneOptions((500.0,), (1, 2), (1,), point_s=0.2, time_limit_s=15.0)
    found = tune(Opened(delay_s=0.03), options)
    assert time.monotonic() - began < 15
    assert all(not p.failed for p in found.points)
    assert "--time-limit" in found.settings[0].failed
    assert any("--time-limit" in note for note in found.notes)


def test_no_limit_can_be_kept():
    found = tune(Opened(delay_s=0.11), TuneOptions((), (1, 2), (1,), point_s=0.05, time_limit_s=60.0))
    assert [s.p99_limit_ms for s in found.settings] == [*DEFAULT_LIMITS_MS]
    assert all(s.failed for s in found.settings)
    assert any("None of the default p99 limits" in note for note in found.notes)


def test_a_size_that_does_not_fit_is_a_failed_point():
    found = tune(lambda: Picky(torch.OutOfMemoryError("no room")), TuneOptions((0.01,), (2, 8), (1,), 1, 0.05, 60.0))
    assert [p.failed for p in found.points] == ["", "out of memory"]
    assert found.knee is not None and found.knee.batch == 2


def test_a_model_that_never_runs_is_an_error():
    with pytest.raises(EngineError, match="no batch size could be measured: ValueError: broken"):
        tune(lambda: Picky(ValueError("broken")), TuneOptions((5.0,), (8, 16), (1,), 1, 0.05, 60.0))


@pytest.mark.parametrize("when", ["batch 2", "batch 1", "p99 <= 50 ms"])
def test_stopping_closes_everything(when):
    opened = Opened(delay_s=1e-3)

    def observe(progress: TuneProgress) -> None:
        if progress.what.startswith(when):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(opened, TuneOptions((50.0,), (1, 2), (1,), 1, 0.05, 60.0), observe)
    assert (opened.count, opened.open) == (1, 0)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_garbage_collector_is_left_as_it_was(frozen):
    gc.unfreeze()  # whatever came before
    if frozen:
        gc.freeze()
    try:
        with Bench(NullModel(spec()), lambda: NullModel(spec()), EngineOptions()) as bench:
            bench.load(Candidate(4, 0.0, 1, 1000.0), 4, Load(500.0, 1, 10))
            assert gc.get_freeze_count() > 0
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.unfreeze()


def test_sizes_that_the_buffers_have_no_room_for_are_failed_points(monkeypatch):
    opened = tune_bench.open_stage

    def open_stage(model, options):
        if options.policy.max_rows > 8:
            raise torch.OutOfMemoryError("no room for pinned memory")
        return opened(model, options)

    monkeypatch.setattr(tune_bench, "open_stage", open_stage)
    with Bench(NullModel(spec()), lambda: NullModel(spec()), EngineOptions()) as bench:
        points = bench.curve(1, (4, 8, 16, 32), 0.02, time.monotonic() + 60)
        assert [(p.batch, p.failed) for p in points] == [(4, ""), (8, ""), (16, "out of memory"), (32, "out of memory")]


def test_an_engine_that_does_not_fit_is_said_and_the_next_one_opens():
    class Large(NullModel):
        full = False

        def lengths_of(self, lengths):
            if self.full:
                raise torch.OutOfMemoryError("no room")
            return lengths

    model = Large(spec(), batches=(1, 4))
    with Bench(model, lambda: model, EngineOptions()) as bench:
        requests = bench.requests
        assert len(requests) == 64
        model.full = True
        with pytest.raises(DeviceMemoryError, match="does not fit in the device's memory with lanes=1"):
            bench.load(Candidate(4, 0.0, 1, 1000.0), 4, Load(500.0, 1, 10))
        model.full = False
        result, mean = bench.load(Candidate(4, 0.0, 1, 1000.0), 4, Load(500.0, 1, 10))
        assert len(result.latencies_s) == 10
        assert 1 <= mean <= 4


def test_options_that_do_not_fit_the_model_close_it():
    opened = Opened()
    with pytest.raises(UsageError, match="batch 65 cannot be run"):
        tune(opened, TuneOptions(batches=(65,)))
    assert opened.open == 0


def test_lengths_are_told():
    given = "ids: int64[B,S] in 0..9, B=1..4, S=1..16"
    plain = spec("x: float32[B,4], B=1..4")
    long = msgspec.structs.replace(spec(given), outputs=plain.outputs)
    found = tune(lambda: NullModel(long), TuneOptions((0.0001,), (4,), (1,), 1, 0.02, 60.0))
    assert found.lengths == {"S": 16}
    assert "S=16" in found.notes[0]


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        (TuneOptions(), ((1, 2, 4, 8, 16, 32, 64), (1,), DEFAULT_LIMITS_MS, 1)),
        (TuneOptions((20.0, 5.0, 5.0), (8, 2), (2, 1)), ((2, 8), (1, 2), (5.0, 20.0), 1)),
        (TuneOptions(rows=64), ((1, 2, 4, 8, 16, 32, 64), (1,), DEFAULT_LIMITS_MS, 64)),
    ],
)
def test_the_plan(options, plan):
    made = make_plan(NullModel(spec()), options)
    assert isinstance(made, TunePlan)
    assert (made.batches, made.lanes, made.limits_ms, made.rows) == plan
    assert 0 < made.seconds <= options.time_limit_s


def test_a_gpu_gets_a_second_lane():
    class OnACard(NullModel):
        device = "cuda:0"

    assert make_plan(OnACard(spec()), TuneOptions()).lanes == DEFAULT_LANES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point_s": 0.0}, "point_s is 0.0"),
        ({"time_limit_s": float("inf")}, "time_limit_s is inf"),
        ({"p99_limits_ms": (5.0, 0.0)}, "p99 limit of 0.0 ms"),
        ({"lanes": (0,)}, r"lanes are \[0\]"),
        ({"lanes": (17,)}, "must be 1 to 16"),
        ({"rows": 65}, r"65 rows are outside the range B=1..64"),
        ({"rows": 0}, "0 rows are outside"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        make_plan(NullModel(spec()), TuneOptions(**options))


def test_rows_without_a_batch_dimension():
    fixed = NullModel(spec("x: float32[4]"))
    assert make_plan(fixed, TuneOptions()).batches == (1,)
    with pytest.raises(UsageError, match="no batch dimension"):
        make_plan(fixed, TuneOptions(rows=2))


def tuned(**changes) -> Tuning:
    point = LoadPoint(32, 2, 9000.0, 5.0, 6.0, 100)
    settings = (
        Setting(5.0, 8, 0.5, 1, 3000.0, 2.0, 4.8, 3000, 6.5),
        Setting(20.0, 64, 2.0, 2, 3800.0, 4.0, 15.0, 3800, 7.5),
        Setting(50.0, failed="no rate kept it"),
    )
    found = Tuning("cpu", detect("cpu"), (point,), point, settings)
    return msgspec.structs.replace(found, **changes)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "small.onecard"))


def write(bundle: Path, found: bytes) -> None:
    amend(bundle, {TUNING: found}, read_manifest(bundle))


def test_a_bundle_that_was_never_tuned_has_the_usual_options(bundle):
    assert tuned_options(bundle) == EngineOptions()
    with pytest.raises(UsageError, match=r"was tuned for no p99 of 5 ms or less. Run: onecard tune"):
        tuned_options(bundle, 5.0)


def test_the_knee_and_the_settings_become_options(bundle):
    write(bundle, tuning_to_bytes(tuned()))
    options = tuned_options(bundle)
    assert (options.lanes, options.policy.max_rows, options.policy.max_delay_s) == (2, 32, 0.0)
    for limit_ms in (5.0, 19.9):
        options = tuned_options(bundle, limit_ms)
        assert (options.lanes, options.policy.max_rows, options.policy.max_delay_s) == (1, 8, 5e-4)
    assert tuned_options(str(bundle), 60.0).policy.max_rows == 64, "the one for 50 ms does not hold"
    with pytest.raises(UsageError, match=r"4.9 ms or less, only for 5 ms, 20 ms. Run: onecard tune"):
        tuned_options(bundle, 4.9)


def test_a_limit_that_was_tuned_for_in_vain_is_not_to_be_tuned_again(bundle):
    failed = "no rate kept it; the quickest batch alone takes 3 ms"
    held, slow = Setting(20.0, 64, 2.0, 2, 3800.0, 4.0, 15.0, 3800, 7.5), Setting(5.0, failed=failed)
    write(bundle, tuning_to_bytes(tuned(settings=(slow, held))))
    with pytest.raises(UsageError, match=rf"was tuned for a p99 of 5 ms, but no setting kept it: {failed}\.") as caught:
        tuned_options(bundle, 5.0)
    assert caught.value.cure == "Raise --p99 (kept: 20 ms), or serve without it."
    write(bundle, tuning_to_bytes(tuned(settings=(slow,))))
    with pytest.raises(UsageError, match=r"Raise --p99, or serve without it"):
        tuned_options(bundle, 5.0)
    with pytest.raises(UsageError, match=r"was tuned for no p99 of 6 ms or less. Run: onecard tune"):
        tuned_options(bundle, 6.0)


def test_a_limit_missed_for_the_sender_says_so_itself(monkeypatch):
    class LateSender(SettingSearch):
        def run(self):
            self.sender_bound = {5.0, 20.0}
            return [
                Setting(5.0, failed="no rate kept it"),
                tuned().settings[1],
                Setting(50.0, failed="no rate kept it"),
            ]

    monkeypatch.setattr("onecard.runtime.tune.SettingSearch", LateSender)
    found = tune(Opened(), TuneOptions((5.0, 20.0, 50.0), (1,), (1,), point_s=0.05, time_limit_s=60.0))
    assert found.settings[0].failed.startswith("no rate kept it; the sender of the requests")
    assert [s.failed for s in found.settings[1:]] == ["", "no rate kept it"]


def test_a_tuning_of_another_machine_is_passed_over(bundle):
    elsewhere = msgspec.structs.replace(detect("cpu"), cpu="an abacus")
    write(bundle, tuning_to_bytes(tuned(environment=elsewhere)))
    with pytest.warns(OnecardWarning, match="was made on an abacus. Tune it here"):
        assert tuned_options(bundle) == EngineOptions()


def test_a_tuning_of_a_card_that_is_not_here_is_passed_over(bundle):
    write(bundle, tuning_to_bytes(tuned(device="cuda:99")))
    for device in ("auto", "cuda:99"):
        with pytest.warns(OnecardWarning, match="Tune it here"):
            assert tuned_options(bundle, device=device) == EngineOptions()


def test_a_tuning_of_a_card_is_passed_over_on_the_processor_beside_it(bundle):
    card = Card("a card", "9.0", 1 << 30, "580")
    on_a_card = msgspec.structs.replace(detect("cpu"), device="cuda:0", card=card)
    write(bundle, tuning_to_bytes(tuned(device="cuda:0", environment=on_a_card)))
    with pytest.warns(OnecardWarning, match="was made on a card"):
        assert tuned_options(bundle, device="cpu") == EngineOptions()
    write(bundle, tuning_to_bytes(tuned()))
    assert tuned_options(bundle, device="cpu").lanes == 2


def test_a_damaged_tuning_is_passed_over_with_a_message(bundle):
    write(bundle, tuning_to_bytes(tuned()))
    path = bundle / TUNING
    path.write_bytes(path.read_bytes().replace(b"9000.0", b"9900.0"))
    with pytest.warns(
        OnecardWarning, match=r"the tuning is passed over: .*tuning.json has been changed.*Tune the bundle"
    ):
        assert tuned_options(bundle) == EngineOptions()


def test_a_tuning_that_breaks_the_format_is_passed_over_with_a_message(bundle):
    write(bundle, b'{"format": 1, "points": -1}')
    with pytest.warns(OnecardWarning, match="does not follow the format"):
        assert tuned_options(bundle) == EngineOptions()


def test_no_bundle_is_an_error(tmp_path):
    with warnings.catch_warnings(), pytest.raises(BundleError, match="no onecard bundle"):
        tuned_options(tmp_path)
