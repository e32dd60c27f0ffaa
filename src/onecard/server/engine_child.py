"""The engine's process as its parent sees it: started, watched for its end, killed, and how it ended in words."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence

from onecard.errors import EngineError, StorageError

_PR_SET_PDEATHSIG = 1  # prctl(2)


class EngineChild:
    """A process of our own, in a session of its own: the terminal's Ctrl-C does not reach it.

    Args:
        command: the program and its arguments. What it prints goes to our stderr.
        name: what to call it in errors.
        descriptors: of ours that it gets under the same numbers.

    Attributes:
        ended: done when the process ended and was reaped; the result says how in words.

    Raises:
        EngineError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], name: str = "the engine's process", descriptors: Sequence[int] = ()
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self._doom = ""
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, pass_fds=descriptors
            )
        except OSError as error:
            raise EngineError(f"{name} cannot be started: {error}.") from error
        self.pid = self._process.pid
        try:
            # Not asyncio's own watching of children, which needs the main thread or a thread for each.
            self._watch: int = os.pidfd_open(self.pid)
        except OSError as error:
            self._process.kill()
            self._process.wait()
            raise EngineError(f"{name} cannot be watched: {error}.") from error
        self._loop.add_reader(self._watch, self._on_end)

    def kill(self, why: str) -> None:
        """End it at once.

        Args:
            why: told with how it ended, if it had not ended by itself.
        """
        if not self.ended.done():
            self._doom = self._doom or why
            self._process.kill()  # also ends one that is stopped

    def terminate(self) -> None:
        """Ask it to end."""
        if not self.ended.done():
            self._process.terminate()

    def _on_end(self) -> None:
        self._loop.remove_reader(self._watch)
        os.close(self._watch)
        code = self._process.wait()
        how = describe_exit(code)
        if self._doom and code == -signal.SIGKILL:
            how = f"killed, {self._doom}"
        if not self.ended.done():
            self.ended.set_result(how)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux).

    Raises:
        StorageError: the kernel refused.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise StorageError(f"the kernel does not tie this process to its parent: {os.strerror(ctypes.get_errno())}.")


def describe_exit(code: int) -> str:
    """An exit status of :mod:`subprocess` in words: negative for a signal."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name} (signal {-code})"
    except ValueError:
        return f"killed by signal {-code}"
