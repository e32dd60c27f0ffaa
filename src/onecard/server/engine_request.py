"""A request that the engine has not answered yet: a future, and all that is needed to send it once more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onecard.errors import OnecardError
from onecard.ipc.messages import Infer
from onecard.server.engine_answers import EngineAnswer
from onecard.server.engine_memory import Placed
from onecard.server.request_figures import RequestFigures, reason_of

if TYPE_CHECKING:
    from onecard.server.traces import RequestTrace


class EngineRequest(asyncio.Future[Any]):
    """A request on its way; awaited, it is its answer.

    Args:
        loop: that it is awaited in.
        placed: its inputs, which are kept for as long as an engine may read them.
        on_cancel: called when nobody waits for it any more.

    Attributes:
        order: among this front's requests.
        id: under which it was sent last.
        model: its name.
        deadline: in seconds of ``time.monotonic``; None for the model's default.
        priority: 0 goes first.
        client: whose it is.
        alone: whether it may have killed an engine.
        deaths: how many engines died while it was running.
        sent: whether the engine has it.
        began: when it came, in seconds of ``time.monotonic``.
        figures: where it is counted.
        finish: makes of the answer what the future gives; None for the answer itself.
        trace: told of the answer; None if it is not traced.
    """

    __slots__ = ("alone", "began", "client", "deadline", "deaths", "figures", "finish", "id", "model", "on_cancel",
                 "order", "placed", "priority", "sent", "trace")  # fmt: skip

    order: int
    model: str
    deadline: float | None
    priority: int
    client: str
    began: float

    def __init__(
        self, loop: asyncio.AbstractEventLoop, placed: Placed, on_cancel: Callable[[EngineRequest], None]
    ) -> None:
        super().__init__(loop=loop)
        self.placed: Placed | None = placed
        self.on_cancel = on_cancel
        self.id = -1
        self.finish: Callable[[EngineAnswer], Any] | None = None
        self.figures: RequestFigures | None = None
        self.trace: RequestTrace | None = None
        self.alone = self.sent = False
        self.deaths = 0

    def cancel(self, msg: Any = None) -> bool:
        """Stop waiting; the engine is told."""
        cancelled = super().cancel(msg)
        if cancelled:
            if self.figures is not None:
                self.figures.failed("cancelled")
            self.on_cancel(self)
        return cancelled

    def let_go(self) -> None:
        """No engine reads the inputs any more."""
        if self.placed is not None:
            self.placed.lease.marked = False
            self.placed = None

    def solve(self, answer: EngineAnswer) -> None:
        """The answer is there."""
        if self.trace is not None:
            self.trace.answered(answer)
        try:
            self.set_result(answer if self.finish is None else self.finish(answer))
        except Exception as error:
            answer.release()
            if isinstance(error, OnecardError):
                # All frames hold this, which holds the error: a cycle, and the memory of the inputs in it.
                error = error.with_traceback(None)
            self.set_exception(error)
            return
        if self.figures is not None:
            self.figures.answered(time.monotonic() - self.began)

    def set_exception(self, exception: type | BaseException, /) -> None:
        """It has no answer."""
        super().set_exception(exception)
        if self.figures is not None and isinstance(exception, BaseException):
            self.figures.failed(reason_of(exception, not self.is_late(time.monotonic())))

    def fail(self, error: OnecardError) -> None:
        """No engine has it, or will have it; whoever waits for it gets the error."""
        self.let_go()
        if not self.done():
            self.set_exception(error)

    def is_late(self, now: float) -> bool:
        """Whether the deadline has passed at a time of ``time.monotonic``."""
        return self.deadline is not None and self.deadline <= now

    def message(self) -> Infer | None:
        """As it is sent; None if nobody waits for it."""
        if self.placed is None or self.done():
            return None
        mark, tensors = self.placed.lease.offset, self.placed.tensors
        return Infer(
            self.id,
            self.model,
            mark,
            tensors,
            self.deadline,
            self.priority,
            self.client,
            self.alone,
            self.placed.targets,
            self.trace is not None,
        )

    def describe(self) -> str:
        """For the log: model, client and shapes, never data."""
        tensors = self.placed.tensors if self.placed is not None else ()
        inputs = ", ".join(f"{tensor.name}: {tensor.dtype}{list(tensor.shape)}" for tensor in tensors)
        return f"request {self.order} of client '{self.client}' for model '{self.model}' ({inputs})"
