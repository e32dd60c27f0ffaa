"""The front's side of the engine: requests go out and answers come back, and outlive the engine that had them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from onecard.errors import EngineClosedError, EngineError, OnecardError
from onecard.ipc.messages import Answered, Ask, Load, Models, Pong, Refused, Told, Unload
from onecard.ipc.models import ModelOptions
from onecard.server.device_regions import DeviceRegion
from onecard.server.engine_answers import EngineAnswer, error_of
from onecard.server.engine_connection import EngineConnection
from onecard.server.engine_in_flight import InFlight, late
from onecard.server.engine_link import EngineLink
from onecard.server.engine_memory import NOT_ON_DEVICE, OnDevice, Placed, RequestMemory
from onecard.server.engine_regions import EngineRegions
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

    Raises:
        OnecardError: no shared memory of that size.
    """

    def __init__(self, options: ClientOptions, on_models: Callable[[], None] | None = None) -> None:
        self.on_lost: Callable[[str], None] | None = None
        self.answered = 0
        self.book = RequestBook()
        self._options = options
        self._on_models = on_models
        self._loop = asyncio.get_running_loop()
        self._memory = RequestMemory(options.request_bytes)
        self._in_flight = InFlight(self._memory, options.max_runs, options.max_waiting)
        self._served = ServedModels()
        self._lost = False  # what the engine had is not held for the next one yet
        hear: dict[type, Callable[[Any], None]] = {
            Answered: self._on_answered,
            Refused: self._on_refused,
            Models: self._on_told_models,
        }
        self._connection = EngineConnection(
            self._memory.segment, options.answer_bytes, hear, self._on_linked, self._on_lost
        )
        self._regions = EngineRegions(self._connection)

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
        return self._connection.link is not None

    @property
    def pong(self) -> Pong | None:
        """The answer to the last :meth:`ping` that was answered."""
        return self._connection.pong

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
        if self._lost and self._connection.is_free:
            self.disconnect()
        await self._connection.open(path, self._options.welcome_s)

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

    def infer_copies(
        self, model: str, head: SeenHead, copy: Callable[[memoryview], None], client: str
    ) -> EngineRequest:
        """As :meth:`infer_body`, of data that ``copy`` fetches into memory it is given.

        Raises:
            HttpError: 503, no memory for it.
        """
        hold = self._hold(model)
        placed = self._memory.place_copies(head.places, head.nbytes, copy)
        return self._ask(placed, (model, head.priority, client, head.timeout_s), hold)

    async def load(self, name: str, path: Path, options: ModelOptions, version: str = "") -> None:
        """Open a bundle beside what serves under this name, prove and warm it, and let it serve.

        Raises:
            OnecardError: it cannot be opened; what served goes on.
            EngineError: the engine died meanwhile.
            EngineClosedError: there is no engine at the moment.
        """
        wanted = Wanted(path.absolute(), options, version)
        await self._connection.call(
            lambda call: Load(call, name, str(wanted.path), options, version),
            self._served.begin_load(name, wanted),
        )

    async def unload(self, name: str, drain_s: float = 30.0) -> None:
        """Take no more requests for a model, answer those that wait, release it.

        Raises:
            OnecardError: there is no such model, or no engine.
        """
        await self._connection.call(
            lambda call: Unload(call, name, drain_s), lambda ok: self._served.wanted.pop(name, None) if ok else None
        )

    async def open_region(self, region: DeviceRegion) -> None:
        """Have the engine, and all that come after it, open memory of the device that another process shares.

        Raises:
            OnecardError: it cannot be opened, or there is no engine.
        """
        await self._regions.open(region)

    def expect_region(self, region: DeviceRegion) -> None:
        """Have the next engine, and all that come after it, open memory of the device that another process shares."""
        self._regions.expect(region)

    async def close_region(self, name: str) -> None:
        """Have the engine forget a region.

        Raises:
            OnecardError: there is no engine; the next one will not know it.
        """
        await self._regions.close(name)

    async def ask(self) -> Told:
        """What the engine counts and holds.

        Raises:
            EngineError: it died, or there is none.
        """
        return cast(Told, await self._connection.call(Ask))

    def ping(self) -> int:
        """Ask the engine whether it lives.

        Returns:
            What ``pong.call`` will be once it answered.
        """
        return self._connection.ping()

    def quit(self, drain_s: float) -> None:
        """Tell the engine to end, once what waits is answered or the time is over."""
        self._connection.quit(drain_s)

    def give_up(self, name: str, error: OnecardError) -> None:
        """A model that served before cannot be opened any more: what waits for it gets the error."""
        self._served.give_up(name, str(error))
        self._in_flight.fail_held(name, error)
        self._tell_changed()

    def disconnect(self) -> None:
        """Let go of an engine that is surely dead. What it had not answered waits for the next :meth:`connect`."""
        self._connection.drop("it died")
        self._lost = False
        self._served.lose()
        self._in_flight.hold_all()
        self._tell_changed()

    async def close(self) -> None:
        """Let go of the engine, if there is one, and of all memory; what is left gets EngineClosedError."""
        if self._connection.closed:
            return
        self._connection.close("the server is closing")
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
        hold = self._connection.link is None or model in self._served.recovering
        if hold:
            self._connection.check_open()
            self._in_flight.check_room()
        return hold

    def _on_linked(self, link: EngineLink | None) -> None:
        """There is an engine, or none any more."""
        self._in_flight.link = link
        if link is not None:
            self._regions.open_again()  # before any request that may speak of them
            self._in_flight.send_held(lambda model: model not in self._served.recovering)

    def _on_lost(self, reason: str) -> None:
        self._lost = True
        if self.on_lost is not None:
            self.on_lost(reason)

    def _on_answered(self, message: Answered) -> None:
        link = self._connection.link
        if link is None:
            raise EngineError("an answer before the welcome")
        answer = EngineAnswer(message, link.answers, link.give_back)
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

    def _tell_changed(self) -> None:
        if self._on_models is not None:
            try:
                self._on_models()
            except Exception:  # not the engine's fault
                LOGGER.exception("what is told of the models failed")
