"""NVIDIA's sensors through a stand-in for NVML: all of them, each missing alone, failing, and a card that is lost."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest

from onecard.telemetry.card_nvidia import LOST, UNSUPPORTED, NvidiaReader
from onecard.telemetry.card_sample import CardSample, card_state, energy_between
from onecard.telemetry.card_xid import XidWatch
from tests.unit.telemetry.card_fake_nvml import GIB, OURS, FakeNvml

ALL: dict[str, Any] = {
    "utilisation": 0.97,
    "memory_utilisation": 0.41,
    "memory_used_bytes": 4 * GIB,
    "memory_total_bytes": 141 * GIB,
    "process_memory_bytes": 3 * GIB,
    "temperature_c": 63.0,
    "memory_temperature_c": 71.0,
    "power_w": 612.345,
    "power_limit_w": 700.0,
    "energy_j": 5600.0,
    "energy_source": "counter",
    "sm_clock_hz": 1.98e9,
    "memory_clock_hz": 3.201e9,
    "throttle_reasons": ("sw_power_cap", "hw_thermal"),
    "pcie_receive_bytes_per_s": 2e9,
    "pcie_transmit_bytes_per_s": 3e7,
    "pcie_link_generation": 5,
    "pcie_link_width": 16,
    "ecc_corrected_errors": 7,
    "ecc_uncorrected_errors": 2,
    "xid_errors": 0,
}
FUNCTIONS = {
    "nvmlDeviceGetUtilizationRates": {"utilisation", "memory_utilisation"},
    "nvmlDeviceGetMemoryInfo": {"memory_used_bytes", "memory_total_bytes"},
    "nvmlDeviceGetComputeRunningProcesses": {"process_memory_bytes"},
    "nvmlDeviceGetTemperature": {"temperature_c"},
    "nvmlDeviceGetFieldValues": {"memory_temperature_c"},
    "nvmlDeviceGetPowerUsage": {"power_w"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_w"},
    "nvmlDeviceGetTotalEnergyConsumption": {"energy_j", "energy_source"},
    "nvmlDeviceGetClockInfo": {"sm_clock_hz", "memory_clock_hz"},
    "nvmlDeviceGetCurrentClocksThrottleReasons": {"throttle_reasons"},
    "nvmlDeviceGetPcieThroughput": {"pcie_receive_bytes_per_s", "pcie_transmit_bytes_per_s"},
    "nvmlDeviceGetCurrPcieLinkGeneration": {"pcie_link_generation"},
    "nvmlDeviceGetCurrPcieLinkWidth": {"pcie_link_width"},
    "nvmlDeviceGetTotalEccErrors": {"ecc_corrected_errors", "ecc_uncorrected_errors"},
    "nvmlDeviceRegisterEvents": {"xid_errors"},
}


@pytest.fixture
def lib() -> FakeNvml:
    return FakeNvml()


@pytest.fixture
def reader(lib: FakeNvml) -> NvidiaReader:
    return NvidiaReader(lib, "card0", pids=lambda: {OURS})


def sensors(sample: CardSample) -> dict[str, Any]:
    """The fields that are there, without the time and the name."""
    return {
        name: value
        for name in CardSample.__struct_fields__
        if (value := getattr(sample, name)) is not None and name not in ("time_s", "kind", "name")
    }


def test_all_sensors(reader):
    sample = reader.read()
    assert (sample.kind, sample.name) == ("nvidia", "NVIDIA H200")
    assert sensors(sample) == ALL


def test_the_table_of_functions_names_every_sensor():
    assert set().union(*FUNCTIONS.values()) == set(ALL)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unsupported_sensor_is_absent_alone_and_not_asked_again(lib, reader, function):
    lib.fail[function] = pynvml.NVML_ERROR_NOT_SUPPORTED
    first = sensors(reader.read())
    assert first == {name: value for name, value in ALL.items() if name not in FUNCTIONS[function]}
    asked = lib.calls[function]
    del lib.fail[function]
    assert sensors(reader.read()).keys() == first.keys()
    assert lib.calls[function] == asked
    assert not FUNCTIONS[function] & card_state(reader.read()).keys()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("failure", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NO_PERMISSION, ValueError("odd")])
def test_a_sensor_that_fails_otherwise_is_asked_again(lib, reader, function, failure):
    lib.fail[function] = failure
    assert sensors(reader.read()).keys() == ALL.keys() - FUNCTIONS[function]
    lib.fail.clear()
    assert sensors(reader.read()).keys() == ALL.keys()


def test_a_driver_older_than_the_binding(lib, reader):
    mismatch = pynvml.NVMLLibraryMismatchError("use _v2")
    mismatch.__context__ = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    lib.fail["nvmlDeviceGetComputeRunningProcesses"] = mismatch
    lib.fail["nvmlDeviceGetPowerUsage"] = AttributeError("nvmlDeviceGetPowerUsage")  # a binding older than we expect
    for _ in range(2):
        assert sensors(reader.read()).keys() == ALL.keys() - {"process_memory_bytes", "power_w"}
    assert lib.calls["nvmlDeviceGetComputeRunningProcesses"] == lib.calls["nvmlDeviceGetPowerUsage"] == 1


def test_memory_temperature_has_a_code_of_its_own(lib, reader):
    lib.memory_temperature_code = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert reader.read().memory_temperature_c is None
    reader.read()
    assert lib.calls["nvmlDeviceGetFieldValues"] == 1


@pytest.mark.parametrize("code", LOST)
def test_a_lost_card_says_so_and_comes_back(lib, reader, code):
    reader.read()
    lib.fail["nvmlDeviceGetMemoryInfo"] = code
    lost = reader.read()
    assert (lost.name, lost.lost) == ("NVIDIA H200", LOST[code])
    assert sensors(lost).keys() == {"lost", "xid_errors"}
    lib.fail.clear()
    assert sensors(reader.read()).keys() == ALL.keys()


def test_the_xid_that_came_before_the_card_was_lost_is_told(lib, reader):
    reader.read()
    lib.xids = [79]
    lib.fail["nvmlDeviceGetName"] = pynvml.NVML_ERROR_GPU_IS_LOST
    sample = reader.read()
    assert (sample.xid_errors, sample.last_xid) == (1, 79)
    assert "lost" in (sample.lost or "")


def test_codes_agree_with_nvmls():
    lost = ("UNINITIALIZED", "DRIVER_NOT_LOADED", "GPU_IS_LOST", "RESET_REQUIRED", "LIB_RM_VERSION_MISMATCH")
    assert set(LOST) == {getattr(pynvml, f"NVML_ERROR_{name}") for name in (*lost, "GPU_NOT_FOUND")}
    unsupported = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "VGPU_ECC_NOT_SUPPORTED", "ARGUMENT_VERSION_MISMATCH")
    assert {getattr(pynvml, f"NVML_ERROR_{name}") for name in unsupported} == UNSUPPORTED


@pytest.mark.parametrize("held", [[], [(99, GIB)], [(OURS, None)]])
def test_memory_of_unknown_processes_is_absent(lib, reader, held):
    lib.held = held
    assert reader.read().process_memory_bytes is None


def test_memory_of_two_of_our_processes(lib):
    lib.held = [(1, GIB), (2, 2 * GIB), (3, 4 * GIB)]
    assert NvidiaReader(lib, "card0", pids=lambda: (1, 3)).read().process_memory_bytes == 5 * GIB


def test_not_throttled_is_told_too(lib, reader):
    lib.throttle = 0x1  # idle
    sample = reader.read()
    assert sample.throttle_reasons == ()
    assert list(card_state(sample)["throttle_reasons"]) == []


def test_a_partition_has_memory_of_its_own_and_the_cards_sensors(lib):
    sample = NvidiaReader(lib, "card1", "part1", lambda: {OURS}).read()
    assert (sample.name, sample.memory_total_bytes) == ("NVIDIA H200 MIG 1g.18gb", 18 * GIB)
    asked = {name: args[0] for name, *args in lib.asked if args}
    assert asked["nvmlDeviceGetPowerUsage"] == asked["nvmlDeviceRegisterEvents"] == "card1"
    assert asked["nvmlDeviceGetMemoryInfo"] == asked["nvmlDeviceGetComputeRunningProcesses"] == "part1"


def test_energy_between_two_readings(reader):
    energy = energy_between(reader.read(), reader.read())
    assert energy == (600.0, "counter")


class TestXids:
    def test_are_counted_from_reading_to_reading(self, lib, reader):
        lib.xids = [31, 43]
        assert (reader.read().xid_errors, reader.read().last_xid) == (2, 43)
        lib.xids = [63]
        assert (reader.read().xid_errors, reader.read().last_xid) == (3, 63)

    def test_a_storm_does_not_hold_the_reading_up(self, lib):
        lib.xids = [31] * 250
        watch = XidWatch(lib, "card0")
        counts = [watch.poll()["xid_errors"] for _ in range(4)]
        assert counts[0] < 250
        assert counts[-1] == 250

    def test_a_failed_registration_leaves_nothing_open(self, lib, reader):
        lib.fail["nvmlDeviceRegisterEvents"] = pynvml.NVML_ERROR_NO_PERMISSION
        for _ in range(3):
            assert reader.read().xid_errors is None
        assert lib.open_event_sets == 0
        lib.fail.clear()
        assert reader.read().xid_errors == 0
        assert lib.open_event_sets == 1

    def test_closing_frees_the_watch(self, lib, reader):
        reader.read()
        assert lib.open_event_sets == 1
        reader.close()
        reader.close()
        assert lib.open_event_sets == 0

    def test_closing_a_lost_card(self, lib, reader):
        reader.read()
        lib.fail["nvmlEventSetFree"] = pynvml.NVML_ERROR_GPU_IS_LOST
        reader.close()
        assert lib.calls["nvmlEventSetFree"] == 1
