"""What became of every query of a run, raw: when it was due, taken up, sent and ended, and how."""

from __future__ import annotations

import math
from array import array

ANSWERED = ""
OPEN = "open"
"""The outcome of a query whose answer has not come. All others say ``refused`` or ``failed``, and why."""
REFUSED = "refused "
FAILED = "failed "


class Records:
    """Columns of one run's queries; a query is one request, or several that are sent together.

    Times are those of ``time.perf_counter``.

    Attributes:
        due: when it was to be sent; latency counts from here.
        taken: when the generator got to it; NaN before.
        sent: when its last request went out, which is later where it waited for a free connection; NaN before.
        ended: when its last answer was there; NaN before.
        outcomes: :data:`ANSWERED`, :data:`OPEN`, or the first thing that went wrong.
    """

    def __init__(self) -> None:
        self.due = array("d")
        self.taken = array("d")
        self.sent = array("d")
        self.ended = array("d")
        self.outcomes: list[str] = []
        self._left: array[int] = array("l")  # requests of it without an answer

    def __len__(self) -> int:
        return len(self.due)

    def add(self, due: float, requests: int = 1) -> int:
        """A new query; returns its number."""
        self.due.append(due)
        for column in (self.taken, self.sent, self.ended):
            column.append(math.nan)
        self.outcomes.append(OPEN)
        self._left.append(requests)
        return len(self.due) - 1

    def end(self, number: int, outcome: str, when: float) -> bool:
        """Note the end of one of its requests; returns whether it was the last."""
        self._left[number] -= 1
        known = self.outcomes[number]
        if outcome != ANSWERED and known == OPEN:
            self.outcomes[number] = outcome
        if self._left[number]:
            return False
        self.ended[number] = when
        if self.outcomes[number] == OPEN:
            self.outcomes[number] = ANSWERED
        return True
