"""A recipe: which transforms and which backend, as data. Its id is its whole name."""

from __future__ import annotations

import msgspec

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "autocast_fp16", "autocast_bf16")
"""The arithmetic of what is not compressed."""

COMPRESSIONS = (
    "int8_weights",
    "fp8",
    "fp8_tensor",
    "fp8_static",
    "int8_dynamic",
    "int8",
    "int4_weights",
    "qat",
    "sparse24",
    "unstructured",
    "pruned",
)
"""The transforms that lose something of the model itself, from the finest to the coarsest."""


class Recipe(msgspec.Struct, frozen=True):
    """How to run a model: transforms in order, then one backend with its mode.

    Args:
        backend: a key of :data:`onecard.backends.BACKENDS`.
        mode: the backend's own variation (``trace`` or ``script``, ``cuda`` ...), or empty.
        transforms: keys of :data:`onecard.transforms.TRANSFORMS`, applied from left to right.
        static: True where one artifact is built per bucket, False where one serves the whole range.
    """

    backend: str
    mode: str = ""
    transforms: tuple[str, ...] = ()
    static: bool = False

    @property
    def id(self) -> str:
        """The name that stands in tables, folders and ``--recipe``: ``inductor+fp16+channels_last``."""
        head = f"{self.backend}.{self.mode}" if self.mode else self.backend
        return "+".join([head, *self.transforms]) + ("@bucket" if self.static else "")

    @property
    def precision(self) -> str:
        """The arithmetic its answers come from, one of :data:`PRECISIONS`."""
        return next((t for t in (*self.transforms, self.mode) if t in PRECISIONS), "fp32")

    @property
    def compressions(self) -> tuple[str, ...]:
        """Those of its transforms that lose something of the model, in order."""
        return tuple(t for t in self.transforms if t in COMPRESSIONS)

    @property
    def tolerance(self) -> str:
        """Whose threshold its answers are held to: its coarsest compression, or else its precision."""
        return max(self.compressions, key=COMPRESSIONS.index) if self.compressions else self.precision


ORIGINAL = Recipe("eager")
"""The model as it came: fp32, eager, inference mode. Every other recipe is compared with it."""
