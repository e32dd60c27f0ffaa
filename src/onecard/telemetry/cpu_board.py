"""Why a Raspberry Pi runs slower than it could: its firmware's flags, as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

from onecard.host import ROOT

THROTTLE_BITS = {0: "under_voltage", 1: "frequency_capped", 2: "throttled", 3: "soft_temperature_limit"}
"""Bits by name (Raspberry Pi documentation, ``vcgencmd get_throttled``); 16 bits higher they tell of the past."""

_PAST = 16
_PATTERN = "sys/devices/platform/soc*/soc*firmware/get_throttled"


def board_throttle(root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """``throttle_reasons`` now and ``past_throttle_reasons`` since the start; empty on other machines.

    Raises:
        OSError: the flags cannot be read.
        ValueError: they are not a hexadecimal number.
    """
    path = next(iter(sorted(root.glob(_PATTERN))), None)
    if path is None:
        return {}
    flags = int(path.read_text(), 16)
    return {"throttle_reasons": _names(flags), "past_throttle_reasons": _names(flags >> _PAST)}


def _names(flags: int) -> tuple[str, ...]:
    return tuple(name for bit, name in THROTTLE_BITS.items() if flags >> bit & 1)
