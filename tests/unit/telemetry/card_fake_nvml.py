"""A stand-in for pynvml: two cards of one kind, a partition of the second, and sensors that can be made to fail."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30
UUIDS = {"card0": "GPU-00000000-aaaa", "card1": "GPU-11111111-bbbb", "part1": "MIG-22222222-cccc"}
OURS = 4242


class FakeNvml:
    """Answers as NVML does on a busy data-centre card.

    Attributes:
        fail: function name to the NVML code, or the exception, with which it fails.
        calls: how often each function was called.
        xids: codes that the driver will report.
        held: the card's memory by process.
    """

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.fail: dict[str, int | Exception] = {}
        self.calls: Counter[str] = Counter()
        self.asked: list[tuple[Any, ...]] = []
        self.xids: list[int] = []
        self.held: list[tuple[int, int | None]] = [(OURS, 3 * GIB), (99, GIB)]
        self.open_event_sets = 0
        self.millijoules = 5_000_000
        self.memory_temperature_code = pynvml.NVML_SUCCESS
        self.throttle = 0x1 | 0x4 | 0x40

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or name.startswith("nvmlEventType"):
            return getattr(pynvml, name)
        getattr(pynvml, name)  # only functions that the real library has
        answer = getattr(type(self), f"_{name}", None)
        if answer is None:
            raise AssertionError(f"the stand-in has no {name}")

        def call(*args: Any) -> Any:
            self.calls[name] += 1
            self.asked.append((name, *args))
            failure = self.fail.get(name)
            if failure is not None:
                raise failure if isinstance(failure, Exception) else pynvml.NVMLError(failure)
            return answer(self, *args)

        return call

    def _nvmlDeviceGetCount(self) -> int:
        return 2

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"card{index}"

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        found = [handle for handle, known in UUIDS.items() if known == uuid]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found[0]

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        if not handle.startswith("part"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return f"card{handle[-1]}"

    def _nvmlDeviceGetUUID(self, handle: str) -> str:
        return UUIDS[handle]

    def _nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H200 MIG 1g.18gb" if handle.startswith("part") else "NVIDIA H200"

    def _nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        total = (18 if handle.startswith("part") else 141) * GIB
        return SimpleNamespace(total=total, used=4 * GIB, free=total - 4 * GIB)

    def _nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.held]

    def _nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=97, memory=41)

    def _nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 63

    def _nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:
        assert fields == [pynvml.NVML_FI_DEV_MEMORY_TEMP]
        return [SimpleNamespace(nvmlReturn=self.memory_temperature_code, value=SimpleNamespace(uiVal=71))]

    def _nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 612_345

    def _nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.millijoules += 600_000
        return self.millijoules

    def _nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[clock]

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.throttle

    def _nvmlDeviceGetCurrPcieLinkGeneration(self, handle: str) -> int:
        return 5

    def _nvmlDeviceGetCurrPcieLinkWidth(self, handle: str) -> int:
        return 16

    def _nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        assert counter == pynvml.NVML_VOLATILE_ECC
        return {pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: 7, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 2}[kind]

    def _nvmlDeviceGetPcieThroughput(self, handle: str, counter: int) -> int:
        return {pynvml.NVML_PCIE_UTIL_RX_BYTES: 2_000_000, pynvml.NVML_PCIE_UTIL_TX_BYTES: 30_000}[counter]

    def _nvmlEventSetCreate(self) -> object:
        self.open_event_sets += 1
        return object()

    def _nvmlEventSetFree(self, events: object) -> None:
        self.open_event_sets -= 1

    def _nvmlDeviceRegisterEvents(self, handle: str, kinds: int, events: object) -> None:
        assert kinds == pynvml.nvmlEventTypeXidCriticalError

    def _nvmlEventSetWait(self, events: object, timeout_ms: int) -> Any:
        assert timeout_ms == 0  # it must never wait
        if not self.xids:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=self.xids.pop(0))
