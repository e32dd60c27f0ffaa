"""The engine: requests of any size from any thread in, every caller's own answer out, at the pace of the device.

Around it lie the parts that it joins: the batcher decides what runs together (``batcher``), a stage moves it to the
device and back (``staging``), a lane keeps both busy (``lane``).
"""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from onecard.bundle.manifest import read_manifest
from onecard.bundle.open import device_for
from onecard.device_memory import check_device_memory, limit_device_memory
from onecard.errors import EngineClosedError, UsageError
from onecard.runtime.cost import Costs
from onecard.runtime.dispatch import Dispatch, fail
from onecard.runtime.future import Answer, Receiver
from onecard.runtime.ingest import Ingest, check_ingests
from onecard.runtime.interpreter import interpreter
from onecard.runtime.lane import Lane, OnBatch
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.loops import deliver_to_loop
from onecard.runtime.request import Intake, Request
from onecard.runtime.served import BundleModel, Served
from onecard.runtime.stages import open_stage
from onecard.runtime.staging import Stage
from onecard.runtime.usage import MemoryUse, memory_use
from onecard.runtime.warm import warm_up
from onecard.runtime.work import Work
from onecard.spec import Bucket, Spec

_DRAIN_S = 30.0


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs.

    Args:
        policy: how requests become batches and how many may wait.
        depth: batches under way at once on a GPU: one that is copied in, one that computes, one that is copied out.
        lanes: copies of the model that run side by side; each takes the memory of one.
        device_memory: most bytes of the device's memory to use, from now on in this process; None for all that is
            free. On a CPU it binds only what streams its weights.
        timeout_s: for requests that name none; ``inf`` means that they wait as long as it takes.
        ingest: inputs that may also come in another form, such as pictures as bytes.
        timings: whether copies and computing are timed on a GPU for ``on_batch``.
    """

    policy: BatchPolicy = field(default_factory=BatchPolicy)
    depth: int = 3
    lanes: int = 1
    device_memory: int | None = None
    timeout_s: float = math.inf
    ingest: tuple[Ingest, ...] = ()
    timings: bool = True

    def __post_init__(self) -> None:
        if self.depth < 1 or self.lanes < 1:
            raise UsageError(f"depth is {self.depth} and lanes is {self.lanes}, but both must be 1 or more.")
        if not self.timeout_s > 0:
            raise UsageError(f"timeout_s is {self.timeout_s}, but must be above 0.")


class Engine:
    """A model that answers many callers at once.

    Make one with :meth:`open`. It may be used from any number of threads and event loops; close it, or use it in a
    ``with`` block.

    Args:
        models: one for each lane, all the same; they are closed with the engine.
        options: see :class:`EngineOptions`.
        on_batch: told of every batch (:class:`onecard.runtime.stats.BatchStats`) on a thread of the engine; keep
            it short.
        make_stage: where a lane runs its model.

    Raises:
        DeviceMemoryError: not even the smallest size fits in the device's memory.
    """

    def __init__(
        self,
        models: Sequence[Served],
        options: EngineOptions | None = None,
        on_batch: OnBatch | None = None,
        make_stage: Callable[[Served, EngineOptions], Stage] = open_stage,
    ) -> None:
        self.options = options or EngineOptions()
        self.spec: Spec = models[0].spec
        self.device = models[0].device
        self._intake = Intake(self.spec, self.options.ingest)
        self._closed = self._over = False
        self._closing = threading.RLock()
        known = [(dict(zip(self.spec.symbols, key, strict=True)), s) for key, s in models[0].seconds().items()]
        costs = Costs(tuple(self.spec.symbols), self.spec.batch_symbol, known)
        self._dispatch = Dispatch(models[0], self.options.policy, costs, len(models))
        self.skipped: list[str] = []
        self._lanes: list[Lane] = []
        try:
            for number, model in enumerate(models):
                stage = make_stage(model, self.options)
                self._lanes.append(Lane(number, model, stage, self._dispatch, on_batch))
                self.skipped += warm_up(model, stage, self.options, self._dispatch)
        except BaseException:
            for lane in self._lanes:
                lane.stage.close()
            raise
        interpreter.share()
        self._alone = self._lanes[0] if len(self._lanes) == 1 and self._lanes[0].stage.synchronous else None
        for lane in self._lanes:
            lane.start()

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = "auto",
        options: EngineOptions | None = None,
        on_batch: OnBatch | None = None,
    ) -> Engine:
        """Open a bundle and make it ready: self-tested, warmed at every size, its buffers in place.

        Args:
            path: the bundle's folder.
            device: ``auto``, ``cpu``, ``cuda:0`` ...
            options: see :class:`EngineOptions`; None for those that ``onecard tune`` wrote into the bundle, if it did.
            on_batch: told of every batch.

        Raises:
            BundleError: the bundle is damaged.
            NoVariantError: no variant of it runs here and answers rightly.
            DeviceMemoryError: not even the smallest size fits.
            UsageError: a device memory that the device does not have, or an ingest that the model has no input for.
        """
        if options is None:
            from onecard.runtime.tune import tuned_options

            options = tuned_options(path, device=device)
        if options.ingest:
            check_ingests(read_manifest(Path(path).absolute()).spec, options.ingest)  # before anything is loaded
        share = None
        if options.device_memory is not None:
            place = device_for(read_manifest(Path(path).absolute()), device)
            check_device_memory(options.device_memory, place)
            limit_device_memory(place, options.device_memory)
            share = options.device_memory // options.lanes
        models: list[Served] = []
        try:
            for lane in range(options.lanes):
                models.append(BundleModel.open(path, device, check_files=lane == 0, device_memory=share))
            return cls(models, options, on_batch)
        except BaseException:
            for model in models:
                model.close()
            raise

    def infer(
        self, inputs: Mapping[str, Any], *, timeout_s: float | None = None, priority: int = 0, client: str = ""
    ) -> dict[str, Any]:
        """Answer one request; the calling thread waits.

        Args:
            inputs: NumPy arrays or tensors by name, of the spec's dtypes and of any size in its range. They must
                not be changed before the answer is there.
            timeout_s: for how long the answer is of use.
            priority: 0 is served first.
            client: whose request it is; clients of one priority share the device evenly.

        Returns:
            Output name to answer, the caller's own: NumPy arrays if all inputs were, else tensors on the CPU.

        Raises:
            SpecError: an input that does not fit.
            UsageError: a timeout that is not a number.
            QueueFullError: too much is waiting; ``retry_after_s`` tells when to try again.
            DeadlineError: the time was, or would be, over before the answer.
            EngineError: the model failed on this input.
            EngineClosedError: the engine is closed.
        """
        answer = self.submit(inputs, timeout_s=timeout_s, priority=priority, client=client)
        try:
            return answer.result()
        except BaseException:
            answer.cancel()  # Ctrl-C in the calling thread: what nobody waits for is not run
            raise

    def submit(
        self,
        inputs: Mapping[str, Any],
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        client: str = "",
    ) -> Answer:
        """Hand a request in and go on; arguments and errors as of :meth:`infer`.

        Returns:
            A future; ``cancel()`` takes the request out of the queue while it waits.
        """
        answer = Answer()
        work = self.prepare(inputs, answer, timeout_s=timeout_s, priority=priority, client=client)
        answer.on_cancel = functools.partial(self._dispatch.cancel, work)
        try:
            self._dispatch.put(work)
        except BaseException:
            answer.on_cancel = None
            raise
        return answer

    def prepare(
        self,
        inputs: Mapping[str, Any],
        receiver: Receiver,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        client: str = "",
    ) -> Work:
        """Check one of several requests that :meth:`run` is then given together; arguments as of :meth:`infer`.

        Args:
            inputs: by name.
            receiver: who gets the answer, or hears why there is none.
            timeout_s: for how long the answer is of use, from now on.
            priority: 0 is served first.
            client: whose request it is.

        Raises:
            SpecError: an input that does not fit.
            UsageError: a timeout that is not a number.
        """
        now = time.monotonic()
        arrays, rows, lengths, nbytes, numpy = self._intake.take(inputs)
        deadline = now + (self.options.timeout_s if timeout_s is None else timeout_s)
        if math.isnan(deadline):
            raise UsageError(f"timeout_s is {timeout_s}, but must be a number of seconds, or inf.")
        return Work(rows, lengths, nbytes, now, deadline, priority, client, Request(arrays, receiver, numpy))

    def run(self, works: Sequence[Work]) -> None:
        """Hand in what was prepared; those over in no time are run by the calling thread.

        Raises:
            EngineClosedError: the engine is closed; it has none of them.
            EngineError: the device was lost; likewise.
        """
        works = [work for work in works if not work.gone]
        if not works:
            return
        if self._alone is not None:
            self._alone.run_at_once(works)
        else:
            self._dispatch.put_all(works, None)
            self._dispatch.wake()

    def cancel(self, work: Work) -> None:
        """Take a request that was prepared out of the queue, if it waits there, or see that it never does."""
        self._dispatch.cancel(work)

    async def infer_async(
        self, inputs: Mapping[str, Any], *, timeout_s: float | None = None, priority: int = 0, client: str = ""
    ) -> dict[str, Any]:
        """Answer one request in an event loop; as :meth:`infer`. Cancelling the task cancels the request."""
        answer = self.submit(inputs, timeout_s=timeout_s, priority=priority, client=client)
        waiting = asyncio.get_running_loop().create_future()
        answer.add_done_callback(functools.partial(deliver_to_loop, waiting))
        try:
            result: dict[str, Any] = await waiting
            return result
        except asyncio.CancelledError:
            answer.cancel()
            raise

    @property
    def variants(self) -> list[tuple[Bucket, str]]:
        """The sizes that the model was warmed at, the largest first, and the recipe that runs each."""
        model = self._lanes[0].served
        return [(size, model.variant(size)) for size in model.sizes()]

    @property
    def ruled_out(self) -> dict[str, str]:
        """Better variants of the bundle that do not run here, with the reason."""
        return self._lanes[0].served.ruled_out

    @property
    def queued(self) -> tuple[int, int, int]:
        """Requests, rows and bytes of inputs that wait."""
        return self._dispatch.queued

    @property
    def running_s(self) -> float:
        """For how long the oldest batch that is under way has been; 0.0 if none is."""
        return self._dispatch.running_s

    def register(self, memory: Any) -> bool:
        """Let inputs be copied to the device from where they lie in this array, without being collected first.

        Args:
            memory: a contiguous host array; it must not be freed before it is unregistered or the engine closed.

        Returns:
            False where that cannot be, or would be of no use; its rows are then collected like all others.
        """
        return not self._closed and all([lane.stage.register(memory) for lane in self._lanes])

    def unregister(self, memory: Any) -> None:
        """Forget an array that was registered; waits until nothing is copied from it any more."""
        for lane in self._lanes:
            lane.stage.unregister(memory)

    @property
    def healthy(self) -> bool:
        """False once closed, or once the device can do nothing more for this process."""
        return not self._closed and not self._dispatch.broken

    @property
    def memory(self) -> MemoryUse:
        """What is held at this moment, by the allocators' own account."""
        return memory_use(self.device, self._dispatch.queued[2])

    def predicted_wait_s(self, priority: int = 0) -> float:
        """How long a request that came now would wait for its turn."""
        return self._dispatch.predicted_wait_s(priority)

    def reconfigure(self, policy: BatchPolicy) -> None:
        """Make batches by another policy from now on; more rows than the engine was opened for are not possible.

        Raises:
            UsageError: requests are waiting, or the policy lets batches grow beyond the buffers.
        """
        held, wanted = self.options.policy.max_rows, policy.max_rows
        if held is not None and (wanted is None or wanted > held):
            raise UsageError(f"this engine was opened for batches of at most {held} rows.", "Open another.")
        self._dispatch.reconfigure(policy)

    def close(self, drain_s: float = _DRAIN_S) -> None:
        """Answer what waits, for so many seconds at most, and release everything.

        Requests that are left then get an :class:`EngineClosedError`. Whoever closes it meanwhile waits for that, and
        where Ctrl-C ended it, goes on with it; but called back by an answer, this returns at once.
        """
        self._closed = True
        self._dispatch.close()
        if any([lane.runs_here() for lane in self._lanes]):  # which ends no sooner than this call
            threading.Thread(target=self.close, args=(drain_s,), name="onecard-close", daemon=True).start()
            return
        with self._closing:
            if self._over:  # perhaps only begun: by this thread, which is told of a request that this fails
                return
            self._over = True
            try:
                self._release(drain_s)
            except BaseException:
                self._over = False
                raise

    def _release(self, drain_s: float) -> None:
        end = time.monotonic() + drain_s
        done = all([lane.join(max(0.0, end - time.monotonic())) for lane in self._lanes])
        for work in self._dispatch.abandon():
            fail(work, EngineClosedError("the engine was closed before it could answer.", "Send it to another."))
        if not done:
            for lane in self._lanes:
                lane.join()
        for lane in self._lanes:
            lane.close()
        interpreter.unshare()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0.0 if error is not None else _DRAIN_S)
