"""What was asked of the engine besides inference, and is not answered yet."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from onecard.errors import OnecardError
from onecard.ipc.messages import Done, Told
from onecard.server.engine_answers import error_of
from onecard.server.http_types import LOGGER

Ended = Callable[[bool], Any]
"""Called once when a call is over, whether or not somebody still waits for it, with whether it was carried out."""


class _Call(NamedTuple):
    future: asyncio.Future[Told | None]
    ended: Ended | None


class Calls:
    """Calls that are not answered."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, _Call] = {}

    def number(self) -> int:
        """A number that no other call has."""
        return next(self._numbers)

    def begin(self, ended: Ended | None = None) -> tuple[int, asyncio.Future[Told | None]]:
        """Begin a call.

        Returns:
            Its number, and what it will be answered with.
        """
        number = self.number()
        future: asyncio.Future[Told | None] = asyncio.get_running_loop().create_future()
        self._open[number] = _Call(future, ended)
        return number, future

    def answer(self, message: Done | Told) -> None:
        """The engine answered a call."""
        if isinstance(message, Told):
            self._end(message.call, message, None)
        else:
            self._end(message.call, None, error_of(message) if message.kind else None)

    def fail_all(self, make: Callable[[], OnecardError]) -> None:
        """The engine is gone."""
        for number in list(self._open):
            self._end(number, None, make())

    def _end(self, number: int, result: Told | None, error: OnecardError | None) -> None:
        call = self._open.pop(number, None)
        if call is None:
            LOGGER.warning("the engine answered call %d, which nobody made", number)
            return
        if call.ended is not None:
            call.ended(error is None)
        if call.future.done():
            return
        if error is None:
            call.future.set_result(result)
        else:
            call.future.set_exception(error)
