"""What a pruning is told, and what it tells while it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from onecard.errors import UsageError
from onecard.training.importance import CRITERIA
from onecard.training.loop import TrainOptions, TrainProgress
from onecard.verify.metrics import get_metric


@dataclass(frozen=True)
class PruneOptions:
    """How to prune.

    Args:
        criterion: one of :data:`onecard.training.importance.CRITERIA`.
        steps: in how many steps the target is approached; without training data there is one.
        round_to: channels are left in multiples of it.
        keep: globs of layers that lose no output channels.
        training: the fine-tuning; its ``epochs`` are the last step's, the others have a quarter of them.
        metric: the task's, for rows with labels.
        max_drop: how far the yardstick's figure may fall; None lets it fall.
        accept_closest: write what comes closest where the target cannot be met.
        fresh: forget what an interrupted pruning left.
    """

    criterion: str = "magnitude"
    steps: int = 3
    round_to: int = 8
    keep: tuple[str, ...] = ()
    training: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=4, learning_rate=5e-4))
    metric: str = ""
    max_drop: float | None = None
    accept_closest: bool = False
    fresh: bool = False

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: a figure is out of its range, or a name is unknown.
        """
        self.training.check()
        if self.criterion not in CRITERIA:
            raise UsageError(f"unknown criterion '{self.criterion}': expected one of {', '.join(CRITERIA)}.")
        if self.steps < 1:
            raise UsageError(f"--steps is {self.steps}, expected 1 or more.")
        if self.round_to < 1:
            raise UsageError(f"--round-to is {self.round_to}, expected 1 or more.", "8 suits most cards.")
        if self.max_drop is not None and not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise UsageError(f"--max-drop is {self.max_drop}, expected 0 or more.")
        if self.metric:
            get_metric(self.metric)


@dataclass(frozen=True)
class PruneProgress:
    """Where the pruning is: what is going on, in which step of how many, and the fine-tuning's own progress."""

    what: str
    step: int
    steps: int
    train: TrainProgress | None = None
