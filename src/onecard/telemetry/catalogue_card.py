"""The metrics of the card: one for each sensor."""

from __future__ import annotations

from collections.abc import Callable

from onecard.telemetry.metric import Metric, Reading, bare
from onecard.telemetry.snapshot import Sensors


def _sensor(key: str) -> Callable[[Sensors], Reading]:
    return bare(lambda sensors: sensors.get(key))


def _throttled(sensors: Sensors) -> float | None:
    reasons = sensors.get("throttle_reasons")
    return None if reasons is None else float(bool(reasons))


def _ecc_errors(sensors: Sensors) -> Reading:
    keys = {kind: f"ecc_{kind}_errors" for kind in ("corrected", "uncorrected")}
    return {(kind,): sensors[key] for kind, key in keys.items() if key in sensors}


CARD_METRICS: tuple[Metric[Sensors], ...] = (
    Metric(
        "onecard_card_info",
        "gauge",
        "Always 1; the labels name the card.",
        lambda sensors: {(str(sensors.get("kind", "")), str(sensors.get("name", ""))): 1.0},
        ("kind", "name"),
    ),
    Metric(
        "onecard_card_lost",
        "gauge",
        "1 while the card cannot be reached at all: driver gone, or off the bus.",
        bare(lambda sensors: float("lost" in sensors)),
    ),
    Metric(
        "onecard_card_throttled",
        "gauge",
        "1 while the card runs slower than it could, for any reason.",
        bare(_throttled),
    ),
    Metric(
        "onecard_card_throttle_reason",
        "gauge",
        "1 for each reason for which the card runs slower now; else absent.",
        lambda sensors: {(str(reason),): 1.0 for reason in sensors.get("throttle_reasons", ())},
        ("reason",),
    ),
    Metric(
        "onecard_card_ecc_errors_total",
        "counter",
        "Memory errors since the driver was loaded, corrected or not.",
        _ecc_errors,
        ("kind",),
    ),
    Metric(
        "onecard_card_utilisation_ratio",
        "gauge",
        "Share of the time in which the card was busy, 0 to 1.",
        _sensor("utilisation"),
    ),
    Metric(
        "onecard_card_memory_utilisation_ratio",
        "gauge",
        "Share of the time in which the card's memory was read or written, 0 to 1.",
        _sensor("memory_utilisation"),
    ),
    Metric(
        "onecard_card_process_utilisation_ratio",
        "gauge",
        "Share of all cores' time that the server's processes took, 0 to 1.",
        _sensor("process_utilisation"),
    ),
    Metric("onecard_card_cores", "gauge", "Logical cores of the machine.", _sensor("cores")),
    Metric("onecard_card_memory_used_bytes", "gauge", "Memory in use, by anybody.", _sensor("memory_used_bytes")),
    Metric("onecard_card_memory_total_bytes", "gauge", "Memory that there is.", _sensor("memory_total_bytes")),
    Metric(
        "onecard_card_process_memory_bytes",
        "gauge",
        "The card's memory that the server's processes hold.",
        _sensor("process_memory_bytes"),
    ),
    Metric("onecard_card_temperature_celsius", "gauge", "Of the chip.", _sensor("temperature_c")),
    Metric(
        "onecard_card_memory_temperature_celsius", "gauge", "Of the card's memory.", _sensor("memory_temperature_c")
    ),
    Metric("onecard_card_power_watts", "gauge", "Drawn now.", _sensor("power_w")),
    Metric("onecard_card_power_limit_watts", "gauge", "The limit in force.", _sensor("power_limit_w")),
    Metric(
        "onecard_card_energy_joules_total", "counter", "Energy used, from an arbitrary beginning.", _sensor("energy_j")
    ),
    Metric("onecard_card_frequency_hertz", "gauge", "The mean of the cores' present clocks.", _sensor("frequency_hz")),
    Metric("onecard_card_sm_clock_hertz", "gauge", "Clock of the streaming multiprocessors.", _sensor("sm_clock_hz")),
    Metric("onecard_card_memory_clock_hertz", "gauge", "Clock of the card's memory.", _sensor("memory_clock_hz")),
    Metric(
        "onecard_card_pcie_receive_bytes_per_second",
        "gauge",
        "From the host to the card.",
        _sensor("pcie_receive_bytes_per_s"),
    ),
    Metric(
        "onecard_card_pcie_transmit_bytes_per_second",
        "gauge",
        "From the card to the host.",
        _sensor("pcie_transmit_bytes_per_s"),
    ),
    Metric(
        "onecard_card_pcie_link_generation",
        "gauge",
        "At present; an idle card lowers it.",
        _sensor("pcie_link_generation"),
    ),
    Metric("onecard_card_pcie_link_width", "gauge", "Lanes at present.", _sensor("pcie_link_width")),
    Metric(
        "onecard_card_xid_errors_total",
        "counter",
        "Critical errors that the driver reported (Xid) since the server started.",
        _sensor("xid_errors"),
    ),
    Metric(
        "onecard_card_cgroup_cores",
        "gauge",
        "Cores' worth of time that the control groups grant.",
        _sensor("cgroup_cpus"),
    ),
    Metric(
        "onecard_card_cgroup_throttled_seconds_total",
        "counter",
        "For which the control group was stopped, its time being used up.",
        _sensor("cgroup_throttled_s"),
    ),
    Metric(
        "onecard_card_cgroup_memory_used_bytes",
        "gauge",
        "Of the control group with the tightest limit, file cache included.",
        _sensor("cgroup_memory_used_bytes"),
    ),
    Metric(
        "onecard_card_cgroup_memory_limit_bytes",
        "gauge",
        "The tightest limit of the control groups.",
        _sensor("cgroup_memory_limit_bytes"),
    ),
)
"""Of the card, and of the host's processor where that is another device; labelled device as well."""
