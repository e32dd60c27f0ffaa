"""What the batcher is told to keep to: when to run, how much at once, and how much may wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from onecard.errors import DeadlineError, QueueFullError, UsageError
from onecard.runtime.work import Work


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How requests become batches, and how many may wait.

    Args:
        max_delay_s: how long a request may wait for others to share its batch; 0 runs what is there.
        preferred: row counts that are run as soon as they can be, without waiting for more.
        max_rows: most rows of a batch; None for what the model takes.
        max_tokens: most rows times padded length (the product of the lengths); None for no such bound.
            A single row that is longer runs alone.
        queue_items: most requests that wait.
        queue_bytes: most bytes of inputs that wait.
        queue_wait_s: longest predicted wait that a request is let in with.
        margin_s: how much before the last moment a batch is run for a deadline's sake: for waking up,
            copying, and the error of the prediction.
        max_clients: idle clients remembered in each priority for what they had lately.

    Raises:
        UsageError: a negative delay or margin, or a bound that lets nothing through.
    """

    max_delay_s: float = 0.0
    preferred: tuple[int, ...] = ()
    max_rows: int | None = None
    max_tokens: int | None = None
    queue_items: int = 10_000
    queue_bytes: int = 1 << 30
    queue_wait_s: float = math.inf
    margin_s: float = 0.002
    max_clients: int = 10_000

    def __post_init__(self) -> None:
        for name in ("max_delay_s", "margin_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} is {value}, but must be a time of 0 or more seconds.")
        for name in ("max_rows", "max_tokens", "queue_items", "queue_bytes", "queue_wait_s", "max_clients"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}, but must be above 0.")
        if any(rows < 1 for rows in self.preferred):
            raise UsageError(f"preferred is {self.preferred}, but batches have at least one row.")


class Bounds:
    """What waits, and whether more may.

    A request counts as waiting, with all of its bytes, until its last row is in a batch.
    """

    __slots__ = ("items", "nbytes", "policy", "rows")

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self.items = 0
        self.nbytes = 0
        self.rows = 0

    def full_for(self, work: Work) -> bool:
        """Whether one more request would be too many, or too many bytes."""
        return self.items >= self.policy.queue_items or self.nbytes + work.nbytes > self.policy.queue_bytes

    def refuse(self, work: Work, busy_s: float) -> NoReturn:
        """Say no to a request there is no room for.

        Args:
            work: the request.
            busy_s: predicted device seconds of all that waits or runs.

        Raises:
            QueueFullError: ``retry_after_s`` is when there is predicted to be room.
            UsageError: it alone is larger than all that may wait.
        """
        items, most = self.policy.queue_items, self.policy.queue_bytes
        if work.nbytes > most:
            raise UsageError(
                f"The request has {work.nbytes} bytes, but no more than {most} may wait (queue_bytes).",
                "Send it in parts, or raise queue_bytes.",
            )
        if self.items >= items:
            raise QueueFullError(
                f"{self.items} requests wait, and no more than {items} may (queue_items).",
                "Send it again later, or raise queue_items.",
                (self.items + 1 - items) / self.items * busy_s,
            )
        over = self.nbytes + work.nbytes - most
        raise QueueFullError(
            f"{self.nbytes} bytes wait; with {work.nbytes} more they would be {over} above what may (queue_bytes).",
            "Send it again later, or raise queue_bytes.",
            over / self.nbytes * busy_s,
        )

    def refuse_wait(self, wait_s: float) -> NoReturn:
        """Say no to a request that would wait for too long.

        Args:
            wait_s: how long it is predicted to wait for its turn.

        Raises:
            QueueFullError: ``retry_after_s`` is when the wait is predicted to be within the bound.
        """
        over_s = wait_s - self.policy.queue_wait_s
        raise QueueFullError(
            f"It would wait {wait_s:.3g} s, {over_s:.3g} s more than may be (queue_wait_s).",
            "Send it again later, or raise queue_wait_s.",
            over_s,
        )


def check_deadline(work: Work, now: float, wait_s: float, end_s: float) -> None:
    """Refuse a request that is predicted to be late, rather than let it wait for nothing.

    Args:
        work: the request.
        now: the time.
        wait_s: device seconds of what goes before it or along with it.
        end_s: how long its answer is predicted to take.

    Raises:
        DeadlineError: the deadline has passed or would; the message says by how much.
    """
    if work.deadline <= now:
        raise DeadlineError(f"The deadline passed {now - work.deadline:.3g} s before the request could wait.")
    late_s = now + end_s - work.deadline
    if late_s > 0:
        raise DeadlineError(
            f"The answer would take {end_s:.3g} s, which is {late_s:.3g} s after its deadline; "
            f"work of {wait_s:.3g} s is before it.",
            "Allow more time, or send it when less is waiting.",
        )
