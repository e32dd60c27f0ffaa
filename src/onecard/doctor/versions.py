"""Version numbers as packages and drivers write them, and whether one lies in a range."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

_BOUND = re.compile(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)$")
_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version before any suffix: ``2.13.0+cpu`` is (2, 13, 0), ``2.14.0a0`` is (2, 14, 0)."""
    found = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def satisfies(version: str, bounds: str) -> bool:
    """True if a version lies in a range like ``>=2.11,<2.12``; missing numbers count as 0.

    Raises:
        ValueError: bounds that are not written like that.
    """
    have = numbers(version)
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        match = _BOUND.fullmatch(bound)
        if match is None:
            raise ValueError(f"cannot read '{bound}' of '{bounds}': write it like '>=2.11,<2.12'.")
        want = numbers(match[2])
        width = max(len(have), len(want))
        if not _COMPARE[match[1]](_padded(have, width), _padded(want, width)):
            return False
    return True


def _padded(version: tuple[int, ...], width: int) -> tuple[int, ...]:
    return version + (0,) * (width - len(version))
