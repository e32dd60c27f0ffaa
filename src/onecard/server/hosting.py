"""The models that a server has: their names, engines and states. They are opened one after the other, off the loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from onecard.errors import UsageError
from onecard.runtime.engine import Engine
from onecard.server.counters import Counters
from onecard.server.http_types import HttpError
from onecard.server.oip_contract import InferContract
from onecard.server.oip_repository import IndexEntry, State

VERSION = "1"
"""Of every model: a server holds one version of each."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}")


@dataclass
class Hosted:
    """One model.

    Args:
        name: in the URL.
        path: of its bundle.
        state: in the protocol's words.
        reason: for the state.
        engine: once it is open.
        contract: likewise.
    """

    name: str
    path: Path
    counters: Counters
    state: State = "LOADING"
    reason: str = ""
    engine: Engine | None = None
    contract: InferContract | None = None

    @property
    def is_ready(self) -> bool:
        return self.state == "READY" and self.engine is not None and self.engine.healthy

    @property
    def entry(self) -> IndexEntry:
        return IndexEntry(self.name, VERSION, self.state, self.reason)


def read_names(words: Iterable[str]) -> dict[str, Path]:
    """Model names and bundles from ``NAME=FOLDER`` or ``FOLDER``, whose name without ``.onecard`` is the model's.

    Raises:
        UsageError: a name that does not fit into a URL, or twice the same.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else word)
        name = name if equals else path.resolve().name.removesuffix(".onecard")
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be a model's name: expected letters, digits, '.', '_' and '-', at most 128.",
                f"Give it one: NAME={path}.",
            )
        if name in found:
            raise UsageError(f"two models are called '{name}'.", f"Give one of them another name: NAME={path}.")
        found[name] = path
    return found


class Hosting:
    """All models of a server.

    Args:
        bundles: folder by name.
        open_engine: opens a bundle; called with its folder and what to tell of every batch.
    """

    def __init__(self, bundles: dict[str, Path], open_engine: Callable[..., Engine]) -> None:
        self._open = open_engine
        self._models = {name: Hosted(name, path, Counters()) for name, path in bundles.items()}

    def open_all(self) -> None:
        """Open every model; blocks.

        Raises:
            OnecardError: one that cannot be opened.
        """
        for model in self._models.values():
            engine = self._open(model.path, on_batch=model.counters.ran)
            model.contract = InferContract(engine.spec)
            model.engine, model.state = engine, "READY"

    def close_all(self, drain_s: float) -> None:
        """Close every engine, answering what waits for so long at most; blocks."""
        for model in self._models.values():
            model.state = "UNLOADING"
            if model.engine is not None:
                model.engine.close(drain_s)

    @property
    def is_ready(self) -> bool:
        return all(model.is_ready for model in self._models.values())

    @property
    def models(self) -> list[Hosted]:
        return list(self._models.values())

    def find(self, name: str, version: str) -> Hosted:
        """A model by name and version; an empty version is the one there is.

        Raises:
            HttpError: 404, there is none.
        """
        model = self._models.get(name)
        if model is None:
            known = ", ".join(self._models)
            raise HttpError(404, f"there is no model '{name[:128]}': this server has {known}.")
        if version not in ("", VERSION):
            raise HttpError(404, f"model '{name}' has no version '{version[:32]}': it has {VERSION}.")
        return model
