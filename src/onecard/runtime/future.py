"""The promise of an answer: an ordinary future whose cancellation reaches the queue."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple


class RequestTiming(NamedTuple):
    """Where a request's time went, in seconds; of its last batch where it took several.

    Args:
        queue_s: from its arrival to its first row being in a batch.
        total_s: from its arrival to its answer.
        batch_rows: rows of the batch that it was answered with.
        batches: how many it took part in.
    """

    queue_s: float
    total_s: float
    batch_rows: int
    batches: int


class Answer(Future[dict[str, Any]]):
    """What :meth:`onecard.runtime.engine.Engine.submit` gives: output names to arrays, once they are there.

    ``cancel()`` takes a request that still waits out of the queue; one that runs is not stopped.

    Attributes:
        timing: set before the result is.
    """

    timing: RequestTiming | None = None

    def __init__(self, on_cancel: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.on_cancel = on_cancel

    def cancel(self) -> bool:
        """True if it will not run, or has not been running when it was cancelled."""
        if not super().cancel():
            return False
        forget, self.on_cancel = self.on_cancel, None
        if forget is not None:
            forget()
        return True
