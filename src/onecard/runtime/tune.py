"""Finding, by measuring, how to run a model: the curve over batch sizes and lanes, its knee, and the best settings."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from onecard.bundle.open import OnecardWarning
from onecard.bundle.tuning_file import read_tuning
from onecard.environment import Environment, detect, resolve_device
from onecard.errors import BundleError, EngineError, SpecError, UsageError
from onecard.runtime.curve import ROUNDS, batches_of, lengths_of
from onecard.runtime.engine import EngineOptions
from onecard.runtime.ingest import Ingest, check_ingests
from onecard.runtime.ingest_text import make_ingests, read_forms
from onecard.runtime.knee import knee
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.served import Served
from onecard.runtime.setting_search import LEAST_REQUESTS, SearchOptions, SettingSearch
from onecard.runtime.tune_bench import Bench, OpenModel
from onecard.tuning import LoadPoint, Setting, Tuning

DEFAULT_LIMITS_MS = (5.0, 20.0, 100.0)
DEFAULT_LANES = (1, 2)
"""On a GPU. On a CPU one model uses all cores already."""

_CURVE_SHARE = 0.5  # of the time limit, at most
_SEARCH_S = 10.0  # of one limit on one number of lanes, roughly
_MOST_LANES = 16
_SENDER_LATE = "the sender of the requests, which shares Python with the engine, was late itself"


@dataclass(frozen=True)
class TuneOptions:
    """What is measured.

    Args:
        p99_limits_ms: limits to find the best setting under; empty for 5, 20 and 100 ms.
        batches: sizes of the curve; empty for those that the model was built for and the powers of two.
        lanes: numbers of lanes; empty for 1 and 2, on a CPU 1.
        rows: of every request in the search for settings.
        point_s: how long each point of the curve is measured at least.
        time_limit_s: after it nothing more is begun but confirming what was found.
        ingest: raw forms in which all inputs that have one are sent (:mod:`onecard.runtime.ingest_text`).
    """

    p99_limits_ms: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    lanes: tuple[int, ...] = ()
    rows: int = 1
    point_s: float = 0.5
    time_limit_s: float = 300.0
    ingest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("point_s", "time_limit_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} is {getattr(self, name)}, but must be a time above 0.")
        if any(not 0 < limit < float("inf") for limit in self.p99_limits_ms):
            raise UsageError(f"a p99 limit of {min(self.p99_limits_ms)} ms cannot be kept: it must be above 0.")
        if any(not 1 <= lanes <= _MOST_LANES for lanes in self.lanes):
            raise UsageError(f"lanes are {list(self.lanes)}, but must be 1 to {_MOST_LANES}.")
        if named := [form.model for form in read_forms(self.ingest) if form.model]:
            raise UsageError(f"one model is tuned, which the raw forms are for: '{named[0]}:' is too much.")


@dataclass(frozen=True)
class TunePlan:
    """What will be measured of a model, everything settled.

    Args:
        device: where.
        batches: sizes of the curve.
        lanes: numbers of lanes.
        limits_ms: p99 limits.
        rows: of a request.
        seconds: that it takes roughly.
        ingest: raw forms in which inputs are sent.
    """

    device: str
    batches: tuple[int, ...]
    lanes: tuple[int, ...]
    limits_ms: tuple[float, ...]
    rows: int
    seconds: float
    ingest: tuple[str, ...] = ()


@dataclass(frozen=True)
class TuneProgress:
    """How far it is.

    Args:
        what: is being measured.
        seconds: that have gone.
        left_s: that are left, roughly.
    """

    what: str
    seconds: float
    left_s: float


Observe = Callable[[TuneProgress], None]


def make_plan(model: Served, options: TuneOptions) -> TunePlan:
    """Settle what is measured.

    Raises:
        UsageError: a batch, a number of rows or a raw form that the model does not take.
    """
    check_ingests(model.spec, make_ingests(options.ingest))
    batch = model.spec.batch_symbol
    if batch is None and options.rows != 1:
        raise UsageError("this model has no batch dimension: a request has one row.", "Leave --rows away.")
    if batch is not None and options.rows not in model.spec.symbols[batch]:
        raise UsageError(f"requests of {options.rows} rows are outside the range {batch}={model.spec.symbols[batch]}.")
    batches = batches_of(model, options.batches)
    lanes = tuple(sorted({*options.lanes})) or (DEFAULT_LANES if model.device != "cpu" else (1,))
    limits = tuple(sorted({*options.p99_limits_ms})) or DEFAULT_LIMITS_MS
    seconds = len(lanes) * (len(batches) * options.point_s * (ROUNDS + 1) / ROUNDS + len(limits) * _SEARCH_S)
    forms = tuple(form.text for form in read_forms(options.ingest))
    return TunePlan(model.device, batches, lanes, limits, options.rows, min(seconds, options.time_limit_s), forms)


def tune(
    open_model: OpenModel,
    options: TuneOptions | None = None,
    observe: Observe = lambda progress: None,
    command: str = "",
) -> Tuning:
    """Measure a model.

    Args:
        open_model: opens one more of the same model; it is called once for each lane.
        options: see :class:`TuneOptions`.
        observe: told how far it is.
        command: to be recorded.

    Returns:
        The curve, the knee and the settings.

    Raises:
        UsageError: options that do not fit the model.
        EngineError: not one batch size could be measured, or the device was lost.
    """
    options = options or TuneOptions()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    began = time.monotonic()
    engine_options = EngineOptions(ingest=make_ingests(options.ingest))
    with Bench(open_model(), open_model, engine_options, options.rows) as bench:
        plan = make_plan(bench.model, options)
        told = _Told(observe, began)
        points = _measure_curves(bench, plan, options, told)
        if all(point.failed for point in points):
            raise EngineError(f"no batch size could be measured: {points[0].failed}.", "See onecard doctor.")
        search = _search(bench, plan, points, began + options.time_limit_s, told)
        settings = [_with_sender(setting, search.sender_bound) for setting in search.run()]
        lengths = _lengths(bench.model)
    return Tuning(
        plan.device,
        detect(plan.device),
        tuple(points),
        knee(points),
        tuple(settings),
        plan.rows,
        lengths,
        command,
        started,
        time.monotonic() - began,
        tuple(_notes(search, options, lengths, all(s.failed for s in settings))),
        ingest=plan.ingest,
    )


def tuned_options(folder: str | Path, p99_limit_ms: float | None = None, device: str = "auto") -> EngineOptions:
    """The options that a bundle's tuning stands for.

    Args:
        folder: of the bundle.
        p99_limit_ms: for the most rows a second under this limit; None for the knee.
        device: where the engine will run, if that is settled.

    Returns:
        Options for :class:`onecard.runtime.engine.Engine`. Those by default where the bundle was never tuned, and
        where its tuning is damaged or of another machine or device: then a :class:`OnecardWarning` says so. The raw
        forms that it was tuned with are taken on any machine, since clients send them.

    Raises:
        UsageError: a limit is given, but no setting keeps it.
        BundleError: no bundle.
    """
    tuning, ingest = _read_tuning(Path(folder))
    tuning = tuning if tuning and _is_of_here(tuning, Path(folder), device) else None
    if p99_limit_ms is None:
        found = tuning.knee if tuning else None
        return _options(found.batch, 0.0, found.lanes, ingest) if found else EngineOptions(ingest=ingest)
    setting = tuning.setting(p99_limit_ms) if tuning else None
    if setting is None:
        raise _untuned(folder, p99_limit_ms, tuning)
    return _options(setting.batch, setting.max_delay_ms / 1e3, setting.lanes, ingest)


def _untuned(folder: str | Path, limit_ms: float, tuning: Tuning | None) -> UsageError:
    """Why there is no setting for a limit; where it was looked for in vain, tuning again would be going in a circle."""
    settings = tuning.settings if tuning else ()
    failed = next((s for s in settings if s.failed and math.isclose(s.p99_limit_ms, limit_ms)), None)
    kept = ", ".join(f"{s.p99_limit_ms:g} ms" for s in settings if not s.failed)
    if failed is not None:
        return UsageError(
            f"{folder} was tuned for a p99 of {limit_ms:g} ms, but no setting kept it: {failed.failed}.",
            f"Raise --p99{f' (kept: {kept})' if kept else ''}, or serve without it.",
        )
    return UsageError(
        f"{folder} was tuned for no p99 of {limit_ms:g} ms or less{f', only for {kept}' if kept else ''}.",
        f"Run: onecard tune {folder} --p99 {limit_ms:g}ms.",
    )


def _options(batch: int, max_delay_s: float, lanes: int, ingest: tuple[Ingest, ...]) -> EngineOptions:
    return EngineOptions(policy=BatchPolicy(max_delay_s=max_delay_s, max_rows=batch), lanes=lanes, ingest=ingest)


def _read_tuning(folder: Path) -> tuple[Tuning | None, tuple[Ingest, ...]]:
    """The tuning of a bundle, if it was tuned and the file is whole, and the raw forms of it."""
    try:
        tuning = read_tuning(folder)
        return tuning, make_ingests(tuning.ingest) if tuning else ()
    except (BundleError, SpecError) as error:
        if not (folder / "onecard.json").is_file():
            raise
        warnings.warn(f"the tuning is passed over: {error}", OnecardWarning, stacklevel=3)
        return None, ()


def _is_of_here(tuning: Tuning, folder: Path, device: str) -> bool:
    """Whether a tuning tells anything about this machine."""
    made_on, now_on = _place(tuning.environment), _place_here(tuning.device if device == "auto" else device)
    if made_on != now_on:
        warnings.warn(
            f"the tuning of {folder} is passed over: it was made on {made_on}. Tune it here: onecard tune.",
            OnecardWarning,
            stacklevel=3,
        )
    return made_on == now_on


def _place_here(device: str) -> str:
    """What a device is called here; empty if there is none."""
    try:
        return _place(detect(resolve_device(device)))
    except UsageError:
        return ""


def _place(environment: Environment) -> str:
    return environment.card.name if environment.card else environment.cpu


class _Told:
    """Progress with the time that has gone."""

    def __init__(self, observe: Observe, began: float) -> None:
        self._observe = observe
        self._began = began

    def __call__(self, what: str, left_s: float) -> None:
        self._observe(TuneProgress(what, time.monotonic() - self._began, left_s))


def _measure_curves(bench: Bench, plan: TunePlan, options: TuneOptions, told: _Told) -> list[LoadPoint]:
    """The curve of every number of lanes, one after the other: what a second model takes is not the first's loss."""
    points: list[LoadPoint] = []
    began = time.monotonic()
    over = began + options.time_limit_s
    search_s = len(plan.lanes) * len(plan.limits_ms) * _SEARCH_S
    each_s = options.point_s / ROUNDS
    one_s = len(plan.batches) * (ROUNDS + 1) * each_s

    def tell(lanes: int, after_s: float, batch: int, done: int) -> None:
        left_s = one_s - done * each_s + after_s
        told(_point_name(batch, lanes), max(0.0, min(left_s, over - time.monotonic())))

    for index, lanes in enumerate(plan.lanes):
        more = len(plan.lanes) - index - 1
        now = time.monotonic()
        until = now + max(0.0, began + options.time_limit_s * _CURVE_SHARE - now) / (more + 1)
        observe = functools.partial(tell, lanes, more * one_s + search_s)
        points += bench.curve(lanes, plan.batches, options.point_s, until, observe)
    return points


