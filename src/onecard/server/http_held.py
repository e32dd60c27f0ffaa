"""What is held of bodies outside the application's memory, counted: those that come in chunks, and compressed ones."""

from __future__ import annotations

import threading
from collections import deque

from onecard.server.http_types import HttpError

_SOON = ((b"Retry-After", b"1"),)


def too_much_held() -> HttpError:
    """The 503 of a request for which there is no memory now."""
    return HttpError(503, "too many requests are held in memory; come back later.", _SOON)


def never_fits(nbytes: int, most_bytes: int) -> HttpError:
    """The 413 of a request for which there would not be memory even if it was alone."""
    return HttpError(413, f"the request needs {nbytes:,} bytes of memory; the server has {most_bytes:,} for all.")


class Held:
    """The bytes that all connections of a server hold.

    Args:
        most_bytes: how many that may be.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._bytes = 0
        self._freed: deque[int] = deque()  # not taken off yet: given back in any thread, in the middle of anything
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """How many there are now."""
        with self._lock:
            return self._count()

    def begin(self) -> Hold:
        """Hold nothing yet, for a body that comes."""
        return Hold(self)

    def take(self, nbytes: int) -> None:
        """Count more bytes.

        Raises:
            HttpError: 503, that would be too many.
        """
        with self._lock:
            if self._count() + nbytes > self.most_bytes:
                raise too_much_held()
            self._bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """Count them no more."""
        self._freed.append(nbytes)

    def _count(self) -> int:
        while self._freed:
            self._bytes -= self._freed.popleft()
        return self._bytes


class Hold:
    """What one body holds; given back with the last reference, so that no end of a request can forget it.

    Whoever has memory that was counted here refers to this as long as it has that, a thread that works on it included.
    """

    __slots__ = ("_bytes", "_held")

    def __init__(self, held: Held) -> None:
        self._held = held
        self._bytes = 0

    def grow(self, nbytes: int) -> None:
        """Hold more; by one thread at a time.

        Raises:
            HttpError: 503, too much is held; 413, so much would never fit.
        """
        if self._bytes + nbytes > self._held.most_bytes:
            raise never_fits(self._bytes + nbytes, self._held.most_bytes)
        self._held.take(nbytes)
        self._bytes += nbytes

    def __del__(self) -> None:
        self._held.give_back(self._bytes)
