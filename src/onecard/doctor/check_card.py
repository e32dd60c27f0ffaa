"""Checks of the card that is used: its health, its modes, and whether it runs as fast as it can."""

from __future__ import annotations

from onecard.doctor.facts import COMPUTE_EXCLUSIVE, COMPUTE_PROHIBITED, Card, Facts
from onecard.doctor.finding import Finding
from onecard.evidence import CardState
from onecard.measure.card import is_throttled

BUSY = 0.2
"""The utilisation above which somebody else is at work on the card."""

LESS_POWER = 0.9
"""The share of its own power limit, or clock, under which a card is held back on purpose."""


def check_sensors(facts: Facts) -> list[Finding]:
    """Can the card's sensors be read, and does it run freely now?"""
    if not facts.gpu or facts.no_device is not None:
        return []
    card = facts.card
    if card is None:
        why = "Heat and throttling will not be seen in the measurements."
        cure = "In a container, pass NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        return [Finding("card", "warning", f"NVML cannot be read for {facts.device}.", why, cure)]
    reading = f"{card.name}, {_reading(card.state)}"
    if is_throttled(card.state):
        what = f"the card is throttled now by {', '.join(card.state.throttle)} ({reading})."
        why = "Every figure would be too low, and none would repeat."
        cure = f"Let it cool; look at fans and power supply: nvidia-smi -i {card.index} -q -d PERFORMANCE,TEMPERATURE"
        return [Finding("card", "warning", what, why, cure)]
    if (card.state.utilisation or 0.0) > BUSY:
        what = f"the card is at work already: {card.state.utilisation:.0%} ({reading})."
        why = "What else runs on it makes every measurement slower and uneven."
        cure = f"nvidia-smi -i {card.index} shows who; stop it or choose another card."
        return [Finding("card", "warning", what, why, cure)]
    return [Finding("card", "ok", reading)]


def _reading(state: CardState) -> str:
    clock = "unknown" if state.sm_clock_mhz is None else f"{state.sm_clock_mhz:.0f} MHz"
    heat = "unknown" if state.temperature_c is None else f"{state.temperature_c:.0f} °C"
    return f"SM clock {clock}, temperature {heat}"


def check_memory_errors(facts: Facts) -> list[Finding]:
    """Does the card's memory keep what is written to it?"""
    card = facts.card
    if card is None:
        return []
    at = f"card {card.index} ({card.name})"
    if card.remap_failed:
        what, why = f"{at} could not replace a broken row of its memory.", "Programs that meet it are ended."
        return [Finding("ecc", "error", what, why, "Take it out of service and have it replaced.")]
    if card.uncorrected:
        what = f"{at} counted {card.uncorrected} memory errors that could not be corrected."
        why = "The program that met one was ended, and more may come."
        cure = f"sudo nvidia-smi -i {card.index} -r (with nothing on the card); if they come back, have it replaced."
        return [Finding("ecc", "warning", what, why, cure)]
    if card.remap_pending:
        what, why = f"{at} waits for a reset to replace a broken row of its memory.", "Until then it may fail again."
        return [Finding("ecc", "warning", what, why, f"sudo nvidia-smi -i {card.index} -r (with nothing on the card)")]
    if card.ecc is False:
        why = "A flipped bit of the weights would not be noticed: all answers after it may be wrong."
        cure = f"sudo nvidia-smi -i {card.index} -e 1, then reboot."
        return [Finding("ecc", "note", f"{at} has its error correction (ECC) switched off.", why, cure)]
    return [Finding("ecc", "ok", "error correction is on")] if card.ecc else []


def check_modes(facts: Facts) -> list[Finding]:
    """Does the card let onecard's processes in, and stay started between them?"""
    card = facts.card
    if card is None:
        return []
    found = []
    back = f"sudo nvidia-smi -i {card.index} -c DEFAULT"
    if card.compute_mode == COMPUTE_PROHIBITED:
        what, why = f"card {card.index} is in compute mode PROHIBITED.", "No program can start CUDA on it."
        found.append(Finding("compute mode", "error", what, why, back))
    elif card.compute_mode == COMPUTE_EXCLUSIVE:
        what = f"card {card.index} is in compute mode EXCLUSIVE_PROCESS."
        why = "One process may use it; a search has the next one waiting, a server may have two engines."
        found.append(Finding("compute mode", "warning", what, why, back))
    if card.persistence is False:
        why = "The driver stops the card when nobody uses it: the next start takes seconds, and clocks are forgotten."
        cure = f"sudo nvidia-smi -i {card.index} -pm 1 (or enable nvidia-persistenced)"
        found.append(Finding("persistence", "note", "persistence mode is off.", why, cure))
    return found


def check_clocks(facts: Facts) -> list[Finding]:
    """Is the card held under the power or the clock that it came with?"""
    card = facts.card
    if card is None:
        return []
    found = [_power(card), _clock(card)]
    return [finding for finding in found if finding is not None]


def _power(card: Card) -> Finding | None:
    limit, default = card.power_limit_w, card.power_default_w
    if limit is None or default is None or limit >= LESS_POWER * default:
        return None
    what = f"card {card.index} may take {limit:.0f} W; it came with {default:.0f} W."
    cure = f"sudo nvidia-smi -i {card.index} -pl {default:.0f}, unless it is meant."
    return Finding("power limit", "note", what, "It is slower than its kind, whatever runs on it.", cure)


def _clock(card: Card) -> Finding | None:
    limit, default = card.clock_limit_mhz, card.clock_default_mhz
    if limit is None or default is None or limit >= LESS_POWER * default:
        return None
    what = f"card {card.index} is held to {limit:.0f} MHz; it came with {default:.0f} MHz."
    cure = f"sudo nvidia-smi -i {card.index} -rac (and -rgc), unless it is meant."
    return Finding("clock limit", "note", what, "It is slower than its kind, whatever runs on it.", cure)
