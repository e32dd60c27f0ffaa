"""The order of the queue: strict priorities, clients evenly by device seconds, each client's by deadline.

Between clients this is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). A client's tag is the virtual
time at which its next rows start; taking rows moves it on by their predicted device seconds. The client with the
lowest tag is next. The clock of a priority is the lowest tag of those that wait, and a client that begins to wait
starts no earlier than that, so nobody saves up time by being idle.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from onecard.runtime.work import Work

Entry = tuple[float, float, int, Work]
"""In a client's heap: deadline, arrival, serial number of the put, and the request."""

_NEVER = math.inf
_SPARE = 64  # garbage that is not worth clearing
_MANY_LEVELS = 16  # priorities; beyond, empty ones are dropped


class Client:
    """What one client has waiting in one priority, and what it had.

    Attributes:
        tag: virtual time at which its next rows start.
        heap: its requests with rows that no batch has taken; those gone stay until they come up.
        waiting_s: predicted seconds of those rows.
        dated_s: of those among them that have a deadline.
        spent_s: of those just taken, not charged yet.
        active: whether it stands in its priority's order.
    """

    __slots__ = ("active", "dated_s", "heap", "spent_s", "tag", "waiting_s")

    def __init__(self) -> None:
        self.tag = 0.0
        self.heap: list[Entry] = []
        self.waiting_s = 0.0
        self.dated_s = 0.0
        self.spent_s = 0.0
        self.active = False


Drawn = tuple[Work, int, int, Client | None, Any]
"""Rows in the order of the queue: whose, the first, how many, their client and its :data:`Entry`; for rows that were
put back neither."""


