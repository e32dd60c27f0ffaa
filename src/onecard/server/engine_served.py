"""The models as the front knows them: what the engine told last, kept over its death, and what is to serve again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from onecard.errors import SpecError
from onecard.ipc.models import ModelOptions, ModelState
from onecard.server.oip_contract import InferContract
from onecard.server.oip_repository import State

RESTARTING = "the engine is being started again"
"""Reason for the state of models that served when their engine died."""


@dataclass(frozen=True)
class ServedModel:
    """One model.

    Args:
        name: in the URL.
        version: that serves, or served last.
        state: in the protocol's words.
        reason: for the state.
        path: of the bundle that serves; empty if none does.
        device: where it runs.
        contract: what requests must satisfy; None if there is nothing to ask it. A model that is being opened again
            after an engine's death keeps it: requests are taken, and wait.
    """

    name: str
    version: str
    state: State
    reason: str
    path: str
    device: str
    contract: InferContract | None


@dataclass(frozen=True)
class Wanted:
    """What to open when there is a new engine.

    Args:
        path: of the bundle that served last.
        options: how it is opened.
        version: to give to it; empty for the engine's own counting.
    """

    path: Path
    options: ModelOptions
    version: str = ""


class ServedModels:
    """All models.

    Attributes:
        table: by name.
        wanted: by name: what was loaded, and not unloaded since.
        recovering: names of those that served when the engine died, and are not open again.
    """

    def __init__(self) -> None:
        self.table: Mapping[str, ServedModel] = {}
        self.wanted: dict[str, Wanted] = {}
        self.recovering: set[str] = set()
        self._loading: Counter[str] = Counter()

    @property
    def is_loading(self) -> bool:
        """Whether a load that was asked for is not over yet."""
        return any(self._loading.values())

    def tell(self, states: Iterable[ModelState]) -> tuple[list[str], dict[str, str]]:
        """Take over what the engine says of all models.

        Returns:
            Names of recovering models that serve again; and of those that cannot, with the reason.
        """
        again: list[str] = []
        failed: dict[str, str] = {}
        table: dict[str, ServedModel] = {}
        for state in states:
            name, old = state.name, self.table.get(state.name)
            if name in self.recovering:
                if state.spec is not None:
                    again.append(name)
                elif state.state == "UNAVAILABLE":
                    failed[name] = state.reason
                elif old is not None:
                    table[name] = dataclasses.replace(old, state="LOADING", reason=RESTARTING)
                    continue
            table[name] = _served(state, old)
            if name in self.wanted and not self._loading[name] and state.state == "READY":
                self._note(name, table[name], self.wanted[name])
        self.recovering.difference_update(again, failed)
        self.table = table | {name: self.table[name] for name in self.recovering if name not in table}
        return again, failed

    def lose(self) -> None:
        """The engine is gone: what served is to serve again."""
        self.recovering = {name for name, model in self.table.items() if model.contract is not None}
        self.table = {
            name: dataclasses.replace(model, state="LOADING", reason=RESTARTING) if name in self.recovering else model
            for name, model in self.table.items()
        }

    def give_up(self, name: str, reason: str) -> None:
        """A recovering model cannot be opened."""
        if name in self.recovering:
            self.recovering.discard(name)
            old = self.table[name]
            gone = ServedModel(name, old.version, "UNAVAILABLE", reason, "", "", None)
            self.table = {**self.table, name: gone}

    def begin_load(self, name: str, wanted: Wanted) -> Callable[[bool], None]:
        """A load is asked for: until it is over, what the engine says of the model is not yet what is wanted.

        Returns:
            To be called when it is over, with whether it opened; then it is wanted from now on.
        """
        self._loading[name] += 1

        def ended(opened: bool) -> None:
            self._loading[name] -= 1
            if not opened:
                return
            model = self.table.get(name)
            told = model is not None and model.path == str(wanted.path)
            self.wanted[name] = dataclasses.replace(wanted, version=model.version) if model and told else wanted

        return ended

    def _note(self, name: str, model: ServedModel, wanted: Wanted) -> None:
        path = Path(model.path) if model.path else wanted.path
        self.wanted[name] = dataclasses.replace(wanted, path=path, version=model.version)


def _served(state: ModelState, old: ServedModel | None) -> ServedModel:
    contract, told, reason = None, state.state, state.reason
    if state.spec is not None:
        known = old.contract if old is not None else None
        if known is not None and (known.spec, known.also) == (state.spec, state.ingest):
            contract = known  # it knows the shapes that clients send
        else:
            try:
                contract = InferContract(state.spec, also=state.ingest)
            except SpecError as error:
                told, reason = "UNAVAILABLE", str(error)
    return ServedModel(state.name, state.version, cast(State, told), reason, state.path, state.device, contract)
