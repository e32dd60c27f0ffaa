"""Keeps one worker alive: starts it, notices its death or hang, starts the next one, and keeps what it had counted."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onecard.errors import DataError, EngineError, OnecardError
from onecard.server.engine_child import EngineChild
from onecard.server.http_types import LOGGER
from onecard.server.worker_link import WorkerLink, pair
from onecard.server.worker_messages import AnyMessage, AskFigures, Begin, Drain
from onecard.telemetry.snapshot import ModelFigures, Snapshot, decode, merge

WORKER_COMMAND = (sys.executable, "-m", "onecard.server.worker")


@dataclass(frozen=True)
class KeeperOptions:
    """When a worker counts as lost, and how its successor is started.

    Args:
        look_s: how often it is asked what it counts.
        hang_s: so long without an answer, and it is killed.
        hang_starting_s: likewise while it starts.
        first_backoff_s: before the second start after a life that was short; then twice as long each time. The first
            start is at once.
        most_backoff_s: what that ends at.
        settled_s: a life that was longer was not short.
        end_s: to be gone, once what came in was answered.
        lost_s: for one whose connection ended, to be gone.
    """

    look_s: float = 1.0
    hang_s: float = 10.0
    hang_starting_s: float = 120.0
    first_backoff_s: float = 0.25
    most_backoff_s: float = 30.0
    settled_s: float = 10.0
    end_s: float = 5.0
    lost_s: float = 1.0


class WorkerKeeper:
    """Keeps one worker alive.

    Args:
        begin: the first message to each.
        descriptors: that go with it.
        greet: called with each new one's keeper, to tell it what came before.
        hear: called with what it says, and the descriptors that came with that.
        options: see :class:`KeeperOptions`.
        command: the program.

    Attributes:
        number: of the worker, from 1 on.
        restarts: how often it was started again.
        listed: whether it was told that it may open its doors: changes wait for it from then on.
        is_open: whether it takes connections.
        link: to the worker; None while there is none.
        pid: likewise.
    """

    def __init__(
        self,
        begin: Begin,
        descriptors: Sequence[int],
        greet: Callable[[WorkerKeeper], None],
        hear: Callable[[WorkerKeeper, AnyMessage, list[int]], None],
        options: KeeperOptions,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.number = begin.number
        self.restarts = 0
        self.listed = self.is_open = False
        self.link: WorkerLink | None = None
        self._begin, self._descriptors = begin, tuple(descriptors)
        self._greet, self._hear = greet, hear
        self._options, self._command = options, command
        self._child: EngineChild | None = None
        self._fruitless = 0  # short lives in a row
        self._last: Snapshot | None = None  # what this one told last
        self._before: Snapshot | None = None  # what those before it had counted
        self._keeping = asyncio.create_task(self._keep())

    @property
    def pid(self) -> int | None:
        return None if self._child is None or self._child.ended.done() else self._child.pid

    @property
    def figures(self) -> list[Snapshot]:
        """What it told last, and what those before it had counted."""
        return [part for part in (self._last, self._before) if part is not None]

    @property
    def answered(self) -> int:
        """Requests that it, and those before it, had answered when it was last asked."""
        return sum(model.requests for part in self.figures for model in part.models)

    async def ask(self) -> None:
        """Have :attr:`figures` renewed.

        Raises:
            OnecardError: it is gone.
        """
        link = self.link
        if link is None:
            return
        body = await link.call(AskFigures)
        if link is self.link:
            self._last = decode(body)

    def kill(self, why: str) -> None:
        """End it at once; the next one is started."""
        if self._child is not None:
            self._child.kill(why)

    async def stop(self, drain_s: float) -> None:
        """End it, and start no other.

        Args:
            drain_s: how long it may take to answer what came in.
        """
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        child = self._child
        if child is None:
            return
        if self.link is not None:
            self.link.send(Drain(drain_s))
            wait_s = self._options.end_s + (drain_s if self.listed else 0.0)
            await asyncio.wait([child.ended], timeout=wait_s)
        child.kill("it did not end when it was told to")
        LOGGER.debug("front process %d (%d) ended: %s", self.number, child.pid, await child.ended)
        self._let_go()

    async def _keep(self) -> None:
        """Start one after the other."""
        while True:
            await asyncio.sleep(self._backoff_s())
            began = time.monotonic()
            try:
                child = self._spawn()
            except (EngineError, OSError) as error:
                LOGGER.error("%s", error)
                self._fruitless += 1
                continue
            watching = asyncio.create_task(self._watch(child))
            try:
                how = await asyncio.shield(child.ended)
            finally:
                watching.cancel()
            short = not self.is_open or time.monotonic() - began < self._options.settled_s
            self._fruitless = self._fruitless + 1 if short else 0
            self.restarts += 1
            LOGGER.error("front process %d (%d) ended: %s; the next one is started", self.number, child.pid, how)
            self._let_go()

    def _spawn(self) -> EngineChild:
        ours, theirs = pair()
        with theirs:
            command = [*self._command, "--descriptor", str(theirs.fileno())]
            try:
                child = EngineChild(command, "a front process", (theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        self._child = child
        loop, lost_s = asyncio.get_running_loop(), self._options.lost_s
        self.link = WorkerLink(
            ours,
            lambda message, came: self._hear(self, message, came),
            lambda reason: loop.call_later(lost_s, child.kill, reason),
        )
        self.link.send(self._begin, self._descriptors)
        self._greet(self)
        return child

    def _backoff_s(self) -> float:
        if not self._fruitless:
            return 0.0
        return min(self._options.first_backoff_s * 2.0 ** min(self._fruitless - 1, 30), self._options.most_backoff_s)

    async def _watch(self, child: EngineChild) -> None:
        """Ask it again and again, and kill it if it does not answer."""
        options = self._options
        asking = asyncio.ensure_future(self._ask_quietly())
        silent_s, last, limit_s = 0.0, time.monotonic(), options.hang_starting_s
        try:
            while True:
                await asyncio.sleep(options.look_s)
                # A pause of our own is not the worker's silence.
                now = time.monotonic()
                passed_s, last = min(now - last, 2 * options.look_s), now
                if asking.done():
                    asking = asyncio.ensure_future(self._ask_quietly())
                    silent_s, limit_s = 0.0, options.hang_s
                else:
                    silent_s += passed_s
                    if silent_s > limit_s:
                        child.kill(f"it did not answer for {silent_s:.1f} s")
        finally:
            asking.cancel()

    async def _ask_quietly(self) -> None:
        try:
            await self.ask()
        except OnecardError as error:
            LOGGER.debug("front process %d does not tell what it counts: %s", self.number, error)

    def _let_go(self) -> None:
        """It is dead: what it had counted is kept."""
        if self.link is not None:
            self.link.close()
        self.link = self._child = None
        self.listed = self.is_open = False
        if self._last is not None:
            counted = _counts(self._last)
            try:
                self._before = counted if self._before is None else merge([counted, self._before])
            except DataError:  # histograms with other bounds, of another version
                self._before = counted
            self._last = None


def _counts(snapshot: Snapshot) -> Snapshot:
    """What of a front's figures stays true when it is gone."""
    models = tuple(
        ModelFigures(
            name=model.name,
            version=model.version,
            admitted=model.admitted,
            requests=model.requests,
            failures=model.failures,
            histograms=model.histograms,
        )
        for model in snapshot.models
    )
    return Snapshot(time_s=snapshot.time_s, models=models)
