"""The search for settings against a simulated engine and clock: what it finds follows from the simulation."""

from __future__ import annotations

import itertools
import math

import pytest

from onecard.errors import DeviceMemoryError
from onecard.runtime.open_loop import Load, LoadResult
from onecard.runtime.rate_search import TOLERANCE, Candidate
from onecard.runtime.setting_search import LEAST_REQUESTS, SearchOptions, SettingSearch
from onecard.tuning import LoadPoint, Setting

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def service_s(batch: int) -> float:
    return 1e-3 + 5e-5 * batch


def curve(lanes: int = 1) -> list[LoadPoint]:
    """Lanes that do not slow each other down."""
    return [LoadPoint(b, lanes, lanes * b / service_s(b), 1e3 * service_s(b), 1e3 * service_s(b), 100) for b in BATCHES]


class Simulation:
    """An engine whose p99 is that of two batches and the delay, stretched by its load; time passes only in it."""

    def __init__(self, p99_factor: float = 1.0) -> None:
        self.now = 1000.0
        self.loads: list[tuple[Candidate, Load]] = []
        self.p99_factor = p99_factor
        self.confirm_factor = 1.0
        self.hiccups: set[int] = set()  # numbers of steps that are disturbed
        self.error = ""

    def p99_s(self, candidate: Candidate, rate: float) -> float:
        load = rate / candidate.ceiling
        if load >= 1:
            return math.inf
        return self.p99_factor * (candidate.max_delay_ms / 1e3 + 2 * service_s(candidate.batch)) / (1 - load)

    def kept_rate(self, candidate: Candidate, limit_s: float) -> float:
        return candidate.ceiling * max(0.0, 1 - self.p99_s(candidate, 0.0) / limit_s)

    def measure(self, candidate: Candidate, load: Load) -> tuple[LoadResult, float]:
        self.loads.append((candidate, load))
        p99_s = self.p99_s(candidate, load.rows_per_s)
        if load.limit_s == math.inf:
            p99_s *= self.confirm_factor
        if len(self.loads) in self.hiccups:
            p99_s = math.inf
        ended = p99_s > load.limit_s
        self.now += load.planned_s * (0.1 if ended else 1.0)
        return LoadResult([p99_s] * load.requests, load.rows_per_s, 0.0, ended, self.error), candidate.batch / 2

    def search(self, points: list[LoadPoint], limits_ms: tuple[float, ...], seconds: float = 1e6) -> SettingSearch:
        options = SearchOptions(limits_ms, 1, self.now + seconds)
        return SettingSearch(points, options, self.measure, clock=lambda: self.now)


def best_rate(simulation: Simulation, limit_ms: float, lanes: int = 1) -> float:
    """The best that any batch without a delay could do."""
    found = (Candidate(p.batch, 0.0, lanes, p.rows_per_s) for p in curve(lanes))
    return max(simulation.kept_rate(candidate, limit_ms / 1e3) for candidate in found)


@pytest.mark.parametrize("limit_ms", [2.5, 4.0, 8.0, 30.0, 200.0])
def test_the_setting_found_is_the_best_one(limit_ms):
    simulation = Simulation()
    (setting,) = simulation.search(curve(), (limit_ms,)).run()
    best = best_rate(simulation, limit_ms)
    assert setting.failed == ""
    assert setting.p99_limit_ms == limit_ms
    assert setting.p99_ms <= limit_ms
    # Within the tolerance of the rate, and that of what is worth a change of the setting.
    assert best / (1 + TOLERANCE) ** 2 <= setting.rows_per_s <= best


def test_a_looser_limit_never_gets_less():
    settings = Simulation().search(curve(), (50.0, 3.0, 9.0)).run()
    assert [s.p99_limit_ms for s in settings] == [3.0, 9.0, 50.0]
    rates = [s.rows_per_s for s in settings]
    assert rates == sorted(rates)


