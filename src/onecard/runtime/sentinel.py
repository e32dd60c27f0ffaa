"""The sentinel of a model that serves: one request in so many is answered again by the fp32 original, in idle time.

What is offered is copied and waits; a thread waits for the engine to be idle and has the original's own process
(:mod:`onecard.runtime.original_client`) answer it. Nothing here holds up or fails a request.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from onecard.bundle.manifest import read_manifest
from onecard.errors import BundleError, EngineClosedError, EngineError
from onecard.models.wording import first_line
from onecard.runtime.original import Comparison
from onecard.runtime.original_client import OriginalClient
from onecard.runtime.slots import Array

MOST_WAITING = 2
"""Requests that wait to be checked; the one that is checked is not counted."""

MOST_BYTES = 64 << 20
"""Of the copies of all requests that wait or are checked: inputs and outputs."""

LARGEST_DIFFERENCE = 10.0
"""What lies above it, or cannot be compared, is told as this: a mean is to stay one of use."""

PATIENCE_S = 30.0
"""A request that found no idle moment for so long is checked all the same."""

BUSY_SHARE = 0.01
"""Of the time, at most, that goes to requests which are checked while the engine is busy."""

_QUIET_S = 0.02  # without a request, for the engine to count as idle
_LOOK_S = 0.005
_CLOSE_S = 5.0
_LOG_EVERY_S = 60.0
_LOGGER = logging.getLogger(__name__)


class Judge(Protocol):
    """Whoever has the original; asked from one thread."""

    def compare(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], variants: Sequence[str]) -> Comparison:
        """See :meth:`onecard.runtime.original_client.OriginalClient.compare`."""
        ...

    def close(self) -> None:
        """End :meth:`compare`, from another thread; it then raises."""
        ...

    def release(self) -> None:
        """Let go of everything; the last call, on the thread that asked."""
        ...


class Differences(Protocol):
    """A histogram of relative differences."""

    def observe(self, value: float) -> None:
        """Count one."""
        ...

    def copy(self) -> Any:
        """As it is now."""
        ...


class SentinelCounts(NamedTuple):
    """What a sentinel found since its model was opened.

    Args:
        checked: answers compared with the original's.
        wrong: of these.
        skipped: requests chosen but not compared: too many waited, or the original had no answer.
        differences: a copy of the histogram.
    """

    checked: int
    wrong: int
    skipped: int
    differences: Any


@dataclass(frozen=True)
class Watched:
    """What a sentinel knows of the model that it watches.

    Args:
        name: of the model, for the log.
        is_idle: whether nothing is computed or waits, of all that shares the device.
        variants: the recipes that answer.
        model_form: makes of a request's inputs, which may have come in a raw form, those that the original takes.
    """

    name: str
    is_idle: Callable[[], bool]
    variants: tuple[str, ...]
    model_form: Callable[[Mapping[str, Array]], Mapping[str, Array]] = dict


class _Question(NamedTuple):
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    nbytes: int
    came: float


class Sentinel:
    """Checks one request in so many.

    Args:
        watched: the model.
        every: one in so many is checked, the first of all included.
        judge: has the original.
        differences: where they are counted; written by the sentinel's thread alone.

    Attributes:
        off: why nothing is compared; empty otherwise.
    """

    def __init__(self, watched: Watched, every: int, judge: Judge, differences: Differences) -> None:
        self._watched = watched
        self._every = every
        self._judge = judge
        self._differences = differences
        self._requests = itertools.count()
        self._questions: deque[_Question] = deque()
        self._lock = threading.Lock()
        self._waiting = self._bytes = 0
        self._came = threading.Event()
        self._over = threading.Event()
        self._checked = self._wrong = self._skipped = 0
        self._busy_again = 0.0
        self._said_at, self._unsaid = float("-inf"), 0
        self._passed_over = False
        self.off = ""
        self._thread = threading.Thread(target=self._live, name=f"onecard-sentinel-{watched.name}", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, folder: Path, every: int, device: str, watched: Watched, differences: Differences) -> Sentinel:
        """Watch what serves a bundle; the original is loaded when there is something to compare.

        Args:
            folder: of the bundle, as it lies there now.
            every: one request in so many.
            device: where the original is to run.
            watched: the model.
            differences: where they are counted.

        Raises:
            BundleError: there is no bundle any more.
        """
        return cls(watched, every, OriginalClient(folder, read_manifest(folder).sha256, device), differences)

    def offer(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Show it a request and its answer, from any thread; what is to be checked is copied now.

        Args:
            inputs: the request's own rows.
            outputs: their answer, without padding.
        """
        if next(self._requests) % self._every or self._over.is_set():
            return
        nbytes = sum([array.nbytes for array in (*inputs.values(), *outputs.values())])
        if not self._has_room(nbytes):
            return
        try:
            self._questions.append(_Question(_copies(inputs), _copies(outputs), nbytes, time.monotonic()))
        except Exception:  # no memory, say; it is the request that matters
            with self._lock:
                self._waiting -= 1
            self._skip(nbytes)
        else:
            self._came.set()

    def figures(self) -> SentinelCounts:
        """What was found so far."""
        return SentinelCounts(self._checked, self._wrong, self._skipped, self._differences.copy())

    def close(self) -> None:
        """Check nothing more, and end the original's process, whatever it is at."""
        self._over.set()
        self._came.set()
        self._judge.close()
        self._thread.join(_CLOSE_S)

    def _has_room(self, nbytes: int) -> bool:
        with self._lock:
            room = self._waiting < MOST_WAITING and self._bytes + nbytes <= MOST_BYTES
            if room:
                self._waiting += 1
                self._bytes += nbytes
            else:
                self._skipped += 1
        return room

    def _skip(self, nbytes: int) -> None:
        """A request that there was room for is not compared."""
        with self._lock:
            self._bytes -= nbytes
            self._skipped += 1

    # on the sentinel's thread

    def _live(self) -> None:
        try:
            while (question := self._next()) is not None:
                idle = self._wait_for_turn(question.came + PATIENCE_S)
                if not self._over.is_set():
                    self._check(question, idle)
                del question  # or it would be held while this thread waits
        except Exception as error:  # the sentinel's own fault; its model goes on
            _LOGGER.exception("the sentinel of model '%s' failed", self._watched.name)
            self.off = f"it failed: {first_line(error)}"
        finally:
            self._over.set()
            self._judge.release()
            self._questions.clear()

    def _next(self) -> _Question | None:
        """The next request, once there is one; None when it is over."""
        while not self._over.is_set():
            self._came.clear()
            if self._questions:
                with self._lock:
                    self._waiting -= 1
                return self._questions.popleft()
            if not self._over.is_set():
                self._came.wait()
        return None

    def _wait_for_turn(self, patience: float) -> bool:
        """Wait for an idle moment; without one, until patience is over and this may be done beside the engine's work.

        Returns:
            Whether the moment is idle.
        """
        latest = max(patience, self._busy_again)
        busy = time.monotonic()
        while not self._over.wait(_LOOK_S):
            now = time.monotonic()
            if not self._watched.is_idle():
                busy = now
            elif now - busy >= _QUIET_S:
                return True
            if now >= latest:
                return False
        return False

    def _check(self, question: _Question, idle: bool) -> None:
        began = time.monotonic()
        try:
            inputs = self._watched.model_form(question.inputs)
            told = self._judge.compare(inputs, question.outputs, self._watched.variants)
        except EngineClosedError:
            return
        except (BundleError, EngineError) as error:
            self._skip(question.nbytes)
            self._pause(idle, time.monotonic() - began)
            self._explain(error)
        else:
            self._pause(idle, told.busy_s)
            self._count(told, question.nbytes)

    def _explain(self, error: BundleError | EngineError) -> None:
        """Say why a request was not compared; it is the last one if the original cannot be had at all."""
        name = self._watched.name
        if isinstance(error, BundleError):
            self.off = str(error)
            self._over.set()
            _LOGGER.warning("model '%s' is served without a sentinel: %s", name, error)
        else:
            level = logging.DEBUG if self._passed_over else logging.WARNING  # once is enough: figures tell how often
            self._passed_over = True
            _LOGGER.log(level, "the sentinel of model '%s' passed a request over: %s", name, error)

    def _pause(self, idle: bool, busy_s: float) -> None:
        """Keep to the share of time that there is for checks beside the engine's work."""
        if not idle:
            self._busy_again = time.monotonic() + busy_s * (1.0 / BUSY_SHARE - 1.0)

    def _count(self, told: Comparison, nbytes: int) -> None:
        if told.wrong:
            self._say(told.wrong)
        comparable = told.difference <= LARGEST_DIFFERENCE  # False for NaN
        self._differences.observe(told.difference if comparable else LARGEST_DIFFERENCE)
        with self._lock:
            self._bytes -= nbytes
            self._checked += 1
            self._wrong += bool(told.wrong)

    def _say(self, wrong: str) -> None:
        """Log a wrong answer, unless another one was logged a moment ago."""
        now = time.monotonic()
        if now - self._said_at < _LOG_EVERY_S:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more since the last time)" if self._unsaid else ""
        self._said_at, self._unsaid = now, 0
        _LOGGER.error("model '%s' gave a wrong answer: %s%s", self._watched.name, wrong, more)


def _copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: a.copy() if isinstance(a, np.ndarray) else a.clone() for name, a in arrays.items()}
