"""The processor's energy from its own counters (RAPL), as Linux shows them under /sys/class/powercap.

Kernels since 5.10 let only root read them; where they cannot be read there is no figure.
"""

from __future__ import annotations

from pathlib import Path

from onecard.host import ROOT

_J_PER_UJ = 1e-6


class RaplEnergy:
    """Joules of all processor packages and their memory since this was made.

    Not counted: ``core`` and ``uncore``, which are within the package, and ``psys``, which is the whole board.

    Args:
        root: where ``sys`` is.
    """

    def __init__(self, root: Path = ROOT) -> None:
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))  # AMD's too
        self._counters = [counter for zone in zones if (counter := _counter_of(zone)) is not None]

    def read(self) -> float | None:
        """Joules, or None where there is no counter that can be read."""
        try:
            joules = [counter.read_joules() for counter in self._counters]
        except (OSError, ValueError):  # what the others counted is kept for the next reading
            return None
        return sum(joules) if joules else None


class _Counter:
    """One counter. It starts anew above ``max_energy_range_uj``, after minutes at full power."""

    def __init__(self, zone: Path) -> None:
        self._path = zone / "energy_uj"
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._last_uj = int(self._path.read_text())
        self._total_uj = 0

    def read_joules(self) -> float:
        now_uj = int(self._path.read_text())
        step_uj = now_uj - self._last_uj
        self._total_uj += step_uj if step_uj >= 0 else step_uj + self._range_uj
        self._last_uj = now_uj
        return self._total_uj * _J_PER_UJ


def _counter_of(zone: Path) -> _Counter | None:
    """The zone's counter, or None if it is not to be counted or cannot be read."""
    try:
        name = (zone / "name").read_text().strip()
        return _Counter(zone) if name.startswith("package") or name == "dram" else None
    except (OSError, ValueError):
        return None