def test_what_keeps_a_tighter_limit_is_where_the_next_search_starts():
    simulation = Simulation()
    tight, loose = simulation.search(curve(), (9.0, 9.1)).run()
    steps = [load.rows_per_s for _, load in simulation.loads if load.limit_s == pytest.approx(9.1e-3)]
    assert steps
    assert min(steps) > tight.rows_per_s
    assert loose.rows_per_s >= tight.rows_per_s


def test_more_lanes_are_taken_where_they_give_more():
    simulation = Simulation()
    (setting,) = simulation.search([*curve(), *curve(2)], (8.0,)).run()
    assert setting.lanes == 2
    assert setting.rows_per_s >= best_rate(simulation, 8.0, lanes=2) / (1 + TOLERANCE) ** 2


def test_lanes_are_changed_as_rarely_as_can_be():
    simulation = Simulation()
    simulation.search([*curve(), *curve(2)], (4.0, 8.0)).run()
    lanes = [candidate.lanes for candidate, _ in simulation.loads]
    assert sum(a != b for a, b in itertools.pairwise(lanes)) == 1


def test_every_step_is_long_enough_and_has_its_own_seed():
    simulation = Simulation()
    simulation.search(curve(), (8.0, 300.0)).run()
    for _, load in simulation.loads:
        assert load.requests >= LEAST_REQUESTS
        assert load.planned_s >= 1.0 - 1e-9
        assert load.limit_s == math.inf or load.planned_s >= 10 * load.limit_s - 1e-9
    assert simulation.loads[-1][1].planned_s >= 20 * 0.3 - 1e-9, "the confirming run"
    seeds = [load.seed for _, load in simulation.loads]
    assert len({*seeds}) == len(seeds)
    again = Simulation()
    again.search(curve(), (8.0, 300.0)).run()
    assert again.loads == simulation.loads


def test_the_setting_is_confirmed_by_a_run_of_its_own_that_is_not_ended_early():
    simulation = Simulation()
    (setting,) = simulation.search(curve(), (8.0,)).run()
    candidate, load = simulation.loads[-1]
    assert load.limit_s == math.inf
    assert load.planned_s >= 2.0 - 1e-9
    assert (setting.batch, setting.max_delay_ms, setting.lanes) == candidate[:3]
    assert setting.rows_per_s == load.rows_per_s
    assert setting.p99_ms == pytest.approx(1e3 * simulation.p99_s(candidate, load.rows_per_s))
    assert setting.requests == load.requests
    assert setting.batch_mean == setting.batch / 2


def test_a_confirmation_that_misses_is_repeated_at_a_lower_rate():
    simulation = Simulation()
    simulation.confirm_factor = 1.2
    (setting,) = simulation.search(curve(), (8.0,)).run()
    rates = [load.rows_per_s for _, load in simulation.loads if load.limit_s == math.inf]
    assert len(rates) > 1
    assert rates == sorted(rates, reverse=True)
    assert setting.failed == ""
    assert setting.p99_ms <= 8.0
    assert setting.rows_per_s == rates[-1]


def test_what_cannot_be_confirmed_is_reported_as_it_was():
    simulation = Simulation()
    simulation.confirm_factor = 50.0
    (setting,) = simulation.search(curve(), (8.0,)).run()
    assert "its confirming run had a p99 of" in setting.failed
    assert setting.p99_ms > 8.0
    assert setting.rows_per_s > 0


def test_requests_that_fail_fail_the_setting():
    simulation = Simulation()
    simulation.error = "RuntimeError: no"
    (setting,) = simulation.search(curve(), (8.0,)).run()
    assert setting.failed == "requests of its confirming run failed: RuntimeError: no"


def test_one_hiccup_rules_no_rate_out():
    quiet, disturbed = Simulation(), Simulation()
    expected = quiet.search(curve(), (8.0,)).run()
    kept = [quiet.p99_s(candidate, load.rows_per_s) <= load.limit_s for candidate, load in quiet.loads]
    disturbed.hiccups = {kept.index(True) + 1}
    assert disturbed.search(curve(), (8.0,)).run() == expected
    assert len(disturbed.loads) == len(quiet.loads) + 1


