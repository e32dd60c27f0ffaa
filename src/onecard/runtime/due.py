"""When rows run: at once, or how long they may rest for more to come.

Rows run now if

- their batch is full, or may not be delayed (``max_delay_s`` is 0, or one of them waited that long);
- a deadline among them would be missed by waiting on;
- a preferred row count is reached: then that many are run;
- or more waits than is looked at, so that nothing is gained by waiting.

If the first rows in order may rest, the next class of lengths in order that may not goes before them, unless they
would miss a deadline by it: then they go first, at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from onecard.runtime.cut import Plan, best_cut, cuts, earliest, fill, raised
from onecard.runtime.fair import Drawn
from onecard.runtime.kinds import Kind
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.work import Work

_MOST_KINDS = 8  # classes of lengths that may rest side by side


@dataclass(slots=True)
class Rest:
    """Why, and until when, what waits need not be looked at again.

    Args:
        policy: its delay and margin.
        in_flight_s: what the device was busy for when it was decided.
        until: when the first rows are due.
        rows: when so many more come, a batch could be due by its size.
        kinds: the classes that rest.
        deadline: the first among them.
        run_s: predicted seconds of the largest batch of any of them.
    """

    policy: BatchPolicy
    in_flight_s: float = 0.0
    until: float = math.inf
    rows: float = math.inf
    kinds: list[Kind] = field(default_factory=list)
    deadline: float = math.inf
    run_s: float = 0.0

    def add(self, plan: Plan, due: float, deadline: float) -> None:
        """Let a plan rest until it is due."""
        kind = plan.kind
        goals = [rows for rows in self.policy.preferred if plan.rows < rows <= kind.limit]
        self.until = min(self.until, due)
        self.rows = min(self.rows, min(goals, default=kind.limit) - plan.rows)
        self.kinds.append(kind)
        self.deadline = min(self.deadline, deadline)
        self.run_s = max(self.run_s, kind.seconds(kind.limit))

    def stir(self, work: Work) -> None:
        """One more comes: what rests is due earlier, or at once if the size of a batch could be reached."""
        self.rows -= work.rows
        if self.rows <= 0 or work.kind not in self.kinds:
            self.until = -math.inf
            return
        self.deadline = min(self.deadline, work.deadline)
        # Its batch will be larger than it was, at most the largest.
        last_start = self.deadline - self.run_s - self.in_flight_s - self.policy.margin_s
        self.until = min(self.until, work.arrived + self.policy.max_delay_s, last_start)


def decide(
    window: Sequence[Drawn], crowded: bool, dated: bool, policy: BatchPolicy, now: float, in_flight_s: float
) -> tuple[Plan, int] | Rest:
    """What to run of the next rows.

    Args:
        window: the rows, in order.
        crowded: whether more wait than these.
        dated: whether any of them has a deadline.
        policy: delays and preferred counts.
        now: the time.
        in_flight_s: how long the device is still busy.

    Returns:
        A plan and how many of its rows to run now, or how long to rest.
    """
    rest: Rest | None = None
    first: Plan | None = None
    start_first = math.inf  # when those that may rest must have started
    start_s = now + in_flight_s if dated else -math.inf
    for kind in dict.fromkeys([drawn[0].kind for drawn in window]):
        plan = base = fill(window, kind)
        if len(plan.picks) < len(window) and plan.rows < kind.limit:
            plan = raised(window, plan)
        counts = cuts(plan)
        if not (crowded or policy.max_delay_s == 0 or plan.rows >= plan.kind.limit):
            due, last_start = _due(window, plan, policy, in_flight_s)
            if due > now:
                counts = [rows for rows in counts if rows in policy.preferred]
            rest = rest or Rest(policy, in_flight_s)
            if not counts and len(rest.kinds) < _MOST_KINDS:
                for resting in (plan,) if plan is base else (plan, base):
                    rest.add(resting, due, earliest(window, plan))
                first, start_first = first or plan, min(start_first, last_start)
                continue
        if first is not None and (not counts or now + plan.kind.seconds(plan.rows) > start_first):
            plan, counts = first, cuts(first)
        return plan, best_cut(window, plan, counts, start_s)
    return rest or Rest(policy, in_flight_s)


def _due(window: Sequence[Drawn], plan: Plan, policy: BatchPolicy, in_flight_s: float) -> tuple[float, float]:
    """When a plan must run, and when it must for its deadlines' sake alone."""
    last_start = earliest(window, plan) - plan.kind.seconds(plan.rows) - in_flight_s - policy.margin_s
    oldest = min([window[at][0].arrived for at in plan.picks])
    return min(oldest + policy.max_delay_s, last_start), last_start
