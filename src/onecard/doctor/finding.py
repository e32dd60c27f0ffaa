"""What the doctor says: findings, each with its level, its reason and its cure, and the exit code they make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Level = Literal["ok", "note", "warning", "error"]

FOUND_TROUBLE = 1
"""The exit code where an error (or, if asked for, a warning) was found."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Args:
        area: what was looked at, in a word or two.
        level: ``ok``; ``note`` for what is good to know; ``warning`` for what costs speed, a backend or trust in the
            figures; ``error`` for what will not work at all.
        what: what was found, with its figures.
        why: why it matters; empty where all is well.
        cure: what to do, as a command where there is one; empty where all is well.
    """

    area: str
    level: Level
    what: str
    why: str = ""
    cure: str = ""


def exit_code(findings: Iterable[Finding], *, strict: bool = False) -> int:
    """The command's exit code: 0, or :data:`FOUND_TROUBLE` after an error.

    Args:
        findings: of the whole visit.
        strict: a warning counts like an error.
    """
    bad = ("warning", "error") if strict else ("error",)
    return FOUND_TROUBLE if any(finding.level in bad for finding in findings) else 0
