"""Which of the waiting requests run out of time, and when the next one does."""

from __future__ import annotations

import heapq
import math

from onecard.runtime.work import Work

_SPARE = 64  # garbage that is not worth clearing


class Deadlines:
    """The requests with a deadline that wait, by deadline.

    A request that leaves stays in the heap as garbage until it comes up, or until garbage is most of the heap.
    """

    __slots__ = ("_heap", "_serial", "waiting")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Work]] = []
        self._serial = 0
        self.waiting = 0

    def enter(self, work: Work) -> None:
        """A request with a deadline begins to wait."""
        self.waiting += 1
        self._serial += 1
        heapq.heappush(self._heap, (work.deadline, self._serial, work))

    def leave(self) -> None:
        """One waits no more, its ``queued`` being 0: all in batches, or gone."""
        self.waiting -= 1
        if len(self._heap) > 2 * self.waiting + _SPARE:
            # One entry a request: who was put back may have two.
            self._heap = list({id(entry[2]): entry for entry in self._heap if entry[2].queued}.values())
            heapq.heapify(self._heap)

    def first(self) -> float:
        """The earliest deadline of those that wait; ``inf`` if none."""
        first = self.first_work()
        return math.inf if first is None else first.deadline

    def first_work(self) -> Work | None:
        """The one that waits with the earliest deadline; None if none has one."""
        heap = self._heap
        while heap:
            if heap[0][2].queued:
                return heap[0][2]
            heapq.heappop(heap)
        return None

    def works(self) -> list[Work]:
        """Those with a deadline that wait, in no order; one may be told twice."""
        return [entry[2] for entry in self._heap if entry[2].queued]
