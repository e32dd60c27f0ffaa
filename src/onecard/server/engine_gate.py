"""Who may run beside whom: a request that may have killed an engine runs when nothing else does."""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

from onecard.errors import EngineClosedError


class Turn(Protocol):
    """A request that may be held back at the gate."""

    @property
    def alone(self) -> bool:
        """Whether it is to run when nothing else runs."""
        ...

    @property
    def deadline(self) -> float:
        """When it is of no use any more, in seconds of ``time.monotonic``."""
        ...

    def start(self) -> None:
        """Its turn has come; called on any thread, with no lock held. It must not raise, and leaves once it is over."""
        ...

    def expire(self) -> None:
        """Its deadline passed while it was held back; it does not leave."""
        ...


class Gate:
    """Lets requests of all models and fronts of a process run side by side, but for those that are to run alone.

    While one that is to run alone waits or runs, the others are held back, in their order. For any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._lone = False  # what is under way is one that runs alone
        self._closed = False
        self._alone: deque[Turn] = deque()
        self._others: deque[Turn] = deque()
        self._ready: deque[Turn] = deque()
        self._starting = False

    def enter(self, turn: Turn) -> bool:
        """Ask to run.

        Returns:
            True to begin at once; False if it is held back: then its ``start`` or ``expire`` is called later.

        Raises:
            EngineClosedError: the process is about to end.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closing.", "Try again in a moment.")
            if turn.alone:
                if self._under_way or self._alone:
                    self._alone.append(turn)
                    return False
                self._lone = True
            elif self._lone or self._alone:
                self._others.append(turn)
                return False
            self._under_way += 1
            return True

    def leave(self) -> None:
        """One that ran is over."""
        with self._lock:
            self._under_way -= 1
            self._lone = False
            if not (self._alone or self._others):
                return
            self._choose()
        self._start()

    def withdraw(self, turn: Turn) -> bool:
        """Hold one back no longer, and do not start it either; False if it is not held back."""
        with self._lock:
            waiting = self._alone if turn.alone else self._others
            if turn not in waiting:
                return False
            waiting.remove(turn)
            self._choose()
        self._start()
        return True

    def expire(self, now: float) -> None:
        """Let go of those held back whose deadline passed; to be called now and then."""
        if not self.held:
            return
        with self._lock:
            late = [turn for turn in (*self._alone, *self._others) if turn.deadline <= now]
            for turn in late:
                (self._alone if turn.alone else self._others).remove(turn)
            self._choose()
        for turn in late:
            turn.expire()
        self._start()

    def close(self) -> None:
        """Let nobody in any more; who is held back still gets their turn."""
        with self._lock:
            self._closed = True

    @property
    def held(self) -> int:
        """How many are held back."""
        return len(self._alone) + len(self._others)

    def _choose(self) -> None:
        """Under the lock: who may start now."""
        if self._alone:
            if not self._under_way:
                self._lone = True
                self._under_way = 1
                self._ready.append(self._alone.popleft())
        elif not self._lone:
            self._under_way += len(self._others)
            self._ready.extend(self._others)
            self._others.clear()

    def _start(self) -> None:
        """Start those chosen, one thread at a time: one that fails at once leaves, which comes back in here."""
        with self._lock:
            if self._starting:
                return
            self._starting = True
        while True:
            with self._lock:
                if not self._ready:
                    self._starting = False
                    return
                turn = self._ready.popleft()
            turn.start()
