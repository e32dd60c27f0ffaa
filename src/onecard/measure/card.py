"""The card's own state while it is measured: temperature, power, clocks, and why it runs slower than it could."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from onecard import nvml
from onecard.evidence import CardState

THROTTLE_REASONS = {
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "power_brake",
    0x200: "board_limit",
    0x400: "reliability",
}
"""Bits of ``nvmlDeviceGetCurrentClocksThrottleReasons`` by name (NVML API reference, nvmlClocksEventReasons)."""

SETTINGS = 0x001 | 0x002 | 0x100
"""Bits that are no throttling: idle, clocks set by the user, clocks set for a display."""

SPOILING = frozenset({"hw_slowdown", "sw_thermal", "hw_thermal", "power_brake"})
"""Reasons that pass: heat and power from outside. At its own power cap a busy card runs at the very speed
that it keeps up for hours, so that a repetition would find the same again."""

_TEMPERATURE_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "acpitz")


def is_throttled(state: CardState) -> bool:
    """True if the card was slowed by something that spoils a measurement, so that it should be repeated."""
    return not SPOILING.isdisjoint(state.throttle)


def throttle_names(mask: int) -> tuple[str, ...]:
    """The names of the throttle reasons in NVML's bit mask; a bit without a name shows as its number."""
    names = [name for bit, name in THROTTLE_REASONS.items() if mask & bit]
    unknown = mask & ~SETTINGS & ~sum(THROTTLE_REASONS)
    return (*names, f"unknown_{unknown:#x}") if unknown else tuple(names)


class CardSampler:
    """Reads the state of the card that a torch device stands for; never raises, an absent sensor is None.

    On a GPU it must be made where torch may start CUDA: only CUDA knows for certain which card ``cuda:N`` is.
    A reading costs some tens of microseconds to a few milliseconds, so take it outside of what is timed.

    On a CPU ``sm_clock_mhz`` is the mean of the cores' present clocks and ``temperature_c`` the hottest sensor
    of the processor; virtual machines mostly have neither.

    Args:
        device: ``cpu`` or ``cuda:N``.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._nvml: Any | None = None
        self._handle: nvml.Handle | None = None
        if device.startswith("cuda"):
            self._nvml = nvml.library()
            self._handle = _handle_of(device) if self._nvml else None

    @property
    def readable(self) -> bool:
        """False where the card's sensors cannot be read at all."""
        return self._handle is not None or not self.device.startswith("cuda")

    def read(self) -> CardState:
        """The state at this moment; ``utilisation`` is a fraction of 1 over the driver's last period."""
        if not self.device.startswith("cuda"):
            return read_cpu()
        if self._nvml is None or self._handle is None:
            return CardState()
        return read_gpu(self._nvml, self._handle)


def read_gpu(lib: Any, handle: nvml.Handle) -> CardState:
    """One reading through NVML.

    Args:
        lib: the started pynvml module.
        handle: of a whole card.
    """
    power_mw = nvml.ask(lib.nvmlDeviceGetPowerUsage, handle)
    rates = nvml.ask(lib.nvmlDeviceGetUtilizationRates, handle)
    mask = nvml.ask(lib.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return CardState(
        temperature_c=_number(nvml.ask(lib.nvmlDeviceGetTemperature, handle, lib.NVML_TEMPERATURE_GPU)),
        power_w=None if power_mw is None else power_mw / 1000,
        sm_clock_mhz=_number(nvml.ask(lib.nvmlDeviceGetClockInfo, handle, lib.NVML_CLOCK_SM)),
        memory_clock_mhz=_number(nvml.ask(lib.nvmlDeviceGetClockInfo, handle, lib.NVML_CLOCK_MEM)),
        utilisation=None if rates is None else rates.gpu / 100,
        throttle=throttle_names(int(mask or 0)),
    )


def read_cpu(root: Path = Path("/")) -> CardState:
    """One reading of the processor, as far as the system shows it.

    Args:
        root: where ``sys`` is, for the temperature that psutil does not find.
    """
    clock = None
    if hasattr(psutil, "cpu_freq"):
        clock = getattr(nvml.ask(psutil.cpu_freq), "current", None) or None  # a virtual machine may say 0
    return CardState(temperature_c=_cpu_temperature(root), sm_clock_mhz=_number(clock))


def _cpu_temperature(root: Path) -> float | None:
    chips = nvml.ask(getattr(psutil, "sensors_temperatures", dict)) or {}
    for name in _TEMPERATURE_CHIPS:
        readings = [sensor.current for sensor in chips.get(name, ()) if sensor.current]
        if readings:
            return float(max(readings))
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        try:
            kind = (zone / "type").read_text().strip()
            if "pkg" in kind or "cpu" in kind.lower() or "soc" in kind.lower():
                return int((zone / "temp").read_text()) / 1000
        except (OSError, ValueError):  # a zone whose sensor is off answers with an error
            continue
    return None


def _handle_of(device: str) -> nvml.Handle | None:
    import torch

    index = torch.device(device).index or 0
    try:
        uuid = str(torch.cuda.get_device_properties(index).uuid)
    except Exception:  # no such card, or a torch built without CUDA: there is nothing to read
        return None
    return nvml.handle_by_uuid(uuid) or nvml.handle_by_order(index)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