class Level:
    """One priority.

    Attributes:
        priority: its number.
        clients: by name; idle ones are forgotten once that makes no difference.
        order: those that wait, by tag.
        clock: the virtual time.
        latest: the highest tag given out.
        returned: rows that were put back, by their request's place; they come before all others.
        waiting_s: predicted seconds of all clients' waiting rows.
        returned_s: predicted seconds of the rows put back.
    """

    __slots__ = (
        "_most_idle",
        "_prune_at",
        "_serial",
        "_visited",
        "clients",
        "clock",
        "latest",
        "order",
        "priority",
        "returned",
        "returned_s",
        "waiting_s",
    )

    def __init__(self, priority: int, max_clients: int) -> None:
        self.priority = priority
        self.clients: dict[str, Client] = {}
        self.order: list[tuple[float, int, Client]] = []
        self.clock = 0.0
        self.latest = 0.0
        self.returned: list[tuple[int, int, int, Work]] = []
        self.waiting_s = 0.0
        self.returned_s = 0.0
        self._visited: list[Client] = []
        self._serial = 0
        self._most_idle = max_clients
        self._prune_at = max_clients

    def push(self, entry: Entry) -> None:
        """Let a request wait."""
        work = entry[3]
        client = self.clients.get(work.client)
        if client is None:
            if len(self.clients) >= self._prune_at:
                self._prune()
            client = self.clients[work.client] = Client()
        heapq.heappush(client.heap, entry)
        seconds = work.rows * work.row_s
        self.waiting_s += seconds
        client.waiting_s += seconds
        if work.deadline != _NEVER:
            client.dated_s += seconds
        if not client.active:
            client.tag = max(client.tag, self.clock)
            self._stand(client)

    def draw(self, now: float) -> Iterator[Drawn]:
        """Take rows out in order, one request after the other; :meth:`close` puts the clients back in order.

        A client that was drawn from is passed over until the others' tags have come up to what was drawn. Requests
        whose deadline has passed are left out.
        """
        while self.returned:
            _, start, rows, work = heapq.heappop(self.returned)
            if work.queued and work.deadline > now:
                yield work, start, rows, None, None
        order, visiting = self.order, list[tuple[float, int, Client]]()
        while order or visiting:
            if visiting and (not order or visiting[0] < order[0]):
                tag, serial, client = heapq.heappop(visiting)
            else:
                tag, serial, client = heapq.heappop(order)
                self._visited.append(client)
            others = min(visiting[0][0] if visiting else _NEVER, order[0][0] if order else _NEVER)
            heap = client.heap
            while heap and tag <= others:
                entry = heapq.heappop(heap)
                work = entry[3]
                if work.queued and work.deadline > now:
                    rows = work.rows - work.taken
                    tag += rows * work.row_s
                    yield work, work.taken, rows, client, entry
            if heap:
                heapq.heappush(visiting, (tag, serial, client))

    def take(self, client: Client, seconds: float, dated: bool) -> None:
        """So much of a client's waits no more; what rounding leaves below 0 is cut off."""
        self.waiting_s = max(0.0, self.waiting_s - seconds)
        client.waiting_s = max(0.0, client.waiting_s - seconds)
        if dated:
            client.dated_s = max(0.0, client.dated_s - seconds)

    def close(self, price: float) -> None:
        """After drawing: those drawn from are charged and stand in order again, and the clock is set.

        Args:
            price: device seconds of the batch for each second that its rows were predicted to take.
        """
        for client in self._visited:
            spent_s, client.spent_s = client.spent_s, 0.0
            client.tag += spent_s * price
            self.waiting_s -= spent_s
            client.waiting_s -= spent_s
            if client.heap:
                self._stand(client)
            else:
                client.active = False
                client.waiting_s = client.dated_s = 0.0
                self.latest = max(self.latest, client.tag)
        self._visited.clear()
        if self.order:
            self.clock = max(self.clock, self.order[0][0])
        else:
            self.clock = max(self.clock, self.latest)
            self.waiting_s = 0.0

    def wait_s(self, work: Work) -> float:
        """Predicted seconds until a new request's turn in this priority: an upper bound, but for one batch.

        Before it come its own client's requests (of those, only such as have a deadline if it has one), and every
        other client's until that one's tag is where this request would end.
        """
        client = self.clients.get(work.client)
        own_s = debt_s = others_s = 0.0
        others = len(self.order)
        if client is None:
            others_s = self.waiting_s
        else:
            own_s = client.waiting_s if work.deadline == _NEVER else client.dated_s
            others_s = self.waiting_s - client.waiting_s
            others -= client.active
            debt_s = max(0.0, client.tag - self.clock)
        return self.returned_s + own_s + min(others_s, others * (debt_s + own_s + work.rows * work.row_s))

    def sweep(self) -> None:
        """Drop what is gone."""
        self.returned = [entry for entry in self.returned if entry[3].queued]
        heapq.heapify(self.returned)
        for _, _, client in sorted(self.order):
            client.heap = [entry for entry in client.heap if entry[3].queued]
            heapq.heapify(client.heap)
            self._visited.append(client)
        self.order = []
        self.close(0.0)

    def _stand(self, client: Client) -> None:
        client.active = True
        self._serial += 1  # among equal tags, who was served last comes last
        heapq.heappush(self.order, (client.tag, self._serial, client))
        self.latest = max(self.latest, client.tag)

    def _prune(self) -> None:
        """Forget the idle whose tag the clock has passed, and if the others are too many, those least ahead of it."""
        idle = [(client.tag, name) for name, client in self.clients.items() if not client.active]
        kept = heapq.nlargest(self._most_idle // 2, (each for each in idle if each[0] > self.clock))
        for name in {name for _, name in idle} - {name for _, name in kept}:
            del self.clients[name]
        self._prune_at = max(self._most_idle, 2 * len(self.clients))


class FairQueue:
    """All priorities.

    Args:
        max_clients: idle clients remembered in each priority.
    """

    def __init__(self, max_clients: int) -> None:
        self._levels: list[Level] = []  # by priority
        self._by_priority: dict[int, Level] = {}
        self._max_clients = max_clients
        self._serial = 0
        self._garbage = 0  # entries of requests that are gone, at most

    def push(self, work: Work) -> None:
        """Let a request wait."""
        self._serial += 1
        level = self._by_priority.get(work.priority) or self._add_level(work.priority)
        level.push((work.deadline, work.arrived, self._serial, work))

    def push_back(self, work: Work, start: int, rows: int) -> None:
        """Let rows that were taken wait again, before all others of their priority."""
        level = self._by_priority.get(work.priority) or self._add_level(work.priority)
        heapq.heappush(level.returned, (work.place, start, rows, work))
        level.returned_s += rows * work.row_s

    def draw(self, now: float) -> Iterator[Drawn]:
        """All that waits in order, taken out one request after the other; :meth:`settle` must follow."""
        return chain.from_iterable(level.draw(now) for level in self._levels)

    def settle(self, drawn: Sequence[Drawn], taken: Sequence[int], seconds: float) -> None:
        """Put back what was drawn but not taken, and charge for what was.

        A client pays its rows' share of the batch's time, each row weighted with what it takes among its like, so
        short rows do not pay for the padding that long ones brought. Rows that were put back are paid for already.

        Args:
            drawn: what :meth:`draw` gave, in its order.
            taken: how many rows of each are in the batch, from its first on.
            seconds: predicted of the batch.
        """
        weight = sum([each[0].row_s * rows for each, rows in zip(drawn, taken, strict=True)])
        price = seconds / weight if weight else 0.0
        for (work, start, rows, client, entry), took in zip(drawn, taken, strict=True):
            if client is None:
                level = self._by_priority[work.priority]
                level.returned_s = max(0.0, level.returned_s - took * work.row_s)
                if took < rows:
                    heapq.heappush(level.returned, (work.place, start + took, rows - took, work))
                continue
            if took:
                work.taken += took
                client.spent_s += took * work.row_s
                if work.deadline != _NEVER:
                    client.dated_s -= took * work.row_s
            if took < rows:
                heapq.heappush(client.heap, entry)
        for level in self._levels:
            level.close(price)

    def forget(self, work: Work, live: int) -> None:
        """A request is gone: its rows are passed over from now on.

        Args:
            work: the request; its ``queued`` still says what waited.
            live: how many requests wait without it.
        """
        level = self._by_priority.get(work.priority)
        if level is None:
            return
        client = level.clients.get(work.client)
        if client is not None:
            level.take(client, work.left * work.row_s, work.deadline != _NEVER)
        level.returned_s = max(0.0, level.returned_s - (work.queued - work.left) * work.row_s)
        self._garbage += 1
        if self._garbage > live + _SPARE:
            self._garbage = 1  # this one may stay, as it still counts as waiting
            for each in self._levels:
                each.sweep()

    def wait_s(self, work: Work) -> float:
        """Predicted seconds until a new request's turn: all of higher priority, and what is ahead in its own."""
        seconds = 0.0
        for level in self._levels:
            if level.priority >= work.priority:
                return seconds + (level.wait_s(work) if level.priority == work.priority else 0.0)
            seconds += level.waiting_s + level.returned_s
        return seconds

    def queued_s(self, priority: float = _NEVER) -> float:
        """Predicted device seconds of all that waits, down to a priority."""
        return sum(each.waiting_s + each.returned_s for each in self._levels if each.priority <= priority)

    def works(self) -> list[Work]:
        """All requests that wait, in no order, each once."""
        found: dict[int, Work] = {}
        for level in self._levels:
            waiting = [entry[3] for client in level.clients.values() for entry in client.heap]
            found |= {id(work): work for work in (*waiting, *(entry[3] for entry in level.returned)) if work.queued}
        return list(found.values())

    def _add_level(self, priority: int) -> Level:
        if len(self._levels) >= _MANY_LEVELS:
            # An empty one holds nothing worth keeping: when all was served, everybody starts even.
            self._levels = [each for each in self._levels if each.order or each.returned]
        self._levels.append(Level(priority, self._max_clients))
        self._levels.sort(key=lambda each: each.priority)
        self._by_priority = {each.priority: each for each in self._levels}
        return self._by_priority[priority]
