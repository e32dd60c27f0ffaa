"""In which order candidates are built, and how many at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from onecard.evidence import Verdict
from onecard.recipe import Recipe


class BuildQueue:
    """Several builds side by side; what ran out of memory beside others is built once more, alone.

    A build runs the model, so two of a large batch may need more than the device has where each of them fits.

    Args:
        recipes: what to build, in this order.
        width: how many at a time.
    """

    def __init__(self, recipes: Iterable[Recipe], width: int) -> None:
        self._width = width
        self._waiting = deque(recipes)
        self._alone: deque[Recipe] = deque()
        self._running: dict[str, bool] = {}  # and whether another ran beside it

    def next(self) -> Recipe | None:
        """What to start now; None where all places are taken or nothing waits. The caller starts it."""
        if len(self._running) >= (self._width if self._waiting else 1):
            return None
        queue = self._waiting or self._alone
        if not queue:
            return None
        recipe = queue.popleft()
        self._running[recipe.id] = False
        if len(self._running) > 1:
            self._running = dict.fromkeys(self._running, True)
        return recipe

    def ended(self, recipe: Recipe, verdict: Verdict) -> bool:
        """Note the end of a build; False where its verdict does not count, because it will be built again."""
        crowded = self._running.pop(recipe.id)
        if verdict.reason == "out_of_memory" and crowded:
            self._alone.append(recipe)
            return False
        return True
