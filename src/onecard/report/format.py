"""Numbers as people read them: milliseconds, MiB, percent and times, each with sensible digits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

NONE = "\u2013"
"""What stands where there is no number."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_KIBI = 1024
_EXACT_BELOW = 10_000
_LONG_S = 60
_HOUR_S = 3600
_TINY_ERROR = 1e-4
_MAX_DECIMALS = 4


def significant(value: float, digits: int = 3) -> str:
    """A positive number with about ``digits`` significant digits, never in exponent form."""
    if not math.isfinite(value):
        return not_finite(value)
    return f"{value:,.{decimals_for(value, digits)}f}"


def not_finite(value: float) -> str:
    """NaN, which means not measured, as a dash; infinity as its sign."""
    return NONE if math.isnan(value) else ("∞" if value > 0 else "-∞")


def decimals_for(value: float, digits: int = 3) -> int:
    """How many decimals show ``value`` with ``digits`` significant digits."""
    if value == 0 or not math.isfinite(value):
        return 0
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), _MAX_DECIMALS)


def column_decimals(values: Iterable[float]) -> int:
    """One number of decimals for a whole column, so that the points stand below each other."""
    finite = [v for v in values if math.isfinite(v) and v > 0]
    return min(decimals_for(min(finite)), 3) if finite else 0


def fixed(value: float, decimals: int) -> str:
    """A number with exactly ``decimals`` decimals, or a dash."""
    return f"{value:,.{decimals}f}" if math.isfinite(value) else not_finite(value)


def duration_ms(ms: float) -> str:
    """A latency with its unit: ``430 µs``, ``4.10 ms``, ``11.0 s``."""
    if not math.isfinite(ms):
        return not_finite(ms)
    if 0 < ms < 1:
        return f"{significant(ms * 1000)} µs"
    return f"{significant(ms)} ms" if ms < _EXACT_BELOW else f"{significant(ms / 1000)} s"


def duration_s(seconds: float) -> str:
    """A time somebody waited: ``0.4 s``, ``12 s``, ``3 min 20 s``, ``1 h 04 min``."""
    if not math.isfinite(seconds):
        return not_finite(seconds)
    if seconds < _LONG_S:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004
    whole = round(seconds)
    if whole < _HOUR_S:
        return f"{whole // 60} min" + (f" {whole % 60:02d} s" if whole % 60 else "")
    return f"{whole // _HOUR_S} h {whole % _HOUR_S // 60:02d} min"


def mib(count: int) -> str:
    """Bytes as a bare number of MiB, for a column whose head says the unit."""
    return NONE if count <= 0 else significant(count / _KIBI**2)


def bytes_(count: float) -> str:
    """Bytes with a binary unit: ``97.8 MiB``."""
    size = float(count)
    for unit in _UNITS:
        if abs(size) < _KIBI or unit == _UNITS[-1]:
            return f"{size:.0f} B" if unit == "B" else f"{significant(size)} {unit}"
        size /= _KIBI
    raise AssertionError("unreachable")


def times(ratio: float) -> str:
    """A ratio with the multiplication sign behind it."""
    return f"{significant(ratio)}\u00d7" if math.isfinite(ratio) else not_finite(ratio)


def plain_times(ratio: float) -> str:
    """A ratio for a sentence, one digit behind the point: ``6.2``; near 1 it keeps two."""
    return f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"  # noqa: PLR2004


def percent(share: float, digits: int = 2) -> str:
    """A share of one as a percentage with ``digits`` significant digits."""
    if not math.isfinite(share):
        return not_finite(share)
    return f"{significant(100 * share, digits)} %"


def agreement(share: float | None) -> str:
    """A share of rows, always one decimal; never rounded up to 100 % when a row differs."""
    if share is None or math.isnan(share):
        return NONE
    return f"{math.floor(share * 1000) / 10:.1f} %"


def relative_error(value: float) -> str:
    """A relative error: in percent, or as a power of ten where percent would be all zeros."""
    if not math.isfinite(value):
        return not_finite(value)
    if value == 0:
        return "0"
    if value >= _TINY_ERROR:
        return percent(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def count(value: float) -> str:
    """A large count: ``9,410``, ``25.6 M``."""
    if not math.isfinite(value):
        return not_finite(value)
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{significant(value / size)} {unit}"
    return f"{value:,.0f}" if value >= 100 else significant(value)  # noqa: PLR2004


def sizes(bucket: Mapping[str, int]) -> str:
    """A bucket in words: ``B=8, S=128``, or ``fixed shape``."""
    return ", ".join(f"{clean(name)}={size}" for name, size in bucket.items()) or "fixed shape"


def clean(text: str) -> str:
    """Text from a log or a name without terminal escapes, control or direction-changing characters."""
    return _BIDI.sub("", _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


def tail(text: str, lines: int = 40, characters: int = 6000) -> str:
    """The end of a log, which is where its reason stands."""
    kept = clean(text).strip("\n").split("\n")[-lines:]
    return "\n".join(kept)[-characters:]


def shorten(text: str, limit: int) -> str:
    """``text`` cut in its middle, because recipes differ at both ends."""
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"
