"""All requests of a front that have no answer yet: those that the engine has, and those that wait for an engine.

Inference is pure, so what an engine had not answered when it died is sent to the next one. A request that was running
each time that an engine died is not sent again: the marks in the segment of requests tell which were.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable

from onecard.errors import DeadlineError, EngineError, OnecardError, QueueFullError
from onecard.ipc.messages import Cancel
from onecard.server.engine_link import EngineLink
from onecard.server.engine_memory import RequestMemory
from onecard.server.engine_request import EngineRequest
from onecard.server.http_types import LOGGER

_LATE_S = 1.0
"""So long after its deadline a request is given up that a living engine should have answered."""

_CHECK_S, _CHECK_ALONE_S = 0.5, 0.05
"""How often deadlines are looked at, with an engine and without one."""


class InFlight:
    """All requests that have no answer yet.

    Args:
        memory: where their inputs and marks lie.
        max_runs: how often a request is run at most, if the engine dies each time.
        max_waiting: requests that may wait for an engine.

    Attributes:
        link: to the engine; None while there is none.
        restart_s: how long a new engine will take.
    """

    def __init__(self, memory: RequestMemory, max_runs: int, max_waiting: int) -> None:
        self.link: EngineLink | None = None
        self.restart_s = 5.0
        self._memory = memory
        self._max_runs = max_runs
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._sent: dict[int, EngineRequest] = {}  # by the id of the last sending
        self._held: dict[int, EngineRequest] = {}  # by order
        self._check: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many wait for an engine."""
        return len(self._held)

    @property
    def sent(self) -> int:
        """How many the engine has, or will have as soon as it reads them."""
        return len(self._sent)

    def check_room(self) -> None:
        """Refuse one more that would wait for an engine.

        Raises:
            QueueFullError: enough do.
        """
        if len(self._held) >= self._max_waiting:
            raise QueueFullError(
                f"{len(self._held)} requests wait for the engine, which is being started again.",
                "Try again in a moment.",
                math.ceil(self.restart_s),
            )

    def add(self, request: EngineRequest, hold: bool) -> None:
        """Take a new request: send it, or hold it until :meth:`send_held`."""
        request.order = number = next(self._numbers)
        if request.deadline is not None and self._check is None:
            self._check_later()
        if hold:
            self._held[number] = request
        else:
            self._send(request, number)

    def send_held(self, which: Callable[[str], bool]) -> None:
        """Send what waits: first what may have killed an engine, then the others, each as they came.

        Args:
            which: whether requests for a model of this name are sent now.
        """
        chosen = [request for request in self._held.values() if which(request.model)]
        now = time.monotonic()
        for request in sorted(chosen, key=lambda request: (not request.alone, request.order)):
            del self._held[request.order]
            if request.is_late(now):
                request.fail(late(request))
            else:
                self._send(request, next(self._numbers))

    def fail_held(self, model: str, error: OnecardError) -> None:
        """Refuse what waits for a model."""
        for request in [request for request in self._held.values() if request.model == model]:
            del self._held[request.order]
            request.fail(error)

    def end(self, id: int) -> EngineRequest | None:
        """The engine answered or refused a request, and reads its inputs no more.

        Returns:
            The request; None if nobody waits for it.
        """
        request = self._sent.pop(id, None)
        if request is None:
            LOGGER.warning("the engine answered request %d, which it does not have", id)
            return None
        request.let_go()
        return None if request.done() else request

    def cancel(self, request: EngineRequest) -> None:
        """Nobody waits for a request any more."""
        if self._held.pop(request.order, None) is not None:
            request.let_go()
        elif not request.sent and self._sent.pop(request.id, None) is not None:
            request.let_go()  # the link skips it
        elif self.link is not None and request.id in self._sent:
            self.link.send(Cancel(request.id))  # its memory may be read until the engine has ended it

    def hold_all(self) -> None:
        """The engine is surely dead: see what it was running, and hold for the next one what it had not answered."""
        sent, self._sent = self._sent, {}
        for request in sent.values():
            self._hold_again(request)
        if self._check is not None:
            self._check.cancel()
            self._check_later()

    def fail_all(self, make: Callable[[], OnecardError]) -> None:
        """Refuse everything; there is no engine any more, and there will be none."""
        for request in (*self._sent.values(), *self._held.values()):
            request.fail(make())
        self._sent.clear()
        self._held.clear()
        if self._check is not None:
            self._check.cancel()
            self._check = None

    def _send(self, request: EngineRequest, id: int) -> None:
        request.id = id
        request.sent = False
        self._sent[id] = request
        if self.link is not None:
            self.link.send(request)

    def _hold_again(self, request: EngineRequest) -> None:
        if request.done() or request.placed is None:
            request.let_go()
            return
        if self._memory.is_running(request.placed.lease):
            request.deaths += 1
            request.alone = True
            if request.deaths >= self._max_runs:
                LOGGER.error("%s was running each of the %d times that the engine died; it is refused",
                             request.describe(), request.deaths)  # fmt: skip
                request.fail(
                    EngineError(
                        f"this request was running each of the {request.deaths} times that the engine died, "
                        "so it is not run again.",
                        "Look in the server's log for what the engine said when it died.",
                    )
                )
                return
            LOGGER.warning("%s was running when the engine died; it is run again, alone", request.describe())
        self._memory.clear_mark(request.placed.lease)
        self._held[request.order] = request

    def _check_later(self) -> None:
        wait_s = _CHECK_ALONE_S if self.link is None else _CHECK_S
        self._check = self._loop.call_later(wait_s, self._check_deadlines)

    def _check_deadlines(self) -> None:
        """Give up what no engine, or one that hangs, will answer in time."""
        self._check = None
        now = time.monotonic()
        for request in [request for request in self._held.values() if request.is_late(now)]:
            del self._held[request.order]
            request.fail(late(request))
        for request in [request for request in self._sent.values() if request.is_late(now - _LATE_S)]:
            if not request.sent:
                del self._sent[request.id]
                request.fail(late(request))
            elif self.link is not None and not request.done():
                request.set_exception(late(request))
                self.link.send(Cancel(request.id))  # its memory may be read until the engine has ended it
        rest = itertools.chain(self._held.values(), self._sent.values())
        if any(request.deadline is not None and not request.done() for request in rest):
            self._check_later()


def late(request: EngineRequest) -> DeadlineError:
    """The error of a request whose answer did not come in time."""
    return DeadlineError(f"the engine did not answer for model '{request.model}' before the request's deadline.")
