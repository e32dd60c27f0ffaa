"""Durations and sizes in the form people write them: ``5ms``, ``10m``, ``2GiB``."""

from __future__ import annotations

import math
import re

from onecard.errors import UsageError

_SECONDS = {
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86_400.0,
    "w": 604_800.0,
}
_BYTES = {
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_TOO_MANY_BYTES = float(1 << 63)  # what messages between processes, and C's sizes, cannot hold
_QUANTITY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Zµ]*)\s*$")


def parse_duration(text: str) -> float:
    """Seconds from ``10m``, ``90s``, ``5ms``, ``30d``; a bare number is seconds.

    Raises:
        UsageError: not a duration.
    """
    return _parse(text, _SECONDS, "s", "a duration such as 5ms, 90s, 10m or 1h")


def parse_size(text: str) -> int:
    """Bytes from ``2GiB``, ``500MB``; a bare number is bytes.

    Raises:
        UsageError: not a size.
    """
    return max(1, int(_parse(text, _BYTES, "b", "a size such as 500MB or 2GiB", _TOO_MANY_BYTES)))


def _parse(
    text: str, units: dict[str, float] | dict[str, int], bare: str, expected: str, below: float = math.inf
) -> float:
    match = _QUANTITY.match(text)
    factor = units.get((match[2] or bare).lower()) if match else None
    value = float(match[1]) * factor if match and factor else 0.0
    if not 0 < value < below:
        raise UsageError(f"'{text}' is not {expected}.")
    return value
