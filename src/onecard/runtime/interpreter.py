"""What Python itself does while an engine is open."""

from __future__ import annotations

import gc
import sys
import threading

_SWITCH_S = 0.0005


class Interpreter:
    """Python's own pauses, made shorter while an engine is open.

    A thread that computes in Python lets go of the interpreter after 0.5 ms, not 5: an engine's threads let go of it
    in every call into PyTorch, and beside a busy caller wait so long to have it back. And what was imported and
    loaded until now is no longer looked through by the garbage collector, which takes 100 ms and more beside PyTorch.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines = 0
        self._before = 0.0
        self._frozen = False

    def share(self) -> None:
        """An engine opens."""
        with self._lock:
            self._engines += 1
            if self._engines == 1:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, _SWITCH_S))
                self._frozen = not gc.get_freeze_count()  # else the program froze it itself, for a fork mostly
                if self._frozen:
                    gc.collect()
                    gc.freeze()

    def unshare(self) -> None:
        """An engine is closed."""
        with self._lock:
            self._engines -= 1
            if self._engines == 0:
                sys.setswitchinterval(self._before)
                if self._frozen:
                    gc.unfreeze()


interpreter = Interpreter()
"""The one of this process."""
