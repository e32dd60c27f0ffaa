"""The processor as a card: how busy, how fast, how hot, its energy, and what the control groups leave of it."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from onecard import host, nvml
from onecard.measure.card import read_cpu
from onecard.telemetry.card_sample import CardSample
from onecard.telemetry.cpu_board import board_throttle
from onecard.telemetry.cpu_energy import RaplEnergy
from onecard.telemetry.cpu_group import group_cpus, group_memory
from onecard.telemetry.cpu_processes import CpuUsage, ProcessTree

_HZ_PER_MHZ = 1e6


class CpuReader:
    """Reads the processor; what the system does not show is absent.

    Args:
        tree: our processes.
        root: where ``proc`` and ``sys`` are, for all that psutil does not read.
    """

    def __init__(self, tree: ProcessTree, root: Path = host.ROOT) -> None:
        self._name = host.cpu_model(root)
        self._energy = RaplEnergy(root)
        usage = CpuUsage(tree)
        self._sensors = (
            *(usage.machine, usage.ours, _cores, self._joules),
            *(partial(sensor, root) for sensor in (_clock_and_heat, _memory, group_cpus, board_throttle)),
        )

    def read(self) -> CardSample:
        """The processor at this moment; never raises."""
        time_s = time.time()
        fields: dict[str, Any] = {}
        for sensor in self._sensors:
            fields |= nvml.ask(sensor) or {}
        return CardSample(time_s=time_s, kind="cpu", name=self._name, **fields)

    def close(self) -> None:
        """Nothing is open."""

    def _joules(self) -> dict[str, Any]:
        joules = self._energy.read()
        return {} if joules is None else {"energy_j": joules, "energy_source": "counter"}


def _cores() -> dict[str, Any]:
    return {"cores": psutil.cpu_count()}


def _clock_and_heat(root: Path) -> dict[str, Any]:
    state = read_cpu(root)
    clock_hz = None if state.sm_clock_mhz is None else state.sm_clock_mhz * _HZ_PER_MHZ
    return {"frequency_hz": clock_hz, "temperature_c": state.temperature_c}


def _memory(root: Path) -> dict[str, Any]:
    memory = psutil.virtual_memory()
    total_bytes = int(memory.total)
    used = {"memory_used_bytes": total_bytes - int(memory.available), "memory_total_bytes": total_bytes}
    return used | group_memory(total_bytes, root)
