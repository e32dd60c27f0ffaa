"""Where the tensors of a request or an answer lie: in a segment, in the message, or in a client's memory on the device.

A request's first word in the request segment, its *mark*, is 0 until the engine puts its first row into a batch, and 1
from then on. After an engine's death the front reads there which requests may have killed it.
"""

from __future__ import annotations

import msgspec

WAITING, RUNNING = 0, 1
"""The two values of a mark (one unsigned 32-bit word, little-endian)."""

MARK_BYTES = 64
"""Before a request's first tensor: the mark, and what aligns the tensor behind it."""

INLINE_BYTES = 16 << 10
"""Answers up to so many bytes in all travel in the message itself."""


class Tensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An array in a segment, in the message, or in a client's memory on the device.

    Args:
        name: of the input or output.
        dtype: NumPy's name; ``bfloat16`` for an int16 carrier.
        shape: of the array, contiguous.
        offset: in the segment, in bytes, aligned to 64; -1 if ``data`` holds it.
        data: the bytes, if they are few.
        region: of the device's memory that a client registered; then ``offset`` is in that. Empty for the segment.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = -1
    data: bytes = b""
    region: str = ""


class Target(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where an output is to be written, instead of being sent.

    Args:
        output: its name.
        region: of the device's memory.
        offset: in it, in bytes.
        byte_size: of the place.
    """

    output: str
    region: str
    offset: int
    byte_size: int
