"""Which of the next rows go into a batch together, and how many of them.

**Who.** The first rows in order decide the class of lengths. Rows of that class fill the batch in order, then, if there
is room, rows of classes that join it, in order. If there still is room, the class is raised to take the first
longer rows that come, as long as rows per predicted second do not fall.

**How many.** A batch may be cut to each row count below its own at which the size grows (a step) or that the policy
prefers; the rows beyond stay where they are in order, and are next. Of all cuts and no cut,

1. those count by which the fewest requests of the batch miss their deadline, by prediction, if the rows beyond the
   cut run right after it;
2. of these, the one with the most rows per predicted second wins; a cut must have 2 % more than a larger one, so that
   the noise of the measurements does not make two runs of one.

So a batch is never padded into a larger size when that costs more than it gains, and order is never violated: rows
beyond a cut may be overdue, but no later rows go before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onecard.runtime.fair import Drawn
from onecard.runtime.kinds import Kind

_WORTH_A_CUT = 1.02  # times the rows per second of the larger run
_RAISES = 4  # classes tried above the first one's


@dataclass(slots=True)
class Plan:
    """Rows that could run together.

    Args:
        kind: the class of lengths it runs at.
        picks: which of the drawn rows, in the batch's order; the last may go in part.
        rows: altogether, at most the class's limit.
        least: rows without which it would not be of this class; no cut goes below.
    """

    kind: Kind
    picks: Sequence[int]
    rows: int
    least: int = 1


def fill(window: Sequence[Drawn], kind: Kind) -> Plan:
    """Rows of one class in order, then others that join it.

    Args:
        window: the next rows in order.
        kind: the class, which at least one of them has.

    Returns:
        As many as fit in one batch.
    """
    kinds = [drawn[0].kind for drawn in window]
    if kinds.count(kind) == len(kinds):
        return Plan(kind, range(len(window)), min(kind.limit, sum([drawn[2] for drawn in window])))
    picks: list[int] = []
    plan = Plan(kind, picks, 0)
    _add(plan, picks, window, [at for at, other in enumerate(kinds) if other is kind])
    _add(plan, picks, window, [at for at, other in enumerate(kinds) if other is not kind])
    return plan


def raised(window: Sequence[Drawn], plan: Plan) -> Plan:
    """The same rows and longer ones beside them in a longer class, if rows per second do not fall by it."""
    for _ in range(_RAISES):
        picked = set(plan.picks)
        rest = [at for at in range(len(window)) if at not in picked]
        higher = next((at for at in rest if window[at][0].kind.takes(plan.kind)), None)
        if higher is None or plan.rows >= plan.kind.limit:
            return plan
        kind: Kind = window[higher][0].kind
        picks = list(plan.picks)
        longer = Plan(kind, picks, plan.rows, plan.rows + 1)
        if kind.limit <= plan.rows or not all(kind.takes(window[at][0].kind) for at in plan.picks):
            return plan
        _add(longer, picks, window, rest)
        if _most_rate(longer) < _most_rate(plan):
            return plan
        plan = longer
    return plan


def best_cut(window: Sequence[Drawn], plan: Plan, counts: Sequence[int], start_s: float) -> int:
    """How many of a plan's rows to run: the rule at the head of this file.

    Args:
        window: the next rows in order.
        plan: those that could run.
        counts: row counts to choose from, ascending.
        start_s: when the batch would start, on the clock of the deadlines; ``-inf`` if they do not matter.

    Returns:
        One of ``counts``.
    """
    if len(counts) == 1:
        return counts[0]
    kind = plan.kind
    missed = {} if start_s == -math.inf else _missed(window, plan, counts, start_s)
    best, fewest, rate = 0, math.inf, 0.0
    for rows in reversed(counts):
        late = missed.get(rows, 0)
        here = rows / kind.seconds(rows)
        if late < fewest or (late == fewest and here > rate * _WORTH_A_CUT):
            best, fewest, rate = rows, late, here
    return best


def cuts(plan: Plan) -> list[int]:
    """The row counts a plan may be cut to, ascending, and all of it."""
    return [rows for rows in plan.kind.cuts if plan.least <= rows < plan.rows] + [plan.rows]


def earliest(window: Sequence[Drawn], plan: Plan) -> float:
    """The first deadline in a plan."""
    return min([window[at][0].deadline for at in plan.picks])


def _add(plan: Plan, picks: list[int], window: Sequence[Drawn], candidates: Sequence[int]) -> None:
    """Fill a plan, and its picks, up with those of the candidates that join it, in order."""
    for at in candidates:
        if plan.rows >= plan.kind.limit:
            break
        if plan.kind.takes(window[at][0].kind):
            picks.append(at)
            plan.rows = min(plan.rows + window[at][2], plan.kind.limit)


def _most_rate(plan: Plan) -> float:
    """Rows per predicted second of a plan's best cut."""
    return max(rows / plan.kind.seconds(rows) for rows in cuts(plan))


def _missed(window: Sequence[Drawn], plan: Plan, counts: Sequence[int], start_s: float) -> dict[int, int]:
    """How many requests miss their deadline by each cut; empty if that is none, whichever it is."""
    all_s = plan.kind.seconds(plan.rows)
    if start_s + 2 * all_s < earliest(window, plan):
        return {}
    missed = {}
    for rows in counts:
        first_s = plan.kind.seconds(rows)
        last_s = first_s + (plan.kind.seconds(plan.rows - rows) if rows < plan.rows else 0.0)
        late = end = 0
        for at in plan.picks:
            end += window[at][2]
            late += window[at][0].deadline < start_s + (first_s if end <= rows else last_s)
        missed[rows] = late
    return missed
