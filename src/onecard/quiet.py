"""Keeping what other libraries have to say off the terminal, for the time of one call."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

TORCHAO = ("torchao", "torch.utils._pytree", "torch.export")
"""The loggers that report kernels made for other cards, and what torch deprecates, wherever torchao is used."""


@contextlib.contextmanager
def muted(*loggers: str, level: int = logging.ERROR, warned: bool = True) -> Iterator[None]:
    """Raise the level of some loggers, and put it back.

    Args:
        loggers: their names.
        level: what is still let through.
        warned: also ignore Python's warnings.
    """
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            if warned:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger, old in zip(found, before, strict=True):
            logger.setLevel(old)
