"""Errors of the engine as a front is told of them."""

from __future__ import annotations

import logging

from onecard.errors import EngineError, OnecardError
from onecard.ipc.messages import Done, Refused

_LONGEST = 300
_LOGGER = logging.getLogger(__name__)


def refused(request: int, error: BaseException) -> Refused:
    """The end of a request that has no answer."""
    told = _told(error, "the engine itself failed")
    retry_after_s = float(getattr(told, "retry_after_s", 0.0))
    return Refused(request, type(told).__name__, told.message, told.cure, retry_after_s)


def failed(call: int, error: Exception, what: str) -> Done:
    """The end of a call that could not be carried out; ``what`` says which, where the error does not."""
    told = _told(error, what)
    return Done(call, type(told).__name__, told.message, told.cure)


def in_a_line(error: BaseException) -> str:
    """An error and its type in one line, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:_LONGEST]}".rstrip(". :")


def _told(error: BaseException, what: str) -> OnecardError:
    if isinstance(error, OnecardError):
        return error
    _LOGGER.error("%s", what, exc_info=error)
    return EngineError(f"{what}: {in_a_line(error)}.", "See the server's log.")