def _point_name(batch: int, lanes: int) -> str:
    return f"batch {batch}" + (f" on {lanes} lanes" if lanes > 1 else "")


def _search(bench: Bench, plan: TunePlan, points: Sequence[LoadPoint], until: float, told: _Told) -> SettingSearch:
    most_rows = {
        lanes: max((p.batch for p in points if p.lanes == lanes and not p.failed), default=1) for lanes in plan.lanes
    }
    options = SearchOptions(plan.limits_ms, plan.rows, until)
    return SettingSearch(points, options, lambda one, load: bench.load(one, most_rows[one.lanes], load), told)


def _with_sender(setting: Setting, sender_bound: set[float]) -> Setting:
    """A limit that no rate kept says so if that was the sender's doing, not the model's."""
    if not setting.failed or setting.batch or setting.p99_limit_ms not in sender_bound:
        return setting
    return msgspec.structs.replace(setting, failed=f"{setting.failed}; {_SENDER_LATE}")


def _lengths(model: Served) -> dict[str, int]:
    names = (name for name in model.spec.symbols if name != model.spec.batch_symbol)
    return dict(zip(names, lengths_of(model), strict=True))


def _notes(search: SettingSearch, options: TuneOptions, lengths: dict[str, int], none_held: bool) -> list[str]:
    notes = []
    if options.ingest:
        notes.append(f"Measured with inputs sent as {', '.join(form.text for form in read_forms(options.ingest))}.")
    if lengths:
        sizes = ", ".join(f"{name}={size}" for name, size in lengths.items())
        notes.append(f"Measured at {sizes}, the longest; shorter inputs are answered sooner.")
    if none_held:
        which = "given" if options.p99_limits_ms else "default"
        notes.append(f"None of the {which} p99 limits can be kept here; try others with --p99.")
    if search.too_large:
        lanes = ", ".join(map(str, sorted(search.too_large)))
        notes.append(f"An engine with {lanes} lanes does not fit in the device's memory.")
    if search.sender_bound:
        limits = ", ".join(f"{ms:g} ms" for ms in sorted(search.sender_bound))
        notes.append(f"At {limits} {_SENDER_LATE}: more may be possible. Requests of more rows (--rows) cost it less.")
    if search.out_of_time:
        limits = ", ".join(f"{ms:g} ms" for ms in sorted(search.out_of_time))
        notes.append(
            f"The search at {limits} was ended by the time limit (--time-limit): a step has {LEAST_REQUESTS} requests "
            "or more."
        )
    return notes
