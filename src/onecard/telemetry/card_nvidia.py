"""An NVIDIA card's sensors through NVML. Each is asked on its own, and one that the card lacks only once."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeAlias

from onecard.measure.card import throttle_names
from onecard.nvml import Handle
from onecard.telemetry.card_sample import CardSample
from onecard.telemetry.card_xid import XidWatch

Fields: TypeAlias = dict[str, Any]
"""Some fields of a :class:`CardSample`."""

UNSUPPORTED = frozenset({3, 13, 22, 25})
"""NVML's codes that stay true while the driver is loaded: not supported, function not found, a virtual GPU without
ECC, argument version mismatch (the driver is older than the binding)."""

LOST = {
    1: "NVML is not initialised any more",
    9: "the NVIDIA driver is not loaded",
    15: "the GPU is lost: it fell off the bus or cannot be reached",
    16: "the GPU must be reset before it can be used again",
    18: "the NVIDIA driver was replaced while in use: restart to go on with the new one",
    28: "the GPU is not found any more",
}
"""NVML's codes that mean that the card or its driver is gone, in words."""


class NvidiaReader:
    """Reads one card. A reading waits about 40 ms for the two PCIe rates: keep it off any thread in a hurry.

    Args:
        lib: the started pynvml module.
        card: the handle of the whole card.
        partition: the handle of the partition (MIG) that is used of it: memory and processes are then its own.
        pids: the processes whose memory is told, at present.
    """

    def __init__(
        self, lib: Any, card: Handle, partition: Handle | None = None, pids: Callable[[], Collection[int]] = tuple
    ) -> None:
        part = card if partition is None else partition
        self._name = "NVIDIA GPU"
        self._xids = XidWatch(lib, card)
        self._sensors: list[Callable[[], Fields]] = [
            self._xids.poll,  # first: it may say why the card is lost
            *(partial(sensor, lib, part) for sensor in (_name, _memory)),
            partial(_process_memory, lib, part, pids),
            *(partial(sensor, lib, card) for sensor in _OF_THE_WHOLE_CARD),
        ]

    def read(self) -> CardSample:
        """The card at this moment; never raises."""
        time_s = time.time()
        fields: Fields = {}
        for sensor in tuple(self._sensors):
            try:
                fields.update(sensor())
            except Exception as error:
                code = _code(error)
                if code in LOST:
                    fields = {"lost": LOST[code], **self._xids.fields}
                    break
                if code in UNSUPPORTED or isinstance(error, AttributeError):  # of the binding: it is older than this
                    self._sensors.remove(sensor)
        self._name = fields.pop("name", self._name)
        return CardSample(time_s=time_s, kind="nvidia", name=self._name, **fields)

    def close(self) -> None:
        """End the watch for Xid errors; the reader may be used again."""
        self._xids.close()


class AbsentCard:
    """Stands for a card none of whose sensors can be read.

    Args:
        device: ``cuda:N``.
        lost: why, if it is because there is no driver or no such card.
    """

    def __init__(self, device: str, lost: str | None) -> None:
        self._device = device
        self._lost = lost

    def read(self) -> CardSample:
        return CardSample(time_s=time.time(), kind="nvidia", name=self._device, lost=self._lost)

    def close(self) -> None:
        """Nothing is open."""


def _code(error: Exception) -> int | None:
    """NVML's code; the binding's own complaint about an old driver stands upon one (``NVMLLibraryMismatchError``)."""
    code = getattr(error, "value", getattr(error.__context__, "value", None))
    return code if isinstance(code, int) else None


def _name(lib: Any, card: Handle) -> Fields:
    return {"name": str(lib.nvmlDeviceGetName(card))}


def _memory(lib: Any, card: Handle) -> Fields:
    memory = lib.nvmlDeviceGetMemoryInfo(card)  # the first version of it, which counts the driver's share as used
    return {"memory_used_bytes": int(memory.used), "memory_total_bytes": int(memory.total)}


