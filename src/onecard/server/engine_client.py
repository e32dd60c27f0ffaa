"""The front's side of the engine: requests go out and answers come back, and outlive the engine that had them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from onecard.errors import EngineClosedError, EngineError, OnecardError
from onecard.ipc.messages import (
    VERSION,
    Answered,
    Ask,
    CloseRegion,
    Done,
    Load,
    Message,
    ModelOptions,
    Models,
    OpenRegion,
    Ping,
    Pong,
    Quit,
    Refused,
    ToFront,
    Told,
    Unload,
    Welcome,
)
from onecard.server.device_regions import DeviceRegion
from onecard.server.engine_answers import EngineAnswer, error_of
from onecard.server.engine_calls import Calls, Ended
from onecard.server.engine_in_flight import InFlight, late
from onecard.server.engine_link import EngineLink
from onecard.server.engine_memory import NOT_ON_DEVICE, OnDevice, Placed, RequestMemory
from onecard.server.engine_request import EngineRequest
from onecard.server.engine_served import ServedModel, ServedModels, Wanted
from onecard.server.http_types import LOGGER
from onecard.server.oip_seen import SeenHead
from onecard.server.oip_types import Array
from onecard.server.request_figures import RequestBook, RequestFigures


@dataclass(frozen=True)
class ClientOptions:
    """How much the front holds for the engine.

    Args:
        request_bytes: of the segment of requests.
        answer_bytes: of the segment of answers.
        max_runs: how often a request is run at most, if the engine dies each time.
        max_waiting: requests that may wait for an engine to be there.
        welcome_s: how long an engine may take to answer a new connection.
    """

    request_bytes: int = 512 << 20
    answer_bytes: int = 256 << 20
    max_runs: int = 3
    max_waiting: int = 10_000
    welcome_s: float = 120.0


class EngineClient:
    """What a front says to the engine, and hears from it. Made in a running event loop, and for it alone.

    Args:
        options: see :class:`ClientOptions`.
        on_models: called when a model changed.

    Attributes:
        on_lost: called with the reason when the connection ends by itself. Whoever made it is to call
            :meth:`disconnect`, once the old engine is surely dead, and then :meth:`connect`.
        answered: requests that engines have answered or refused.
        book: what became of all requests.
        pong: the answer to the last :meth:`ping` that was answered.

    Raises:
        OnecardError: no shared memory of that size.
    """

    def __init__(self, options: ClientOptions, on_models: Callable[[], None] | None = None) -> None:
        self.on_lost: Callable[[str], None] | None = None
        self.answered = 0
        self.book = RequestBook()
        self.pong: Pong | None = None
        self._options = options
        self._on_models = on_models
        self._loop = asyncio.get_running_loop()
        self._memory = RequestMemory(options.request_bytes)
        self._in_flight = InFlight(self._memory, options.max_runs, options.max_waiting)
        self._served = ServedModels()
        self._calls = Calls()
        self._regions: dict[str, DeviceRegion] = {}
        self._link: EngineLink | None = None  # over which requests are sent
        self._coming: EngineLink | None = None  # the engine has not said yet that it is one
        self._welcome: asyncio.Future[Welcome] | None = None
        self._lost = self._closed = False
        self._heard: dict[type, Callable[[Any], None]] = {
            Answered: self._on_answered,
            Refused: self._on_refused,
            Models: self._on_told_models,
            Done: self._calls.answer,
            Told: self._calls.answer,
            Pong: self._on_pong,
            Welcome: self._on_welcome,
        }

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """As last told; those that served when the engine died are LOADING until the next one serves them."""
        return self._served.table

    @property
    def wanted(self) -> Mapping[str, Wanted]:
        """What was loaded over this client, and not unloaded since, as it served last."""
        return self._served.wanted

    @property
    def recovering(self) -> Set[str]:
        """Names of the models that served when the engine died, and do not serve again yet."""
        return self._served.recovering

    @property
    def connected(self) -> bool:
        """Whether there is an engine."""
        return self._link is not None

    @property
    def is_loading(self) -> bool:
        """Whether a load that was asked for is not over yet."""
        return self._served.is_loading

    def figures(self, model: str) -> RequestFigures:
        """Where requests of a model, one of :attr:`models`, are counted, those that are refused here included."""
        served = self._served.table.get(model)
        return self.book.of(model, "" if served is None else served.version)

    @property
    def waiting(self) -> int:
        """How many requests wait for an engine, or for their model to be open again."""
        return self._in_flight.waiting

    @property
    def sent(self) -> int:
        """How many requests the engine has."""
        return self._in_flight.sent

    @property
    def used_bytes(self) -> int:
        """What is taken of the segment of requests."""
        return self._memory.used_bytes

    @property
    def restart_s(self) -> float:
        """How long a new engine will take, for those that are told to come back."""
        return self._in_flight.restart_s

    @restart_s.setter
    def restart_s(self, seconds: float) -> None:
        self._in_flight.restart_s = seconds

    async def connect(self, path: Path) -> None:
        """Connect to an engine, and send it what waits: of models that served before as soon as they do again.

        Args:
            path: of its socket.

        Raises:
            OSError: nobody listens there.
            EngineError: it does not answer as an engine does.
            OnecardError: no memory for the answers.
        """
        if self._closed or self._welcome is not None or self._link is not None:
            raise EngineError("the client is closed." if self._closed else "there is a connection to an engine.")
        if self._lost:
            self.disconnect()
        self._welcome = self._loop.create_future()
        try:
            self._coming = EngineLink(path, self._memory.segment, self._options.answer_bytes, self._hear, self._lose)
            await asyncio.wait_for(self._welcome, self._options.welcome_s)
        except BaseException as error:
            self._drop_link("it did not welcome the front")
            if isinstance(error, asyncio.TimeoutError):
                raise EngineError(f"the engine did not answer within {self._options.welcome_s:g} s.") from None
            raise
        finally:
            self._welcome = None
        if self._link is None:
            raise EngineError("the engine went as soon as it had come.")

    def allocate(self, nbytes: int, lead: int = 0) -> memoryview:
        """Memory that the engine sees too, for a body; free again when nothing refers to it any more.

        Args:
            nbytes: of the body.
            lead: how far behind an address that is a multiple of 64 bytes it begins.

        Raises:
            HttpError: 503, too much is held; 413, it would never fit.
        """
        return self._memory.allocate(nbytes, lead)

    def infer(  # noqa: PLR0913 - the keywords are the interface
        self,
        model: str,
        inputs: Mapping[str, Array],
        dtypes: Mapping[str, str],
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        client: str = "",
        device: OnDevice = NOT_ON_DEVICE,
    ) -> EngineRequest:
        """Ask for an answer. Without an engine it waits for the next one; cancelling the future tells the engine.

        Args:
            model: its name.
            inputs: by name; they must not change before the answer. What does not lie in :meth:`allocate`'s memory at
                a multiple of 64 bytes is copied there.
            dtypes: onecard's names of their dtypes: ``bfloat16`` for an int16 carrier.
            timeout_s: from now on; None for the model's default.
            priority: 0 goes first.
            client: whose request it is, for fairness.
            device: what lies, or is to be written, in regions of :meth:`open_region`.

        Returns:
            The answer to be; it raises what the engine raised, DeadlineError, or EngineError if it kills engines.

        Raises:
            HttpError: 503, no memory for a copy.
            QueueFullError: too many wait for an engine.
            EngineClosedError: the client is closed.
        """
        hold = self._hold(model)
        placed = self._memory.place(inputs, dtypes)
        if device.inputs or device.outputs:
            placed = placed._replace(tensors=(*placed.tensors, *device.inputs), targets=device.outputs)
        return self._ask(placed, (model, priority, client, timeout_s), hold)

    def infer_body(
        self, model: str, body: memoryview, head: SeenHead, json_length: int, client: str
    ) -> EngineRequest | None:
        """As :meth:`infer`, of a body that was received into :meth:`allocate`'s memory, without a look at its data.

        Args:
            model: its name.
            body: the whole of it; it must not change before the answer.
            head: what its JSON says.
            json_length: of it.
            client: whose request it is, for fairness.

        Returns:
            None if the body does not lie there.

        Raises:
            QueueFullError: too many wait for an engine.
            EngineClosedError: the client is closed.
        """
        hold = self._hold(model)
        placed = self._memory.place_body(body, json_length, head.places)
        if placed is None:
            return None
        return self._ask(placed, (model, head.priority, client, head.timeout_s), hold)

    async def load(self, name: str, path: Path, options: ModelOptions, version: str = "") -> None:
        """Open a bundle beside what serves under this name, prove and warm it, and let it serve.

        Raises:
            OnecardError: it cannot be opened; what served goes on.
            EngineError: the engine died meanwhile.
            EngineClosedError: there is no engine at the moment.
        """
        wanted = Wanted(path.absolute(), options, version)
        await self._call(
            lambda call: Load(call, name, str(wanted.path), options, version),
            self._served.begin_load(name, wanted),
        )

    async def unload(self, name: str, drain_s: float = 30.0) -> None:
        """Take no more requests for a model, answer those that wait, release it.

        Raises:
            OnecardError: there is no such model, or no engine.
        """
        await self._call(
            lambda call: Unload(call, name, drain_s), lambda ok: self._served.wanted.pop(name, None) if ok else None
        )

    async def open_region(self, region: DeviceRegion) -> None:
        """Have the engine, and all that come after it, open memory of the device that another process shares.

        Raises:
            OnecardError: it cannot be opened, or there is no engine.
        """
        await self._call(
            lambda call: _opening(call, region),
            lambda ok: self._regions.update({region.name: region}) if ok else None,
        )

    def expect_region(self, region: DeviceRegion) -> None:
        """Have the next engine, and all that come after it, open memory of the device that another process shares."""
        self._regions[region.name] = region

    async def close_region(self, name: str) -> None:
        """Have the engine forget a region.

        Raises:
            OnecardError: there is no engine; the next one will not know it.
        """
        self._regions.pop(name, None)
        await self._call(lambda call: CloseRegion(call, name))

    async def ask(self) -> Told:
        """What the engine counts and holds.

        Raises:
            EngineError: it died, or there is none.
        """
        return cast(Told, await self._call(Ask))

    def ping(self) -> int:
        """Ask the engine whether it lives.

        Returns:
            What ``pong.call`` will be once it answered.
        """
        call = self._calls.number()
        if self._link is not None:
            self._link.send(Ping(call))
        return call

    def quit(self, drain_s: float) -> None:
        """Tell the engine to end, once what waits is answered or the time is over."""
        if self._link is not None:
            self._link.send(Quit(drain_s))

    def give_up(self, name: str, error: OnecardError) -> None:
        """A model that served before cannot be opened any more: what waits for it gets the error."""
        self._served.give_up(name, str(error))
        self._in_flight.fail_held(name, error)
        self._tell_changed()

    def disconnect(self) -> None:
        """Let go of an engine that is surely dead. What it had not answered waits for the next :meth:`connect`."""
        self._drop_link("it died")
        self._lost = False
        self._served.lose()
        self._in_flight.hold_all()
        self._tell_changed()

    async def close(self) -> None:
        """Let go of the engine, if there is one, and of all memory; what is left gets EngineClosedError."""
        if self._closed:
            return
        self._closed = True
        self._drop_link("the server is closing")
        self._in_flight.fail_all(lambda: EngineClosedError("the server closed before the request was answered."))
        self._memory.close()

    def _ask(self, placed: Placed, how: tuple[str, int, str, float | None], hold: bool) -> EngineRequest:
        request = EngineRequest(self._loop, placed, self._in_flight.cancel)
        request.model, request.priority, request.client, timeout_s = how
        request.began = now = time.monotonic()
        request.deadline = None if timeout_s is None else now + timeout_s
        self._in_flight.add(request, hold)
        request.figures = figures = self.figures(request.model)
        figures.began()
        return request

    def _hold(self, model: str) -> bool:
        """Whether a new request must wait for an engine, of which there must be room for one more."""
        hold = self._link is None or model in self._served.recovering
        if hold:
            self._check_open()
            self._in_flight.check_room()
        return hold

    async def _call(self, make: Callable[[int], Message], ended: Ended | None = None) -> Told | None:
        if self._link is None:
            if ended is not None:
                ended(False)
            self._check_open()
            raise EngineClosedError("the engine is being started again.", "Try again in a moment.")
        call, future = self._calls.begin(ended)
        self._link.send(make(call))
        return await future

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the server is closing.")

    def _hear(self, message: ToFront) -> None:
        self._heard[type(message)](message)

    def _on_answered(self, message: Answered) -> None:
        if self._link is None:
            raise EngineError("an answer before the welcome")
        answer = EngineAnswer(message, self._link.answers, self._link.give_back)
        self.answered += 1
        request = self._in_flight.end(message.id)
        if request is None:
            return
        if request.deadline is not None and request.is_late(time.monotonic()):
            answer.release()
            request.set_exception(late(request))
        else:
            request.solve(answer)

    def _on_refused(self, message: Refused) -> None:
        self.answered += 1
        request = self._in_flight.end(message.id)
        if request is not None:
            request.set_exception(error_of(message))

    def _on_told_models(self, message: Models) -> None:
        again, failed = self._served.tell(message.models)
        if again:
            self._in_flight.send_held(again.__contains__)
        for name, reason in failed.items():
            self._in_flight.fail_held(name, EngineError(f"model '{name}' could not be opened again: {reason}"))
        self._tell_changed()

    def _on_pong(self, message: Pong) -> None:
        self.pong = message

    def _on_welcome(self, message: Welcome) -> None:
        if self._welcome is None or self._welcome.done():
            raise EngineError("a second welcome")
        if message.version != VERSION:
            raise EngineError(f"it speaks version {message.version} of the messages, expected {VERSION}")
        self._welcome.set_result(message)
        self._link, self._coming = self._coming, None
        link = self._in_flight.link = self._link
        for region in self._regions.values():  # before any request that may speak of it
            call, opened = self._calls.begin()
            opened.add_done_callback(_log_failure)
            if link is not None:
                link.send(_opening(call, region))
        self._in_flight.send_held(lambda model: model not in self._served.recovering)

    def _tell_changed(self) -> None:
        if self._on_models is not None:
            try:
                self._on_models()
            except Exception:  # not the engine's fault
                LOGGER.exception("what is told of the models failed")

    def _lose(self, reason: str) -> None:
        """The connection ended by itself."""
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(EngineError(f"the engine did not welcome the front: {reason}."))
            return
        self._lost = True
        self._drop_link(reason)
        if self.on_lost is not None:
            self.on_lost(reason)

    def _drop_link(self, reason: str) -> None:
        for link in (self._link, self._coming):
            if link is not None:
                link.close()
        self._link = self._coming = self._in_flight.link = None
        self._calls.fail_all(lambda: EngineError(f"the engine is gone: {reason}."))


def _opening(call: int, region: DeviceRegion) -> OpenRegion:
    return OpenRegion(call, region.name, region.handle, region.device, region.byte_size)


def _log_failure(opened: asyncio.Future[Told | None]) -> None:
    if not opened.cancelled() and (error := opened.exception()) is not None:
        LOGGER.error("shared memory is not known to the new engine: %s", error)
