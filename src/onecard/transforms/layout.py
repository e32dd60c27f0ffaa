"""Memory layout: channels-last convolutions, which tensor cores and oneDNN prefer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule


def channels_last(module: FlatModule, inputs: dict[str, Tensor]) -> FlatModule:
    """Weights and 4-D activations in channels-last order; answers come out contiguous.

    Raises:
        Unsupported: the model has no 2-D convolution, so nothing would change, or it reshapes in a way that needs
            the usual order.
    """
    if not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in module.inner.modules()):
        raise Unsupported("the model has no 2-D convolution that a channels-last layout could help")
    for tensor in (*module.inner.parameters(), *module.inner.buffers()):
        if tensor.dim() == 4:  # noqa: PLR2004 - [O, I, H, W]; others have no such order
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    module.channels_last = True
    try:
        with torch.inference_mode():
            module(*(inputs[name] for name in module.plan.inputs))
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        raise Unsupported(
            "the model flattens with view(), which needs the usual memory order", "Use flatten() or reshape() in it."
        ) from error
    return module
