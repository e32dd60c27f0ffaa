"""The card's state: decoded throttle reasons, absent sensors, and a real reading where there is a card."""

from types import SimpleNamespace

import pytest
import torch

from onecard import nvml
from onecard.evidence import CardState
from onecard.measure import card
from onecard.measure.card import CardSampler, is_throttled, read_cpu, read_gpu, throttle_names

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is usable here")


def test_names_agree_with_nvmls_constants():
    import pynvml

    named = {
        "sw_power_cap": pynvml.nvmlClocksThrottleReasonSwPowerCap,
        "hw_slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksThrottleReasonSyncBoost,
        "sw_thermal": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        "hw_thermal": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "power_brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        "board_limit": pynvml.nvmlClocksThrottleReasonBoardLimit,
        "reliability": pynvml.nvmlClocksThrottleReasonReliability,
    }
    assert {bit: name for name, bit in named.items()} == card.THROTTLE_REASONS
    settings = (
        pynvml.nvmlClocksThrottleReasonGpuIdle
        | pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting
        | pynvml.nvmlClocksThrottleReasonDisplayClockSetting
    )
    assert settings == card.SETTINGS
    assert throttle_names(pynvml.nvmlClocksThrottleReasonAll) == tuple(card.THROTTLE_REASONS.values())


@pytest.mark.parametrize(
    ("mask", "names", "spoils"),
    [
        (0x0, (), False),
        (0x1, (), False),
        (0x2 | 0x100, (), False),
        (0x4, ("sw_power_cap",), False),
        (0x10, ("sync_boost",), False),
        (0x20, ("sw_thermal",), True),
        (0x8 | 0x40, ("hw_slowdown", "hw_thermal"), True),
        (0x80 | 0x1, ("power_brake",), True),
        (0x1000, ("unknown_0x1000",), False),
    ],
)
def test_throttle(mask, names, spoils):
    assert throttle_names(mask) == names
    assert is_throttled(CardState(throttle=throttle_names(mask))) is spoils


def test_a_card_without_any_sensor_reads_as_nothing():
    def refuse(*_):
        raise RuntimeError("Not Supported")

    names = ("PowerUsage", "UtilizationRates", "CurrentClocksThrottleReasons", "Temperature", "ClockInfo")
    lib = SimpleNamespace(
        **{f"nvmlDeviceGet{name}": refuse for name in names}, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2
    )
    assert read_gpu(lib, object()) == CardState()


def test_cpu_reading():
    state = CardSampler("cpu").read()
    assert CardSampler("cpu").readable
    assert state.sm_clock_mhz is None or state.sm_clock_mhz > 100
    assert state.temperature_c is None or -40 < state.temperature_c < 150
    assert state.power_w is None
    assert not is_throttled(state)


def test_cpu_temperature_from_a_board(tmp_path, monkeypatch):
    monkeypatch.setattr(card.psutil, "sensors_temperatures", dict, raising=False)
    for index, (kind, text) in enumerate([("battery", "1"), ("cpu-thermal", "broken"), ("cpu-thermal", "48312\n")]):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{index}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(kind)
        (zone / "temp").write_text(text)
    assert read_cpu(tmp_path).temperature_c == 48.312
    assert read_cpu(tmp_path / "nowhere").temperature_c is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is usable here")
def test_absent_gpu():
    sampler = CardSampler("cuda:0")
    assert not sampler.readable
    assert sampler.read() == CardState()


@needs_gpu
def test_gpu_reading():
    sampler = CardSampler("cuda:0")
    state = sampler.read()
    assert sampler.readable
    assert state.temperature_c is not None and 0 < state.temperature_c < 120
    assert state.sm_clock_mhz is not None and state.sm_clock_mhz > 0
    assert state.utilisation is None or 0 <= state.utilisation <= 1


@needs_gpu
def test_the_handle_is_the_card_that_torch_means():
    import pynvml

    properties = torch.cuda.get_device_properties(0)
    for handle in (nvml.handle_by_uuid(str(properties.uuid)), nvml.handle_by_order(0)):
        assert handle is not None
        assert str(properties.uuid) in pynvml.nvmlDeviceGetUUID(handle)


@needs_gpu
def test_visible_devices_by_uuid_and_nonsense(monkeypatch):
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    for text in (uuid, uuid[:12]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert nvml.handle_by_order(0) is not None
        assert nvml.handle_by_order(1) is None
    for text in ("", "-1", "nonsense"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert nvml.handle_by_order(0) is None
