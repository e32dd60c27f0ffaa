"""The front's connection to its engine: made, welcomed, called over, lost and made again; one engine at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onecard.errors import EngineClosedError, EngineError
from onecard.ipc.messages import VERSION, Done, Message, Ping, Pong, Quit, Told, Welcome
from onecard.ipc.segment import Segment
from onecard.server.engine_calls import Calls, Ended
from onecard.server.engine_link import EngineLink


class EngineConnection:
    """The connection to one engine after the other. Made in a running event loop, and for it alone.

    Args:
        requests: the segment of requests, which every engine is given.
        answer_bytes: of the segment of answers, made for each engine.
        hear: by type: takes the messages that have nothing to do with the connection; what it raises ends that.
        linked: called with the link as soon as an engine welcomed the front, and with None when it is gone, before
            the calls that it has not answered fail.
        lost: called with the reason when the connection to an engine that had welcomed the front ends by itself.

    Attributes:
        link: to an engine that welcomed the front; None while there is none.
        pong: the answer to the last :meth:`ping` that was answered.
        closed: whether it was closed for good.
    """

    def __init__(
        self,
        requests: Segment,
        answer_bytes: int,
        hear: Mapping[type, Callable[[Any], None]],
        linked: Callable[[EngineLink | None], None],
        lost: Callable[[str], None],
    ) -> None:
        self.link: EngineLink | None = None
        self.pong: Pong | None = None
        self.closed = False
        self._requests = requests
        self._answer_bytes = answer_bytes
        self._linked, self._lost = linked, lost
        self._calls = Calls()
        self._coming: EngineLink | None = None  # the engine has not said yet that it is one
        self._welcome: asyncio.Future[Welcome] | None = None
        self._hear: dict[type, Callable[[Any], None]] = {
            **hear,
            Done: self._calls.answer,
            Told: self._calls.answer,
            Pong: self._on_pong,
            Welcome: self._on_welcome,
        }

    @property
    def is_free(self) -> bool:
        """Whether it may be opened."""
        return not self.closed and self._welcome is None and self.link is None

    async def open(self, path: Path, welcome_s: float) -> None:
        """Connect to an engine that listens there, and wait until it welcomes the front.

        Args:
            path: of its socket.
            welcome_s: how long that may take.

        Raises:
            OSError: nobody listens there.
            EngineError: it does not answer as an engine does, or this is not free.
            OnecardError: no memory for the answers.
        """
        if not self.is_free:
            raise EngineError("the client is closed." if self.closed else "there is a connection to an engine.")
        self._welcome = asyncio.get_running_loop().create_future()
        try:
            self._coming = EngineLink(path, self._requests, self._answer_bytes, self._hear, self._on_end)
            await asyncio.wait_for(self._welcome, welcome_s)
        except BaseException as error:
            self.drop("it did not welcome the front")
            if isinstance(error, asyncio.TimeoutError):
                raise EngineError(f"the engine did not answer within {welcome_s:g} s.") from None
            raise
        finally:
            self._welcome = None
        if self.link is None:
            raise EngineError("the engine went as soon as it had come.")

    def drop(self, reason: str) -> None:
        """Let go of the engine, if there is one: calls that it has not answered fail with the reason."""
        for link in (self.link, self._coming):
            if link is not None:
                link.close()
        self.link = self._coming = None
        self._linked(None)
        self._calls.fail_all(lambda: EngineError(f"the engine is gone: {reason}."))

    def close(self, reason: str) -> None:
        """Let go of the engine, and connect to no other."""
        self.closed = True
        self.drop(reason)

    def check_open(self) -> None:
        """Refuse what would wait for an engine that never comes.

        Raises:
            EngineClosedError: this was closed.
        """
        if self.closed:
            raise EngineClosedError("the server is closing.")

    def call(self, make: Callable[[int], Message], ended: Ended | None = None) -> asyncio.Future[Told | None]:
        """Send a message that is answered by a :class:`Done` or a :class:`Told`.

        Args:
            make: makes it of the call's number.
            ended: called once when the call is over, also if it cannot be made.

        Returns:
            What it will be answered with. It raises the error of a call that failed, or EngineError if the engine
            goes meanwhile.

        Raises:
            EngineClosedError: there is no engine.
        """
        if self.link is None:
            if ended is not None:
                ended(False)
            self.check_open()
            raise EngineClosedError("the engine is being started again.", "Try again in a moment.")
        number, answer = self._calls.begin(ended)
        self.link.send(make(number))
        return answer

    def ping(self) -> int:
        """Ask the engine whether it lives.

        Returns:
            What ``pong.call`` will be once it answered.
        """
        number = self._calls.number()
        if self.link is not None:
            self.link.send(Ping(number))
        return number

    def quit(self, drain_s: float) -> None:
        """Tell the engine to end, once what waits is answered or the time is over."""
        if self.link is not None:
            self.link.send(Quit(drain_s))

    def _on_pong(self, message: Pong) -> None:
        self.pong = message

    def _on_welcome(self, message: Welcome) -> None:
        if self._welcome is None or self._welcome.done():
            raise EngineError("a second welcome")
        if message.version != VERSION:
            raise EngineError(f"it speaks version {message.version} of the messages, expected {VERSION}")
        self._welcome.set_result(message)
        self.link, self._coming = self._coming, None
        self._linked(self.link)

    def _on_end(self, reason: str) -> None:
        """The link ended by itself."""
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(EngineError(f"the engine did not welcome the front: {reason}."))
            return
        self.drop(reason)
        self._lost(reason)
