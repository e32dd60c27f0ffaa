"""What the engine's guard tells fronts in other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from onecard.errors import OnecardError


class OtherFronts(Protocol):
    """Fronts in other processes, with connections of their own to the engine; what only the guard knows is told them.

    Nothing of this may raise.
    """

    @property
    def answered(self) -> int:
        """Requests that engines have answered to them."""
        ...

    def engine_listens(self, socket: Path) -> None:
        """There is an engine."""
        ...

    def engine_died(self) -> None:
        """It is dead, surely."""
        ...

    def engine_recovered(self, seconds: float) -> None:
        """So long after that the first model serves again."""
        ...

    def gave_up(self, name: str, error: OnecardError) -> None:
        """A model that served cannot be opened again."""
        ...
