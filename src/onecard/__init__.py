"""onecard: the fastest verified way to run a PyTorch model on one card.

>>> bundle = onecard.optimize(module, example_inputs)  # doctest: +SKIP
>>> onecard.load("model.onecard")(image=picture)["output"]  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onecard.errors import OnecardError

if TYPE_CHECKING:
    from onecard.api import load as load
    from onecard.api import optimize as optimize
    from onecard.api_training import prune as prune
    from onecard.api_training import qat as qat
    from onecard.api_tuning import tune as tune
    from onecard.runtime.engine import Engine as Engine
    from onecard.runtime.engine import EngineOptions as EngineOptions
    from onecard.streaming.model import stream as stream

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "EngineOptions",
    "OnecardError",
    "__version__",
    "load",
    "optimize",
    "prune",
    "qat",
    "stream",
    "tune",
]
_PLACES = {
    "load": "api",
    "optimize": "api",
    "prune": "api_training",
    "qat": "api_training",
    "tune": "api_tuning",
    "Engine": "runtime.engine",
    "EngineOptions": "runtime.engine",
    "stream": "streaming.model",
}


def __getattr__(name: str) -> Any:
    """Import them when they are first used, so that importing onecard costs no torch."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"onecard.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'onecard' has no attribute '{name}'")
