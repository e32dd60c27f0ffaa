"""A sample as JSON, energy between two samples, and energy from power."""

from __future__ import annotations

import msgspec
import pytest

from onecard.telemetry.card_sample import CardSample, PowerIntegral, card_state, energy_between


def sample(**fields: object) -> CardSample:
    return CardSample(time_s=0.0, kind="cpu", name="a processor", **fields)  # type: ignore[arg-type]


def test_absent_sensors_are_absent_keys():
    state = card_state(sample(utilisation=0.0, throttle_reasons=(), xid_errors=0))
    assert msgspec.json.decode(msgspec.json.encode(state)) == {
        **{"time_s": 0.0, "kind": "cpu", "name": "a processor"},
        **{"utilisation": 0.0, "throttle_reasons": [], "xid_errors": 0},
    }


@pytest.mark.parametrize(
    ("corrected", "uncorrected", "total"), [(7, 2, 9), (0, 0, 0), (3, None, 3), (None, 1, 1), (None, None, None)]
)
def test_ecc_errors_are_those_that_are_known(corrected, uncorrected, total):
    state = card_state(sample(ecc_corrected_errors=corrected, ecc_uncorrected_errors=uncorrected))
    assert state.get("ecc_errors") == total


def test_a_sample_cannot_be_changed():
    with pytest.raises(AttributeError):
        sample().power_w = 1.0


@pytest.mark.parametrize(
    ("earlier", "later", "energy"),
    [
        ((10.0, "counter"), (35.0, "counter"), (25.0, "counter")),
        ((0.0, "power"), (0.0, "power"), (0.0, "power")),
        ((10.0, "power"), (35.0, "counter"), None),
        ((35.0, "counter"), (10.0, "counter"), None),  # the driver was loaded anew
        ((None, None), (10.0, "counter"), None),
        ((10.0, "counter"), (None, None), None),
    ],
)
def test_energy_between(earlier, later, energy):
    first, second = (sample(energy_j=joules, energy_source=source) for joules, source in (earlier, later))
    assert energy_between(first, second) == energy


class TestPowerIntegral:
    def test_trapezoids(self):
        integral = PowerIntegral()
        readings = [(0.0, 100.0), (1.0, 200.0), (3.0, 100.0)]
        samples = [integral.complete(sample(power_w=watts), at) for at, watts in readings]
        assert [each.energy_j for each in samples] == [0.0, 150.0, 450.0]
        assert {each.energy_source for each in samples} == {"power"}
        assert energy_between(samples[1], samples[2]) == (300.0, "power")

    def test_a_gap_is_bridged(self):
        integral = PowerIntegral()
        integral.complete(sample(power_w=100.0), 0.0)
        assert integral.complete(sample(), 1.0).energy_j is None
        assert integral.complete(sample(power_w=200.0), 2.0).energy_j == 300.0

    def test_a_counter_is_left_as_it_is_and_not_mixed_with_power(self):
        integral = PowerIntegral()
        counted = sample(power_w=100.0, energy_j=7.0, energy_source="counter")
        assert integral.complete(counted, 0.0) is counted
        assert integral.complete(sample(power_w=100.0), 1.0).energy_j is None  # it failed this once
