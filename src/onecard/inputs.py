"""Test inputs: drawn from the spec, or rows of the user's own data, the same for the same seed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from onecard.spec import Bucket, Spec, TensorSpec


def make_inputs(
    spec: Spec,
    bucket: Bucket,
    *,
    seed: int = 0,
    ragged: bool = False,
    data: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Inputs of one size, on the CPU.

    Args:
        spec: names, dtypes, shapes and value ranges.
        bucket: the size of every symbol.
        seed: equal seeds give equal inputs.
        ragged: masks end after a different number of positions in each row, instead of being all ones.
        data: rows of real inputs, ``[N, ...]`` each; used where their shape fits, drawn with replacement.

    Returns:
        Input name to a contiguous tensor of the spec's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _pick_rows(spec, bucket, data, generator)
    if rows is not None:
        return rows
    return {t.name: _draw(t, t.concrete(bucket), generator, ragged) for t in spec.inputs}


def is_mask(tensor: TensorSpec) -> bool:
    """True for what looks like an attention mask: 2-D, integer or boolean, 'mask' in its name."""
    return not tensor.is_float and len(tensor.shape) == 2 and "mask" in tensor.name  # noqa: PLR2004 - [B, S]


def _pick_rows(
    spec: Spec, bucket: Bucket, data: Mapping[str, Tensor] | None, generator: torch.Generator
) -> dict[str, Tensor] | None:
    batch = spec.batch_symbol
    if data is None or batch is None:
        return None
    if any(tuple(data[t.name].shape[1:]) != t.concrete(bucket)[1:] for t in spec.inputs):
        return None
    rows = len(next(iter(data.values())))
    index = torch.randint(rows, (bucket[batch],), generator=generator)
    return {t.name: data[t.name][index].contiguous() for t in spec.inputs}


def _draw(tensor: TensorSpec, shape: tuple[int, ...], generator: torch.Generator, ragged: bool) -> Tensor:
    dtype = getattr(torch, tensor.dtype)
    if is_mask(tensor):
        if not ragged:
            return torch.ones(shape, dtype=dtype)
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        lengths[0] = shape[1]
        return (torch.arange(shape[1]) < lengths).to(dtype)
    if tensor.is_float:
        if tensor.values is None:
            return torch.randn(shape, generator=generator).to(dtype)
        low, high = tensor.values.low, tensor.values.high
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
    low, high = (tensor.values.low, tensor.values.high) if tensor.values else (0, 1)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
