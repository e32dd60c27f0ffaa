"""A request as the scheduler sees it, and the batches that are made of them. No tensor is looked at here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

Lengths = tuple[int, ...]
"""The sizes of a spec's symbols but the batch's, in the spec's order; ``()`` where there is no other."""


@dataclass(eq=False, slots=True)
class Work:
    """What one caller asked for and is waiting for.

    Args:
        rows: of its inputs along the batch dimension; 1 where the model has none.
        lengths: the sizes of its other symbols.
        nbytes: of its inputs.
        arrived: when it came, in seconds of ``time.monotonic``.
        deadline: after this moment of the same clock its answer is of no use; ``inf`` if there is none.
        priority: 0 is served first; a larger number waits for all that is smaller.
        client: whose it is; clients of one priority share the card evenly.
        request: the engine's own: inputs, the future, what is answered already.
        taken: rows from the first on that were put into batches so far, those put back since included.
        gone: cancelled, expired or failed: its rows that are still queued are not run.
        queued: rows that wait for a batch, those put back included; the batcher's own, as all below.
        kind: its class of lengths.
        row_s: predicted device seconds of one of its rows, when it was put.
        place: of its first rows among all that ever were in a batch; -1 before.
    """

    rows: int
    lengths: Lengths = ()
    nbytes: int = 0
    arrived: float = 0.0
    deadline: float = math.inf
    priority: int = 0
    client: str = ""
    request: Any = None
    taken: int = 0
    gone: bool = False
    queued: int = 0
    kind: Any = None
    row_s: float = 0.0
    place: int = -1

    @property
    def left(self) -> int:
        """Rows that no batch has taken yet."""
        return self.rows - self.taken


class Slice(NamedTuple):
    """Some consecutive rows of one request, in a batch."""

    work: Work
    start: int
    rows: int


@dataclass(eq=False, slots=True)
class Batch:
    """Rows that run together.

    Args:
        slices: whose they are, in the order of the batch's rows.
        rows: altogether, without padding.
        lengths: of the longest in each symbol.
        size: what it is run at, padding included: one size for every symbol of the spec.
    """

    slices: list[Slice]
    rows: int
    lengths: Lengths
    size: dict[str, int]
