"""onecard: the fastest verified way to run a PyTorch model on one card.

>>> bundle = onecard.optimize(module, example_inputs)  # doctest: +SKIP
>>> onecard.load("model.onecard")(image=picture)["output"]  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onecard.errors import OnecardError

if TYPE_CHECKING:
    from onecard.api import load as load
    from onecard.api import optimize as optimize

__version__ = "0.1.0"
__all__ = ["OnecardError", "__version__", "load", "optimize"]


def __getattr__(name: str) -> Any:
    """Import the two functions when they are first used, so that importing onecard costs no torch."""
    if name in ("load", "optimize"):
        from onecard import api

        return getattr(api, name)
    raise AttributeError(f"module 'onecard' has no attribute '{name}'")
