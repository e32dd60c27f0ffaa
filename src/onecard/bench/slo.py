"""A service level objective: a percentile of the latencies, and the limit that it has to keep."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onecard.errors import UsageError
from onecard.units import parse_duration

_OBJECTIVE = re.compile(r"\s*(?:p(?P<percentile>\d+(?:\.\d+)?)|(?P<max>max))\s*(?:<=|=|<)\s*(?P<limit>\S.*)")
_MAXIMUM = 100.0


@dataclass(frozen=True)
class Slo:
    """``p99=20ms``: so many percent of the requests are answered within the limit.

    Args:
        percentile: above 0; 100 is the maximum.
        limit_s: of that percentile.
    """

    percentile: float
    limit_s: float

    @property
    def name(self) -> str:
        """Of the percentile: ``p99.9`` or ``max``."""
        return percentile_name(self.percentile)

    def allowed_late(self, requests: int) -> int:
        """How many of the requests may be later than the limit."""
        return int(requests * (1 - self.percentile / 100) + 1e-9)

    def __str__(self) -> str:
        return f"{self.name}={self.limit_s * 1e3:g}ms"


def percentile_name(percentile: float) -> str:
    """``p99.9``, or ``max`` for 100."""
    return "max" if percentile >= _MAXIMUM else f"p{percentile:g}"


def parse_slo(text: str) -> Slo:
    """Read an objective such as ``p99=20ms``, ``p99.9=1s`` or ``max=100ms``.

    Raises:
        UsageError: it is none.
    """
    match = _OBJECTIVE.fullmatch(text)
    percentile = _MAXIMUM if match and match["max"] else float(match["percentile"]) if match else 0.0
    if match is None or not 0 < percentile <= _MAXIMUM:
        raise UsageError(
            f"cannot read --slo '{text}': expected a percentile and its limit,", "such as p99=20ms, p99.9=1s or max=2s."
        )
    return Slo(percentile, parse_duration(match["limit"]))
