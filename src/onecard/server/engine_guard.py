"""Keeps an engine process alive: starts it, opens the models, notices its death or hang, and starts the next one."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from onecard.errors import EngineError, OnecardError, StorageError
from onecard.ipc.models import ModelOptions
from onecard.server.engine_child import EngineChild
from onecard.server.engine_client import EngineClient
from onecard.server.engine_folders import PREFIX, sweep
from onecard.server.engine_others import OtherFronts
from onecard.server.engine_served import Wanted
from onecard.server.http_types import LOGGER
from onecard.server.open_files import lacks_files

_LOOK_S = 0.02  # how often to try whether a new engine listens


@dataclass(frozen=True)
class GuardOptions:
    """When an engine counts as lost, and how its successor is started.

    Args:
        ping_s: how often it is asked whether it lives.
        hang_s: so long without an answer, and it is killed.
        hang_loading_s: likewise while it starts or opens a model, which may keep it from answering.
        hang_batch_s: so long on one batch, and it is killed.
        first_backoff_s: before the second start after a life in which nothing was answered; then twice as long each
            time. The first start is at once.
        most_backoff_s: what that ends at.
        settled_s: an engine that lived so long has done well, whether or not anybody asked it anything.
        max_load_deaths: engines that may die in a row while opening the same model; then it is left out.
        end_s: for an engine that was told to end, to be gone.
        lost_s: for an engine whose connection ended, to be gone.
    """

    ping_s: float = 1.0
    hang_s: float = 10.0
    hang_loading_s: float = 120.0
    hang_batch_s: float = 60.0
    first_backoff_s: float = 0.5
    most_backoff_s: float = 30.0
    settled_s: float = 60.0
    max_load_deaths: int = 3
    end_s: float = 5.0
    lost_s: float = 1.0


class GuardObserver(Protocol):
    """Told what becomes of the engine."""

    def started(self, pid: int) -> None:
        """A process was started."""
        ...

    def ended(self, how: str) -> None:
        """It ended, or was killed, without having been asked to."""
        ...

    def recovered(self, seconds: float) -> None:
        """So long after that the first model serves again."""
        ...


@dataclass(frozen=True)
class _Life:
    """One engine.

    Args:
        child: its process.
        socket: where it listens.
        began: when it was started, in seconds of ``time.monotonic``.
        answered: requests that engines had answered before it.
    """

    child: EngineChild
    socket: Path
    began: float
    answered: int


class EngineGuard:
    """Keeps an engine process alive.

    Args:
        command: of the engine's program, less the options ``--socket`` and ``--die-with-parent``.
        client: gets a connection to each engine.
        desired: models to open at first, by name: bundle and options. Later it is what the client loaded.
        options: see :class:`GuardOptions`.
        observe: told what happens.

    Attributes:
        restarts: how many engines were started after the first.
        last_recovery_s: how long it took from the last death to the first model that served again.
        others: further fronts; None for none.
    """

    def __init__(
        self,
        command: Sequence[str],
        client: EngineClient,
        desired: Mapping[str, tuple[Path, ModelOptions]],
        options: GuardOptions,
        observe: GuardObserver | None = None,
    ) -> None:
        self.restarts = 0
        self.last_recovery_s: float | None = None
        self.others: OtherFronts | None = None
        self._command = command
        self._client = client
        self._desired = desired
        self._options = options
        self._observe = observe
        self._folder: Path | None = None
        self._life: _Life | None = None
        self._fruitless = 0  # lives in a row in which nothing was answered, of engines that were started again
        self._load_deaths: dict[str, tuple[Wanted, int]] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Of the engine; None while there is none."""
        return None if self._life is None or self._life.child.ended.done() else self._life.child.pid

    async def start(self) -> None:
        """Start the engine and open all models.

        Raises:
            OnecardError: of the first model that cannot be opened, or the engine cannot be started.
        """
        try:
            with contextlib.suppress(OSError):
                sweep(Path(tempfile.gettempdir()))
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # only this user may enter it
        except OSError as error:
            raise StorageError(f"there is no folder for the engine's socket: {error}.", "Set TMPDIR.") from error
        self._client.on_lost = self._on_lost
        try:
            life = await self._first_life()
        except BaseException:
            await self.stop(0.0)
            raise
        self._keeping = asyncio.create_task(self._keep(life))

    async def stop(self, drain_s: float) -> None:
        """End the engine, and start no other.

        Args:
            drain_s: how long it may take to answer what it has.
        """
        self._stopping = True
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._life is not None:
            child = self._life.child
            if self._client.connected:
                self._client.quit(drain_s)
                await asyncio.wait([child.ended], timeout=drain_s + self._options.end_s)
            if not child.ended.done():
                child.terminate()
                await asyncio.wait([child.ended], timeout=self._options.end_s if drain_s else 0.0)
            child.kill("it did not end when it was told to")
            LOGGER.info("the engine's process %d ended: %s", child.pid, await child.ended)
            self._life = None  # a start that failed stops too, and its server once more: the end is told once
        self._stop_watching()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def suspect(self, socket: Path, reason: str) -> None:
        """Another front lost its connection to the engine that listened there: end it, if it is still that one."""
        if self._life is not None and self._life.socket == socket:
            self._on_lost(reason)

    async def _first_life(self) -> _Life:
        """Start an engine and open all models; one that cannot be reached for want of descriptors has a successor."""
        while True:
            life = await self._next_life()
            try:
                await self._connect(life)
                for name, (path, options) in self._desired.items():
                    await self._client.load(name, path, options)
                return life
            except OnecardError as error:
                if self._client.connected:
                    raise
                how = await self._end_of(life, str(error))
                if not lacks_files(error):
                    raise EngineError(f"the engine's process ended before all models were open: {how}.") from error
                self._bury(life, how)

    def _spawn(self, folder: Path) -> _Life:
        path = folder / f"{self.restarts}.sock"  # another one each time: nothing old can listen there
        child = EngineChild([*self._command, "--socket", str(path), "--die-with-parent"])
        self._life = life = _Life(child, path, time.monotonic(), self._answered())
        self._watching = asyncio.create_task(self._watch(child))
        if self._observe is not None:
            self._observe.started(child.pid)
        return life

    async def _connect(self, life: _Life) -> None:
        until = time.monotonic() + self._options.hang_loading_s
        while True:
            try:
                await self._client.connect(life.socket)
                break
            except (FileNotFoundError, ConnectionError):
                if life.child.ended.done():
                    raise EngineError(f"its process ended before it listened: {life.child.ended.result()}.") from None
                if time.monotonic() > until:
                    raise EngineError("its process does not listen.") from None
            except OSError as error:
                raise EngineError(f"its process cannot be reached: {error}.") from error
            await asyncio.sleep(_LOOK_S)
        if self.others is not None:
            self.others.engine_listens(life.socket)

    def _answered(self) -> int:
        """Requests that engines have answered, to any front."""
        return self._client.answered + (0 if self.others is None else self.others.answered)

    async def _end_of(self, life: _Life, why: str) -> str:
        """See to it that an engine ends that is of no use; how it ended."""
        await asyncio.wait([life.child.ended], timeout=self._options.lost_s)
        life.child.kill(why)
        return await life.child.ended

    # After a death

    async def _keep(self, life: _Life) -> None:
        """Start one engine after the other."""
        while True:
            how = await asyncio.shield(life.child.ended)
            noticed = time.monotonic()
            self._bury(life, how)
            life = await self._next_life()
            try:
                await self._serve_again(life, noticed)
            except Exception as error:  # whatever it was, without a guard there would be no engine any more
                if not isinstance(error, OnecardError):
                    LOGGER.exception("the engine's process %d could not be used", life.child.pid)
                await self._end_of(life, str(error))

    def _bury(self, life: _Life, how: str) -> None:
        self._stop_watching()
        self._life = None
        if self._answered() > life.answered or time.monotonic() - life.began >= self._options.settled_s:
            self._fruitless = 0
        elif self.restarts:
            self._fruitless += 1
        self.restarts += 1
        LOGGER.error("the engine's process %d ended: %s; the next one is started", life.child.pid, how)
        self._client.disconnect()  # now that it writes no marks any more
        if self.others is not None:
            self.others.engine_died()
        with contextlib.suppress(OSError):
            life.socket.unlink()
        if self._observe is not None:
            self._observe.ended(how)

    async def _next_life(self) -> _Life:
        """Start an engine as soon as that is possible; the first one must be, but for want of descriptors."""
        assert self._folder is not None
        while True:
            await asyncio.sleep(self._backoff_s())
            try:
                return self._spawn(self._folder)
            except EngineError as error:
                if self._keeping is None and not lacks_files(error):
                    raise
                LOGGER.error("%s", error)
                self._fruitless += 1

    def _backoff_s(self) -> float:
        if not self._fruitless:
            return 0.0
        doublings = min(self._fruitless - 1, 30)
        return min(self._options.first_backoff_s * 2.0**doublings, self._options.most_backoff_s)

    async def _serve_again(self, life: _Life, noticed: float) -> None:
        """Open what served; the client then sends what waits for it.

        Raises:
            OnecardError: the engine is gone again.
        """
        await self._connect(life)
        waiting = True
        for name, wanted in list(self._client.wanted.items()):
            opened = await self._open_again(name, wanted)
            if opened and waiting:
                waiting = False
                self._recovered(time.monotonic() - noticed)
        for name in self._client.recovering - set(self._client.wanted):
            self._give_up(name, EngineError(f"model '{name}' was not loaded by this server."))

    async def _open_again(self, name: str, wanted: Wanted) -> bool:
        """Open one model.

        Returns:
            Whether it serves; if not, its requests have the error.

        Raises:
            OnecardError: the engine died of it.
        """
        before, deaths = self._load_deaths.get(name, (wanted, 0))
        deaths = deaths if before == wanted else 0
        try:
            if deaths >= self._options.max_load_deaths:
                raise EngineError(
                    f"model '{name}' is left out: {deaths} engines in a row died while they opened it.",
                    "Load it again.",
                )
            await self._client.load(name, wanted.path, wanted.options, wanted.version)
        except OnecardError as error:
            if not self._client.connected:
                self._load_deaths[name] = (wanted, deaths + 1)
                raise
            LOGGER.error("model '%s' cannot be opened again: %s", name, error)
            self._give_up(name, error)
            return False
        self._load_deaths.pop(name, None)
        return True

    def _give_up(self, name: str, error: OnecardError) -> None:
        self._client.give_up(name, error)
        if self.others is not None:
            self.others.gave_up(name, error)

    def _recovered(self, seconds: float) -> None:
        self.last_recovery_s = self._client.restart_s = seconds
        if self.others is not None:
            self.others.engine_recovered(seconds)
        LOGGER.warning("the engine serves again after %.2f s", seconds)
        if self._observe is not None:
            self._observe.recovered(seconds)

    # While it lives

    async def _watch(self, child: EngineChild) -> None:
        """Kill an engine that does not answer, or that does not come to an end with a batch."""
        asked: int | None = None
        silent_s, last, was_loading = 0.0, time.monotonic(), False
        while True:
            await asyncio.sleep(self._options.ping_s)
            # A pause of our own (a stopped process, a suspended machine) is not the engine's silence.
            now = time.monotonic()
            passed_s, last = min(now - last, 2 * self._options.ping_s), now
            pong = self._client.pong
            if not self._client.connected:
                asked = None
            elif asked is None or (pong is not None and pong.call >= asked):
                if asked is not None and pong is not None and pong.running_s > self._options.hang_batch_s:
                    child.kill(f"one batch ran for {pong.running_s:.1f} s")
                asked, silent_s = self._client.ping(), 0.0
            else:
                silent_s += passed_s
                loading = self._client.is_loading or (pong is not None and pong.loading)
                if was_loading and not loading:  # it said so: an answer, too, though none to what was asked
                    silent_s = 0.0
                was_loading = loading
                if silent_s > (self._options.hang_loading_s if loading else self._options.hang_s):
                    child.kill(f"it did not answer for {silent_s:.1f} s")

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    def _on_lost(self, reason: str) -> None:
        """The connection ended: the process ends too, by itself or by our hand."""
        if self._life is not None and not self._stopping:
            asyncio.get_running_loop().call_later(self._options.lost_s, self._life.child.kill, reason)
