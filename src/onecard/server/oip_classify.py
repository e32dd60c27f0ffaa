"""The classification extension: the highest values of an output as ``value:index`` strings, and how strings are sent.

Sources: Triton's "Classification Extension" and, for BYTES, its "Binary Tensor Data Extension".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onecard.server.oip_types import BFLOAT16, Array, Datatype

_LENGTH_BYTES = 4


def classify(array: Array, datatype: Datatype, classes: int, labels: Sequence[str], batched: bool) -> list[list[str]]:
    """Write the highest values of each row as ``value:index`` or ``value:index:label``.

    Values are written as Triton writes them, floats with six decimals. Equal values come in the order of their
    indices; NaN comes last.

    Args:
        array: [B, ...] if ``batched``, otherwise all of it is one row.
        datatype: of the array.
        classes: how many; no more than a row has.
        labels: of the indices; those beyond its end have none.
        batched: whether the first dimension counts rows.

    Returns:
        A list of strings for each row.
    """
    if datatype is BFLOAT16:
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    rows = array.reshape(array.shape[0], -1) if batched else array.reshape(1, -1)
    is_float = array.dtype.kind == "f"
    found = []
    for row in rows:
        order = _highest(row, min(classes, row.size))
        texts = [f"{value:f}" if is_float else str(value) for value in row[order].tolist()]
        found.append(
            [
                f"{text}:{index}:{labels[index]}" if index < len(labels) else f"{text}:{index}"
                for text, index in zip(texts, order.tolist(), strict=True)
            ]
        )
    return found


def length_prefixed(texts: Sequence[str]) -> bytes:
    """BYTES elements as binary data: each one's length in four little-endian bytes, then itself in UTF-8."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for item in encoded for part in (len(item).to_bytes(_LENGTH_BYTES, "little"), item))


def _highest(row: Array, count: int) -> Array:
    """Indices of the ``count`` highest values, highest first, equal ones by index, NaN last."""
    unknown = np.isnan(row) if row.dtype.kind == "f" else None
    if unknown is not None and unknown.any():
        known = np.flatnonzero(~unknown)
        best = known[_highest(row[known], min(count, known.size))]
        return np.concatenate([best, np.flatnonzero(unknown)])[:count]
    candidates = np.arange(row.size)
    if 0 < count < row.size:  # a full sort of many classes for a few of them is most of the work
        candidates = np.flatnonzero(row >= np.partition(row, row.size - count)[row.size - count])
    backwards = np.argsort(row[candidates][::-1], kind="stable")[::-1]
    order: Array = candidates[candidates.size - 1 - backwards][:count]
    return order
