"""One request in the engine's process, from its message to its answer: to its model's engine it is who receives it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onecard.errors import DeadlineError, EngineClosedError, EngineError, OnecardError
from onecard.ipc.messages import Infer, Stages, encode
from onecard.ipc.tensors import Tensor
from onecard.runtime.future import RequestTiming
from onecard.runtime.slots import Array
from onecard.runtime.work import Work
from onecard.server.engine_models import Serving
from onecard.server.engine_refusals import refused
from onecard.server.engine_replies import Solved, outputs_of

if TYPE_CHECKING:
    from onecard.server.engine_fronts import Front

_LOOK_S = 0.005


class Run:
    """One request; it ends with exactly one ``Answered`` or ``Refused``.

    To its model's engine it is the :class:`onecard.runtime.future.Receiver`.

    Args:
        front: whose it is.
        infer: as it came.
        began: when, in seconds of ``time.monotonic``.

    Attributes:
        work: what its model's engine is to run; None before.
    """

    __slots__ = ("_cancelled", "_ends", "_front", "_marked", "_serving", "_timing", "_waits", "alone", "began",
                 "infer", "work")  # fmt: skip

    def __init__(self, front: Front, infer: Infer, began: float) -> None:
        self._front = front
        self.infer = infer
        self.began = began
        self.alone = infer.alone
        self.work: Work | None = None
        self._serving: Serving | None = None
        self._timing: RequestTiming | None = None
        self._cancelled = self._marked = False
        self._waits = [None]  # whoever takes it away decides whether it runs: the engine, or a cancellation
        self._ends = [None]  # likewise what it ends with

    @property
    def deadline(self) -> float:
        """When it is of no use any more."""
        if self.infer.deadline is not None:
            return self.infer.deadline
        try:
            return self.began + self._front.models.find(self.infer.model).engine.options.timeout_s
        except OnecardError:
            return math.inf

    def start(self) -> None:
        """Its turn has come, after it was held back."""
        left_s = self.deadline - time.monotonic()
        if self._cancelled:
            self._end(EngineError("the request was cancelled."))
        elif left_s <= 0:
            self._end(_late(self.began))
        elif (serving := self.prepare(left_s)) is not None:
            run_all(serving, [self])

    def expire(self) -> None:
        """Its deadline passed while it was held back."""
        self._end(_late(self.began), entered=False)

    def prepare(self, timeout_s: float | None) -> Serving | None:
        """Have its model's engine look at it; whatever goes wrong is its answer.

        Returns:
            What it is to be run by.
        """
        front, infer = self._front, self.infer
        try:
            serving = front.models.find(infer.model)
            if self._serving is None:
                serving.counters.came()
            self._serving = serving
            as_tensors = serving.as_tensors
            inputs: dict[str, Array] = {
                tensor.name: front.regions.input(tensor)
                if tensor.region
                else front.requests.view(tensor, as_tensors or tensor.dtype == "bfloat16")
                for tensor in infer.inputs
            }
            self.work = serving.engine.prepare(
                inputs, self, timeout_s=timeout_s, priority=infer.priority, client=infer.client
            )
        except Exception as error:
            self._end(error)
            return None
        if self._cancelled:
            self.cancel()
        return serving

    def prepare_again(self, old: Serving, error: OnecardError) -> Serving | None:
        """Its model's engine took it not; it is for the one that replaced that, if there is one."""
        left_s = None if self.infer.deadline is None else self.infer.deadline - time.monotonic()
        try:
            replaced = self._front.models.find(self.infer.model) is not old
        except OnecardError as gone:
            replaced, error = False, gone
        if replaced and isinstance(error, EngineClosedError):
            return self.prepare(left_s)
        self.fail(error)
        return None

    def cancel(self) -> None:
        """Nobody waits for it any more; it is ended all the same."""
        self._cancelled = True
        if self.work is not None and self._serving is not None:
            if _taken(self._waits):
                self._serving.engine.cancel(self.work)
                self._end(EngineError("the request was cancelled."))
        elif self._front.gate.withdraw(self):
            self._end(EngineError("the request was cancelled."), entered=False)

    def begin(self) -> bool:
        """A batch with its first row is launched next."""
        self._marked = True  # first: whoever fails it meanwhile is to wait for this batch
        if not _taken(self._waits):
            return False
        self._front.requests.mark(self.infer.mark)
        return True

    def solve(self, outputs: dict[str, Any], timing: RequestTiming) -> None:
        """The engine answered it."""
        self._timing = timing
        if self._serving is not None and self._serving.sentinel is not None and self.work is not None:
            self._serving.sentinel.offer(self.work.request.inputs, outputs)  # they are gone once it is answered
        self._end(EngineError("the request was cancelled.") if self._cancelled else None, outputs)

    def fail(self, error: BaseException) -> None:
        """The engine has no answer to it."""
        _taken(self._waits)  # a batch that begins behind this would write its mark to memory that was given back
        if self._serving is not None and not isinstance(error, EngineClosedError):
            self._front.models.check(self._serving)
        self._end_unread(error, time.monotonic())

    def _end_unread(self, error: BaseException, failed: float) -> None:
        """End it without an answer, once no batch that began before that can be reading its inputs any more.

        The front gives their memory to other requests then; and a request that came in several batches may have failed
        with the first of them, or its time may have been over before the second.
        """
        serving = self._serving
        if self._marked and serving is not None and serving.engine.running_s > time.monotonic() - failed:
            timer = threading.Timer(_LOOK_S, self._end_unread, (error, failed))
            timer.daemon = True
            timer.start()
        else:
            self._end(error)

    def _end(
        self, error: BaseException | None, outputs: Mapping[str, Array] | None = None, *, entered: bool = True
    ) -> None:
        """Count it, and send what became of it.

        Args:
            error: why there is no answer.
            outputs: else they.
            entered: whether it was let through the gate.
        """
        if not _taken(self._ends):
            return
        front, total_s = self._front, time.monotonic() - self.began
        solved = None
        if error is None:
            try:
                solved = self._solved(outputs or {}, total_s)
                front.replies.check(solved)
            except Exception as mistake:
                error, solved = mistake, None
        if self._serving is not None:
            self._serving.counters.ended(total_s, ok=solved is not None)  # before anybody can ask whether it was
        try:
            if solved is not None:
                front.replies.send(solved)
            elif error is not None:
                front.outbox.send(encode(refused(self.infer.id, error)))
        except Exception as mistake:
            front.outbox.send(encode(refused(self.infer.id, mistake)))
        finally:
            front.forget(self)
            if entered:
                front.gate.leave()

    def _solved(self, outputs: Mapping[str, Array], total_s: float) -> Solved:
        timing, serving = self._timing, self._serving
        if timing is None or serving is None:
            raise EngineError("the engine did not say how long the request took.")
        written: tuple[Tensor, ...] = ()
        if self.infer.targets:
            outputs, written = self._front.regions.place(outputs, self.infer.targets)
        queue_s = timing.queue_s + max(0.0, total_s - timing.total_s)  # at the gate, too
        stages = _stages(self.work, timing) if self.infer.traced else None
        sent = outputs_of(outputs)
        return Solved(self.infer.id, sent, queue_s, total_s, timing.batch_rows, serving.version, written, stages)


def run_all(serving: Serving, runs: Sequence[Run]) -> None:
    """Have requests run that were prepared for one engine, or for its successors if it is closed meanwhile."""
    try:
        serving.engine.run([run.work for run in runs if run.work is not None])
    except OnecardError as error:
        for run in runs:
            successor = run.prepare_again(serving, error)
            if successor is not None:
                run_all(successor, [run])


def _stages(work: Work | None, timing: RequestTiming) -> Stages | None:
    """What a traced request's front is told; collecting rows is counted to copying in."""
    if work is None or timing.batch is None:
        return None
    launched, ended, (gather_s, copy_in_s, compute_s, copy_out_s) = timing.batch
    began = min(work.arrived + timing.queue_s, launched)
    return Stages(began, launched, ended, gather_s + copy_in_s, compute_s, copy_out_s)


def _taken(token: list[None]) -> bool:
    """Take a token away, for one thread alone."""
    try:
        token.pop()
    except IndexError:
        return False
    return True


def _late(began: float) -> DeadlineError:
    return DeadlineError(f"its deadline passed after {time.monotonic() - began:.3f} s of waiting.")
