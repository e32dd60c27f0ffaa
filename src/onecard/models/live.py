"""A module that the caller already has in memory."""

from __future__ import annotations

import copy

from torch import nn

from onecard.models.assemble import assemble, with_notes
from onecard.models.model import Model, Origin
from onecard.models.request import Request
from onecard.models.weights import load_strictly, read_checkpoint


def load_live(module: nn.Module, request: Request) -> Model:
    """Make a model of a live module, leaving the caller's own as it is.

    Raises:
        SpecError: neither inputs nor examples say what it takes, or it cannot be called with them.
    """
    notes = []
    try:
        copied = copy.deepcopy(module)
    except Exception as error:  # any attribute of the user's module may refuse to be copied
        copied = module
        notes.append(f"the module could not be copied ({type(error).__name__}) and was put in evaluation mode itself")
    if request.weights is not None:
        load_strictly(copied, read_checkpoint(request.weights), request.weights)
    kind = type(module)
    model = assemble(kind.__name__, copied, Origin("live", f"{kind.__module__}.{kind.__qualname__}"), request)
    return with_notes(model, notes)
