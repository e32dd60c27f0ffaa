"""The promise of an answer: what the engine asks of whoever waits for one, and an ordinary future that is that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from onecard.runtime.staging import StageTimings


class BatchTiming(NamedTuple):
    """When a batch was run, in seconds of ``time.monotonic``.

    Args:
        launched: its rows began to be collected.
        ended: its answers were on the host.
        stages: where the time between went.
    """

    launched: float
    ended: float
    stages: StageTimings


class RequestTiming(NamedTuple):
    """Where a request's time went, in seconds; of its last batch where it took several.

    Args:
        queue_s: from its arrival to its first row being in a batch.
        total_s: from its arrival to its answer.
        batch_rows: rows of the batch that it was answered with.
        batches: how many it took part in.
        batch: when that batch was run; None where nobody took the time.
    """

    queue_s: float
    total_s: float
    batch_rows: int
    batches: int
    batch: BatchTiming | None = None


class Receiver(Protocol):
    """Who gets a request's answer. The engine calls it on any of its threads, with no lock held; it must not raise."""

    def begin(self) -> bool:
        """The request's first row is in a batch, which is launched next; called once.

        Returns:
            False if nobody waits for it any more.
        """
        ...

    def solve(self, outputs: dict[str, Any], timing: RequestTiming) -> None:
        """The answer is there: output names to arrays of the receiver's own."""
        ...

    def fail(self, error: BaseException) -> None:
        """There will be none; nothing if the request is over already."""
        ...


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

    def begin(self) -> bool:
        """See :class:`Receiver`."""
        with self._condition:  # another lane may fail it at this moment
            return (not self.done() or self.cancelled()) and self.set_running_or_notify_cancel()

    def solve(self, outputs: dict[str, Any], timing: RequestTiming) -> None:
        """See :class:`Receiver`."""
        self.timing = timing
        self.on_cancel = None  # or future and request would hold each other till a garbage collection
        if self.running():
            self.set_result(outputs)

    def fail(self, error: BaseException) -> None:
        """See :class:`Receiver`."""
        self.on_cancel = None  # or future and request would hold each other, and the inputs
        with contextlib.suppress(InvalidStateError):  # it was over, or cancelled
            self.set_exception(error)

    def cancel(self) -> bool:
        """True if it will not run, or has not been running when it was cancelled."""
        if not super().cancel():
            return False
        forget, self.on_cancel = self.on_cancel, None
        if forget is not None:
            forget()
        return True
