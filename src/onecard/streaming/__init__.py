"""Models larger than the card: the weights stay in main memory and are copied to the card while it computes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecard.streaming.model import StreamedModel as StreamedModel
    from onecard.streaming.model import stream as stream

__all__ = ["StreamedModel", "stream"]


def __getattr__(name: str) -> Any:
    """Import the Python face when it is first used: planning alone needs no torch."""
    if name in __all__:
        return getattr(importlib.import_module("onecard.streaming.model"), name)
    raise AttributeError(f"module 'onecard.streaming' has no attribute '{name}'")
