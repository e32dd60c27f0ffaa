"""Answers on their way into event loops: one wake-up for all that come together, since each costs a system call."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from typing import Any

from onecard.runtime.future import Answer

_lock = threading.Lock()
_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, deque[tuple[asyncio.Future[Any], Answer]]]
_mailboxes = weakref.WeakKeyDictionary()


def deliver_to_loop(waiting: asyncio.Future[Any], answer: Answer) -> None:
    """Resolve a loop's future with an answer that is there; from any thread.

    Args:
        waiting: made in its loop; it may have been cancelled meanwhile.
        answer: done.
    """
    loop = waiting.get_loop()
    with _lock:
        mailbox = _mailboxes.get(loop)
        if mailbox is None:
            mailbox = _mailboxes[loop] = deque()
        first = not mailbox
        mailbox.append((waiting, answer))
    if first:
        try:
            loop.call_soon_threadsafe(_empty, mailbox)
        except RuntimeError:  # the loop was closed: nobody waits any more
            mailbox.clear()


def _empty(mailbox: deque[tuple[asyncio.Future[Any], Answer]]) -> None:
    """In the loop: resolve all that arrived so far."""
    with _lock:
        arrived = list(mailbox)
        mailbox.clear()
    for waiting, answer in arrived:
        if waiting.done():
            continue
        if answer.cancelled():
            waiting.cancel()
        elif (error := answer.exception()) is not None:
            waiting.set_exception(error)
        else:
            waiting.set_result(answer.result())
