"""How the range of an activation is chosen from what calibration shows: the methods that static INT8 is tried with."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

METHODS = ("minmax", "histogram", "percentile")
"""The whole range seen; the range with the least squared error of a histogram (Wu et al. 2020, section 3.2); the
range without the outermost 0.01 % at either end (ibid., "percentile")."""

_PERCENTILE = 0.9999
_SAMPLE = 1 << 20  # values of a tensor that its percentiles are taken from


def observer(method: str) -> Any:
    """The class of the observer behind a method of :data:`METHODS`; torchao must be there."""
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver

    return {"minmax": MinMaxObserver, "histogram": HistogramObserver}.get(method) or _percentile_observer()


@functools.cache
def _percentile_observer() -> Any:
    """A class made at the first use, for its base is an optional package's."""
    from torchao.quantization.pt2e.observer import MinMaxObserver

    class PercentileObserver(MinMaxObserver):  # type: ignore[misc]
        """Sees each batch without its outliers; the widest of the batches' ranges counts."""

        def forward(self, x_orig: Tensor) -> Tensor:
            if x_orig.numel():
                super().forward(inner_range(x_orig.detach()))
            return x_orig

    return PercentileObserver


def inner_range(tensor: Tensor, share: float = _PERCENTILE) -> Tensor:
    """The ``1 - share`` and ``share`` quantiles of a tensor's values.

    Args:
        tensor: any shape, floating point. Of a large one a fixed random sample is looked at.
        share: in 0.5..1.

    Returns:
        Low and high, shape ``[2]``.
    """
    values = tensor.flatten()
    if values.numel() > _SAMPLE:
        # A stride would only ever meet some channels.
        picks = torch.randint(values.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
        values = values[picks.to(values.device)]
    rank = math.ceil(share * values.numel())
    return torch.stack([values.kthvalue(values.numel() + 1 - rank).values, values.kthvalue(rank).values])
