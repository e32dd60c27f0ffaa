"""Samples of the card once a second, on a thread that takes less than a hundredth of a core."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from onecard.errors import UsageError
from onecard.telemetry.card_reader import Reader
from onecard.telemetry.card_sample import CardSample, PowerIntegral

MOST_OF_A_CORE = 0.01

_COSTS = 10  # readings over which the cost is averaged: some look at more than others
_PATIENCE_S = 2.0  # a driver that hangs does not hold up the end
_LOGGER = logging.getLogger("onecard.telemetry.sampler")


class Sampler:
    """Keeps the newest sample of a card and a short history.

    Where a reading takes so long that it would cost more than :data:`MOST_OF_A_CORE`, there are fewer. A reader that
    raises is said once, and asked again. Only the sampler may use the reader from then on, and it closes it.

    Args:
        reader: see :func:`onecard.telemetry.card_reader.read_card`.
        period_s: from one reading to the next.
        history: how many samples are kept.

    Raises:
        UsageError: a period or a history that is not above 0.
    """

    def __init__(self, reader: Reader, period_s: float = 1.0, history: int = 120) -> None:
        if not period_s > 0 or history < 1:
            raise UsageError(
                f"a card cannot be read every {period_s} s, {history} samples kept.", "Both must be above 0."
            )
        self._reader = reader
        self._period_s = period_s
        self._samples: deque[CardSample] = deque(maxlen=history)
        self._lock = threading.Lock()
        self._energy = PowerIntegral()
        self._trouble = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="onecard-card-sampler", daemon=True)
        self._thread.start()

    @property
    def newest(self) -> CardSample | None:
        """The latest sample, which tells its time; None before the first."""
        with self._lock:
            return self._samples[-1] if self._samples else None

    @property
    def history(self) -> tuple[CardSample, ...]:
        """The samples that are kept, oldest first."""
        with self._lock:
            return tuple(self._samples)

    def close(self) -> None:
        """End it, at once but for a reading that is under way. It may be called again."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE_S)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        costs_s: deque[float] = deque(maxlen=_COSTS)
        self._take()  # its cost is not counted: the first one opens what the others use
        wait_s = self._period_s
        while not self._stop.wait(wait_s):
            started_s, cpu_s = time.monotonic(), time.thread_time()
            self._take()
            costs_s.append(time.thread_time() - cpu_s)
            wait_s = pause_s(self._period_s, time.monotonic() - started_s, sum(costs_s) / len(costs_s))
        try:
            self._reader.close()
        except Exception as error:
            self._say(f"the card's sensors cannot be closed: {error}")

    def _take(self) -> None:
        try:
            sample = self._energy.complete(self._reader.read(), time.monotonic())
        except Exception as error:
            self._say(f"the card's sensors cannot be read: {error or type(error).__name__}")
            return
        self._say(f"{sample.name}: {sample.lost}" if sample.lost else "")
        with self._lock:
            self._samples.append(sample)

    def _say(self, trouble: str) -> None:
        """Log what is wrong when it begins and when it is over, not at every reading."""
        if trouble and trouble != self._trouble:
            _LOGGER.warning("%s", trouble)
        elif self._trouble and not trouble:
            _LOGGER.warning("The card's sensors can be read again.")
        self._trouble = trouble


def pause_s(period_s: float, reading_s: float, cost_s: float) -> float:
    """Seconds until the next reading.

    Args:
        period_s: from one to the next, if that is not too much.
        reading_s: that this one took.
        cost_s: processor time of a reading.
    """
    return max(0.0, max(period_s, cost_s / MOST_OF_A_CORE) - reading_s)
