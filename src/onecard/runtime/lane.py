"""One lane of an engine: a loaded model, its stage, and the threads that keep both busy."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from onecard.errors import EngineError
from onecard.models.wording import first_line
from onecard.runtime.deliver import Delivery
from onecard.runtime.dispatch import Dispatch, fail
from onecard.runtime.entries import Source
from onecard.runtime.faults import again, explained, is_device_lost, is_out_of_memory, too_large
from onecard.runtime.future import BatchTiming
from onecard.runtime.request import Request
from onecard.runtime.served import Served
from onecard.runtime.staging import Flight, Stage, StageTimings
from onecard.runtime.stats import BatchStats
from onecard.runtime.work import Batch, Slice, Work

OnBatch = Callable[[BatchStats], None]
_QUICK_S = 200e-6
_LOGGER = logging.getLogger(__name__)


class Lane:
    """Takes batches from the queue, runs them and answers their callers, until the queue is closed and empty.

    On a GPU one thread launches and another waits for the answers, so that the next batch is on its way while this
    one computes. Whatever goes wrong with a batch, the lane goes on.

    Args:
        number: of the lane.
        served: what it runs; used by this lane alone.
        stage: where; closed with the lane.
        dispatch: the queue.
        on_batch: told of every batch, on the lane's own threads; what it raises is ignored.
    """

    def __init__(self, number: int, served: Served, stage: Stage, dispatch: Dispatch, on_batch: OnBatch | None) -> None:
        self.served = served
        self.stage = stage
        self._number = number
        self._dispatch = dispatch
        self._on_batch = on_batch
        self._delivery = Delivery(served.spec)
        self._room = None if stage.synchronous else threading.Semaphore(stage.depth)
        self._guest = 0  # the thread that it is lent to, while that runs a batch
        self._flights: queue.SimpleQueue[_Underway | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._launch_all, name=f"onecard-launch-{number}", daemon=True)]
        if not stage.synchronous:
            finish = threading.Thread(target=self._finish_all, name=f"onecard-finish-{number}", daemon=True)
            self._threads.append(finish)

    def start(self) -> None:
        """Begin to take batches."""
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of its threads; False if they are still at it."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def runs_here(self) -> bool:
        """Whether the calling thread is one of those that run it, which cannot wait for its end."""
        return threading.current_thread() in self._threads or threading.get_ident() == self._guest

    def close(self) -> None:
        """Release stage and model; after :meth:`join`."""
        self.stage.close()
        self.served.close()

    def run_at_once(self, works: Sequence[Work]) -> None:
        """Queue requests and run what is queued on the calling thread, as long as each batch is over in no time.

        Only for an engine's one lane, where its stage is synchronous. To wake the lane's own thread up would take
        longer than such a batch; that thread is told of what is left.

        Raises:
            EngineClosedError: nothing is taken on any more; none of the requests was.
            EngineError: the device was lost; likewise.
        """
        batch = self._dispatch.put_all(works, self._number, _QUICK_S)
        again = batch is not None
        try:
            while batch is not None or (batch := self._dispatch.lend(self._number, _QUICK_S, again)) is not None:
                again, self._guest = True, threading.get_ident()
                self._run(batch)
                batch, self._guest = None, 0
        except BaseException as error:
            if again:
                self._guest = 0
                self._dispatch.recall(self._number)
            if not isinstance(error, Exception):
                raise
            self._break_off(None, error)

    def _launch_all(self) -> None:
        while (batch := self._take()) is not None:
            self._run(batch)
            del batch  # the callers' arrays must not live on while this thread waits
        self._flights.put(None)

    def _take(self) -> Batch | None:
        while True:
            try:
                return self._dispatch.take(self._number, self._room)
            except BaseException as error:
                self._break_off(None, error)  # nothing waits then, so that it is not raised again

    def _run(self, batch: Batch) -> None:
        interrupt = None
        try:
            interrupt = self._launch(batch)
        except BaseException as error:
            self._break_off(batch, error)
            if self._is_interrupt(error):
                raise
        if interrupt is not None:
            raise interrupt

    def _is_interrupt(self, error: BaseException) -> bool:
        """Whether it is the business of a caller's thread that runs the lane, and not the model's: Ctrl-C."""
        return isinstance(error, KeyboardInterrupt | SystemExit) and threading.current_thread() not in self._threads

    def _launch(self, batch: Batch) -> BaseException | None:
        """Run a batch, or on a GPU begin to.

        Returns:
            What is to be raised in the calling thread, though all who wait for the batch were told.
        """
        began = time.monotonic()
        queue_s = tuple([_start(piece, began) for piece in batch.slices])
        sources = [Source(piece.work.request.inputs, piece.start, piece.rows) for piece in batch.slices]
        try:
            flight = self.stage.launch(sources, batch.rows, batch.size)
        except BaseException as error:  # a model may raise anything; only its callers are to hear of it
            self._failed(batch, error, began, queue_s)
            return error if self._is_interrupt(error) else None
        if self.stage.synchronous:
            return self._finish(_Underway(batch, flight, began, queue_s))
        self._flights.put(_Underway(batch, flight, began, queue_s))
        return None

    def _finish_all(self) -> None:
        while (underway := self._flights.get()) is not None:
            try:
                self._finish(underway)
            except BaseException as error:
                self._break_off(underway.batch, error)
            del underway

    def _break_off(self, batch: Batch | None, error: BaseException) -> None:
        """A fault of the engine's own fails this batch and all that waits; else its callers would wait for ever.

        To be called where the error is handled, whose traceback is logged.
        """
        _LOGGER.exception("lane %d failed", self._number)
        mistake = EngineError(f"the engine itself failed: {first_line(error)}.", "Open it again.")
        if batch is not None:
            self._dispatch.stopped(self._number, batch)
            for piece in batch.slices:
                fail(piece.work, again(mistake))
        self._dispatch.break_off(mistake)
        self._leave()

    def _finish(self, underway: _Underway) -> BaseException | None:
        """Answer the callers of a batch; returns as :meth:`_launch` does."""
        batch, flight, began, queue_s = underway
        try:
            flight.wait()
        except BaseException as error:
            flight.release()
            self._failed(batch, error, began, queue_s)
            return error if self._is_interrupt(error) else None
        ended, timings = time.monotonic(), flight.timings
        lead_s = timings.gather_s + timings.copy_in_s
        self._dispatch.ran(self._number, batch, timings.compute_s or math.nan, lead_s)
        interrupt = None
        try:
            self._delivery.deliver(batch, flight.outputs, flight.owned, BatchTiming(began, ended, timings))
        except BaseException as error:  # answers that are not what the spec says
            for piece in batch.slices:
                self._fail(piece.work, explained(error))
            interrupt = error if self._is_interrupt(error) else None
        flight.release()
        self._leave()
        self._tell(batch, began, queue_s, timings)
        return interrupt

    def _fail(self, work: Work, error: EngineError) -> None:
        """A request with rows in a batch fails; those that wait are not run any more."""
        self._dispatch.cancel(work)
        fail(work, error)

    def _failed(self, batch: Batch, error: BaseException, began: float, queue_s: tuple[float, ...]) -> None:
        """A batch that has no answers: smaller if memory was short, one by one if one of several may be to blame."""
        short = is_out_of_memory(error)
        if short and self._dispatch.shrink(batch.size):
            _give_memory_back(self.served.device)
            self._dispatch.put_back(batch)
        elif len(batch.slices) > 1 and not is_device_lost(error):
            self._dispatch.retry(self._number, [_alone(piece, self.served) for piece in batch.slices])
        else:
            if is_device_lost(error):
                self._dispatch.break_off(explained(error))
            for piece in batch.slices:
                self._fail(piece.work, too_large(batch.size, error) if short else explained(error))
                if piece.rows == piece.work.rows:  # the error's traceback holds this batch, and the request the error
                    piece.work.request = None
        self._dispatch.stopped(self._number, batch)  # only now: an engine that closes waits for what is to be run again
        self._leave()
        self._tell(batch, began, queue_s, StageTimings(), "out of memory" if short else first_line(error))

    def _leave(self) -> None:
        if self._room is not None:
            self._room.release()

    def _tell(
        self, batch: Batch, began: float, queue_s: tuple[float, ...], timings: StageTimings, error: str = ""
    ) -> None:
        if self._on_batch is None:
            return
        volume = math.prod(batch.size.values()) or 1
        used = batch.rows
        if batch.lengths:
            used = sum([piece.rows * math.prod(piece.work.lengths) for piece in batch.slices])
        stats = BatchStats(
            self.served.variant(batch.size),
            batch.size,
            len(batch.slices),
            batch.rows,
            max(0.0, 1.0 - used / volume),
            queue_s,
            *timings,
            time.monotonic() - began,
            self._dispatch.queued[0],
            self._dispatch.under_way,
            error,
        )
        with contextlib.suppress(Exception):  # the observer's own trouble is not its engine's
            self._on_batch(stats)


class _Underway(NamedTuple):
    """A batch that was launched."""

    batch: Batch
    flight: Flight
    began: float
    queue_s: tuple[float, ...]


def _start(piece: Slice, now: float) -> float:
    """Mark a request as running, and say how long it waited; one cancelled meanwhile runs for nothing."""
    work = piece.work
    request: Request = work.request
    if request.queue_s < 0:
        request.queue_s = now - work.arrived
        if not request.receiver.begin():
            work.gone = True
    return request.queue_s


def _alone(piece: Slice, served: Served) -> Batch:
    lengths = served.lengths_of(piece.work.lengths)
    return Batch([piece], piece.rows, lengths, served.fit(piece.rows, lengths))


def _give_memory_back(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