def _process_memory(lib: Any, card: Handle, pids: Callable[[], Collection[int]]) -> Fields:
    ours = pids()
    held = [process.usedGpuMemory for process in lib.nvmlDeviceGetComputeRunningProcesses(card) if process.pid in ours]
    known = [used for used in held if used is not None]
    return {"process_memory_bytes": sum(known)} if known else {}


def _utilisation(lib: Any, card: Handle) -> Fields:
    rates = lib.nvmlDeviceGetUtilizationRates(card)
    return {"utilisation": rates.gpu / 100, "memory_utilisation": rates.memory / 100}


def _temperature(lib: Any, card: Handle) -> Fields:
    return {"temperature_c": float(lib.nvmlDeviceGetTemperature(card, lib.NVML_TEMPERATURE_GPU))}


def _memory_temperature(lib: Any, card: Handle) -> Fields:
    answer = lib.nvmlDeviceGetFieldValues(card, [lib.NVML_FI_DEV_MEMORY_TEMP])[0]
    if answer.nvmlReturn != lib.NVML_SUCCESS:  # the call answers for many fields, so that each has a code of its own
        raise lib.NVMLError(answer.nvmlReturn)
    return {"memory_temperature_c": float(answer.value.uiVal)}


def _power(lib: Any, card: Handle) -> Fields:
    return {"power_w": lib.nvmlDeviceGetPowerUsage(card) / 1000}


def _power_limit(lib: Any, card: Handle) -> Fields:
    return {"power_limit_w": lib.nvmlDeviceGetEnforcedPowerLimit(card) / 1000}


def _energy(lib: Any, card: Handle) -> Fields:
    return {"energy_j": lib.nvmlDeviceGetTotalEnergyConsumption(card) / 1000, "energy_source": "counter"}


def _sm_clock(lib: Any, card: Handle) -> Fields:
    return {"sm_clock_hz": lib.nvmlDeviceGetClockInfo(card, lib.NVML_CLOCK_SM) * 1e6}


def _memory_clock(lib: Any, card: Handle) -> Fields:
    return {"memory_clock_hz": lib.nvmlDeviceGetClockInfo(card, lib.NVML_CLOCK_MEM) * 1e6}


def _throttle(lib: Any, card: Handle) -> Fields:
    return {"throttle_reasons": throttle_names(int(lib.nvmlDeviceGetCurrentClocksThrottleReasons(card)))}


def _link_generation(lib: Any, card: Handle) -> Fields:
    return {"pcie_link_generation": int(lib.nvmlDeviceGetCurrPcieLinkGeneration(card))}


def _link_width(lib: Any, card: Handle) -> Fields:
    return {"pcie_link_width": int(lib.nvmlDeviceGetCurrPcieLinkWidth(card))}


def _corrected(lib: Any, card: Handle) -> Fields:
    kind = lib.NVML_MEMORY_ERROR_TYPE_CORRECTED
    return {"ecc_corrected_errors": int(lib.nvmlDeviceGetTotalEccErrors(card, kind, lib.NVML_VOLATILE_ECC))}


def _uncorrected(lib: Any, card: Handle) -> Fields:
    kind = lib.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    return {"ecc_uncorrected_errors": int(lib.nvmlDeviceGetTotalEccErrors(card, kind, lib.NVML_VOLATILE_ECC))}


def _receive_rate(lib: Any, card: Handle) -> Fields:
    return {"pcie_receive_bytes_per_s": lib.nvmlDeviceGetPcieThroughput(card, lib.NVML_PCIE_UTIL_RX_BYTES) * 1e3}


def _transmit_rate(lib: Any, card: Handle) -> Fields:
    return {"pcie_transmit_bytes_per_s": lib.nvmlDeviceGetPcieThroughput(card, lib.NVML_PCIE_UTIL_TX_BYTES) * 1e3}


_OF_THE_WHOLE_CARD = (
    *(_utilisation, _temperature, _memory_temperature, _power, _power_limit, _energy, _sm_clock, _memory_clock),
    *(_throttle, _link_generation, _link_width, _corrected, _uncorrected, _receive_rate, _transmit_rate),
)
"""One function a sensor, so that one which is missing takes no other with it."""
