"""One reading of the card: the sensors' values, under the names by which the server tells them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

Kind: TypeAlias = Literal["nvidia", "cpu"]
EnergySource: TypeAlias = Literal["counter", "power"]


class CardSample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a card at one moment. A sensor that is not there, or did not answer, is None.

    Args:
        time_s: Unix time of the reading.
        kind: ``nvidia``, or ``cpu`` for the processor.
        name: of the card.
        lost: why the card cannot be reached at all (driver gone, fallen off the bus); then all sensors are None.
        utilisation: share of the time in which the card was busy, 0 to 1; of a processor, over all cores since the
            reading before.
        memory_utilisation: share of the time in which the card's memory was read or written, 0 to 1.
        process_utilisation: the share of all cores' time that our own processes took, 0 to 1.
        cores: logical cores of the machine.
        memory_used_bytes: all that is not free, the driver's own share included; of a partition (MIG), its own.
        memory_total_bytes: of the card, the partition, or the machine.
        process_memory_bytes: the card's memory that our own processes hold. Absent in a container whose processes
            the driver knows by other numbers.
        temperature_c: of the chip.
        memory_temperature_c: of the card's memory.
        power_w: drawn by the whole board.
        power_limit_w: the limit in force.
        energy_j: ever rising, from an arbitrary beginning: only differences mean anything.
        energy_source: ``counter``, the hardware's own; ``power``, the power readings integrated over time.
        frequency_hz: the mean of the cores' present clocks.
        sm_clock_hz: of the streaming multiprocessors.
        memory_clock_hz: of the card's memory.
        throttle_reasons: why it runs slower than it could, now.
        past_throttle_reasons: those that occurred since the machine was started.
        pcie_receive_bytes_per_s: from the host to the card, over the 20 ms of the reading.
        pcie_transmit_bytes_per_s: from the card to the host.
        pcie_link_generation: at present; an idle card lowers it.
        pcie_link_width: lanes at present.
        ecc_corrected_errors: memory errors since the driver was loaded that did no harm.
        ecc_uncorrected_errors: and those that did.
        xid_errors: critical errors that the driver reported since the reader was made.
        last_xid: the code of the latest of them (NVIDIA, "Xid Errors").
        cgroup_cpus: cores' worth of time that the control groups grant.
        cgroup_throttled_s: for which the control group was stopped because its time was used up, cumulative.
        cgroup_memory_used_bytes: of the control group with the tightest limit, file cache included.
        cgroup_memory_limit_bytes: the tightest limit.
    """

    time_s: float
    kind: Kind
    name: str
    lost: str | None = None
    utilisation: float | None = None
    memory_utilisation: float | None = None
    process_utilisation: float | None = None
    cores: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    process_memory_bytes: int | None = None
    temperature_c: float | None = None
    memory_temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    energy_source: EnergySource | None = None
    frequency_hz: float | None = None
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    past_throttle_reasons: tuple[str, ...] | None = None
    pcie_receive_bytes_per_s: float | None = None
    pcie_transmit_bytes_per_s: float | None = None
    pcie_link_generation: int | None = None
    pcie_link_width: int | None = None
    ecc_corrected_errors: int | None = None
    ecc_uncorrected_errors: int | None = None
    xid_errors: int | None = None
    last_xid: int | None = None
    cgroup_cpus: float | None = None
    cgroup_throttled_s: float | None = None
    cgroup_memory_used_bytes: int | None = None
    cgroup_memory_limit_bytes: int | None = None


class Energy(NamedTuple):
    """Joules, and where they were taken from."""

    joules: float
    source: EnergySource


def energy_between(earlier: CardSample, later: CardSample) -> Energy | None:
    """What the card used between two samples.

    Returns:
        None where one has no energy, the two have it from different sources, or the counter began anew.
    """
    if earlier.energy_j is None or later.energy_j is None or later.energy_source is None:
        return None
    joules = later.energy_j - earlier.energy_j
    return Energy(joules, later.energy_source) if earlier.energy_source == later.energy_source and joules >= 0 else None


def card_state(sample: CardSample) -> dict[str, Any]:
    """The sample for JSON: only the sensors that are there, and ``ecc_errors``, the sum of both kinds."""
    state: dict[str, Any] = msgspec.to_builtins(sample)
    kinds = [each for each in (sample.ecc_corrected_errors, sample.ecc_uncorrected_errors) if each is not None]
    return {**state, "ecc_errors": sum(kinds)} if kinds else state


class PowerIntegral:
    """Joules from power readings, for a card without an energy counter: the trapezoidal rule.

    A gap in the readings is bridged by the mean of its ends.
    """

    def __init__(self) -> None:
        self._joules = 0.0
        self._last: tuple[float, float] | None = None  # seconds, watts
        self._has_counter = False

    def complete(self, sample: CardSample, now_s: float) -> CardSample:
        """The sample with its energy, if it has power and the card has shown no counter.

        Args:
            sample: the next one.
            now_s: when its power was read, on a clock that never goes back.
        """
        self._has_counter = self._has_counter or sample.energy_j is not None
        if self._has_counter or sample.power_w is None:
            return sample
        if self._last is not None:
            then_s, watts = self._last
            self._joules += (now_s - then_s) * (watts + sample.power_w) / 2
        self._last = now_s, sample.power_w
        return msgspec.structs.replace(sample, energy_j=self._joules, energy_source="power")