def test_a_limit_below_every_batch_costs_nothing():
    simulation = Simulation()
    (setting,) = simulation.search(curve(), (1.0,)).run()
    assert setting == Setting(1.0, failed="no batch is that quick: the quickest takes 1.05 ms")
    assert simulation.loads == []


def test_a_limit_that_no_rate_keeps_is_given_up_soon():
    simulation = Simulation(p99_factor=100.0)
    (setting,) = simulation.search(curve(), (8.0,)).run()
    assert setting.failed.startswith("no rate kept it")
    # After each batch, what needs longer than it is not tried any more: its delay, and batch 64 at the end.
    assert [candidate[:2] for candidate, _ in simulation.loads][::10] == [(32, 0.0), (16, 0.0), (8, 0.0)]
    assert len(simulation.loads) == 30


def test_lanes_that_do_not_fit_in_an_engine_are_left_out():
    simulation = Simulation()
    plain = simulation.measure

    def measure(candidate: Candidate, load: Load) -> tuple[LoadResult, float]:
        if candidate.lanes == 2:
            raise DeviceMemoryError("too large")
        return plain(candidate, load)

    search = SettingSearch([*curve(), *curve(2)], SearchOptions((8.0,), 1, 1e9), measure, clock=lambda: simulation.now)
    (setting,) = search.run()
    assert search.too_large == {2}
    assert (setting.failed, setting.lanes) == ("", 1)
    (none,) = SettingSearch(curve(2), SearchOptions((8.0,), 1, 1e9), measure, clock=lambda: simulation.now).run()
    assert "fits in the device's memory" in none.failed


def test_points_that_failed_are_no_settings():
    points = [*curve()[:3], LoadPoint(8, 1, failed="out of memory")]
    (setting,) = Simulation().search(points, (30.0,)).run()
    assert setting.batch <= 4


def test_the_time_limit_ends_the_search_with_what_there_is():
    simulation = Simulation()
    began = simulation.now
    search = simulation.search(curve(), (8.0,), seconds=6.0)
    (setting,) = search.run()
    assert search.out_of_time == {8.0}
    assert setting.failed == ""
    assert simulation.now - began <= 6.0 + 1e-6, "the confirming run included"


def test_time_that_is_too_short_for_a_step_is_said():
    simulation = Simulation()
    search = simulation.search(curve(), (8.0, 30.0), seconds=2.0)
    settings = search.run()
    assert simulation.loads == []
    assert search.out_of_time == {8.0, 30.0}
    assert all("--time-limit" in setting.failed for setting in settings)


def test_the_time_is_shared_by_the_limits():
    simulation = Simulation()
    settings = simulation.search(curve(), (4.0, 8.0, 30.0), seconds=30.0).run()
    assert [s.failed for s in settings] == ["", "", ""]


def test_a_late_sender_is_noted():
    simulation = Simulation()
    plain = simulation.measure

    def measure(candidate: Candidate, load: Load) -> tuple[LoadResult, float]:
        result, mean = plain(candidate, load)
        return result._replace(late_s=1.0), mean

    search = SettingSearch(curve(), SearchOptions((8.0,), 1, 1e9), measure, clock=lambda: simulation.now)
    search.run()
    assert search.sender_bound == {8.0}


def test_it_tells_what_it_does():
    told: list[tuple[str, float]] = []
    simulation = Simulation()
    options = SearchOptions((8.0,), 1, simulation.now + 100)
    SettingSearch(curve(), options, simulation.measure, lambda *said: told.append(said), lambda: simulation.now).run()
    assert told[0][0].startswith("p99 <= 8 ms: batch ")
    assert told[-1][0].startswith("confirming p99 <= 8 ms: batch ")
    assert all(0 <= left_s <= 100 for _, left_s in told)
    assert len(told) == len(simulation.loads)
