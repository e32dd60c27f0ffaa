"""The bench a compression works at: representative rows, the judge of each trial, and the record of what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from onecard.errors import Unsupported
from onecard.evidence import Compression
from onecard.spec import Spec

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Named inputs to named outputs, both on the bench's device."""

NO_ROWS_CURE = "Pass representative inputs with --calibration FILE (or labelled ones with --data FILE)."


@dataclass(frozen=True)
class Judgement:
    """How far a trial is from the original, and whether that passes.

    ``error`` is the relative L2 of its answers over all judged rows, ``metric`` the task's figure or None.
    """

    error: float
    metric: float | None
    passed: bool


@dataclass(frozen=True)
class Bench:
    """All that a compression may use.

    Args:
        spec: of the model.
        device: where module and rows are run.
        inputs: example inputs on the device.
        calibration: input name to rows ``[N, ...]`` on the CPU, or None.
        judge: runs a trial on the judged rows; None where there are no rows at all.
        alternatives: folder of the programs that take the original's place (``pruned.pt2``, ``qat.pt2``).
        work: a folder for files that do not ship.
        progress: called with a few words on what is going on.
        record: called once with what the compression came to.
        deadline: of :func:`time.monotonic`, after which nothing more is tried.
        memo: what the artifacts of one variant share: a scheme is settled once, not for every bucket.
    """

    spec: Spec
    device: str
    inputs: Mapping[str, Tensor]
    calibration: Mapping[str, Tensor] | None = None
    judge: Callable[[Run], Judgement] | None = None
    alternatives: Path | None = None
    work: Path | None = None
    progress: Callable[[str], None] = lambda text: None
    record: Callable[[Compression], None] = lambda found: None
    deadline: float = math.inf
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def rows(self) -> int:
        """How many calibration rows there are."""
        return len(next(iter(self.calibration.values()))) if self.calibration else 0

    def batches(self, size: int = 0) -> Iterator[dict[str, Tensor]]:
        """The calibration rows in order, on the device, in batches that the model takes.

        Args:
            size: rows a batch; 0 means as many as the spec allows, up to 32.

        Raises:
            Unsupported: there are none.
        """
        if not self.calibration:
            raise Unsupported("a static scale needs representative inputs, and none were given", NO_ROWS_CURE)
        step = max(self.smallest_batch, min(size or _BATCH, self.largest_batch))
        for low in range(0, self.rows, step):
            part = {name: rows[low : low + step] for name, rows in self.calibration.items()}
            if len(next(iter(part.values()))) < self.smallest_batch:
                return
            yield {name: rows.to(self.device) for name, rows in part.items()}

    @property
    def is_late(self) -> bool:
        """True once the deadline has passed."""
        return time.monotonic() > self.deadline

    @property
    def largest_batch(self) -> int:
        """The most rows that one call takes."""
        batch = self.spec.batch_symbol
        return self.spec.symbols[batch].high if batch else self._fixed

    @property
    def smallest_batch(self) -> int:
        """The fewest rows that one call takes."""
        batch = self.spec.batch_symbol
        return self.spec.symbols[batch].low if batch else self._fixed

    @property
    def _fixed(self) -> int:
        first = self.spec.inputs[0].shape[0] if self.spec.inputs[0].shape else 1
        return first if isinstance(first, int) else 1


_BATCH = 32
