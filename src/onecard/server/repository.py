"""The bundles that a server may load, by the names that its clients use; a client never names a path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onecard.errors import UsageError
from onecard.ipc.models import ModelOptions
from onecard.server.config import MODEL_NAME
from onecard.server.http_types import HttpError

MANIFEST = "onecard.json"
SUFFIX = ".onecard"


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and how it is opened.

    Args:
        path: of its bundle.
        options: for the engine.
    """

    path: Path
    options: ModelOptions = field(default_factory=ModelOptions)


def is_name(text: str) -> bool:
    """Whether something can be a model's name in a URL."""
    return MODEL_NAME.fullmatch(text) is not None


def read_names(words: Iterable[str]) -> dict[str, Path]:
    """Model names and bundles from ``NAME=FOLDER`` or ``FOLDER``, whose name without ``.onecard`` is the model's.

    Raises:
        UsageError: a name that does not fit into a URL, or twice the same.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else word)
        name = name if equals else path.resolve().name.removesuffix(SUFFIX)
        if not is_name(name):
            raise UsageError(
                f"'{name}' cannot be a model's name: expected letters, digits, '.', '_' and '-', at most 128.",
                f"Give it one: NAME={path}.",
            )
        if name in found:
            raise UsageError(f"two models are called '{name}'.", f"Give one of them another name: NAME={path}.")
        found[name] = path
    return found


class Repository:
    """What may be loaded: bundles that the server was told of, and those in a folder.

    Args:
        sources: by name.
        folder: whose bundles may be loaded too, ``NAME.onecard`` or ``NAME`` each; None for no such folder.
        options: for bundles of the folder.
    """

    def __init__(
        self, sources: Mapping[str, Source], folder: Path | None = None, options: ModelOptions | None = None
    ) -> None:
        self.sources = dict(sources)
        self.folder = folder
        self._options = options or ModelOptions()

    def names(self) -> list[str]:
        """All that could be loaded now."""
        found = dict.fromkeys(self.sources)
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                name = path.name.removesuffix(SUFFIX)
                if is_name(name) and self._is_bundle(path):
                    found.setdefault(name)
        return list(found)

    def find(self, name: str) -> Source:
        """Where a model of this name is loaded from.

        Raises:
            HttpError: 404, there is none.
        """
        if name in self.sources:
            return self.sources[name]
        if self.folder is not None and is_name(name):
            for path in (self.folder / f"{name}{SUFFIX}", self.folder / name):
                if self._is_bundle(path):
                    return Source(path, self._options)
        raise HttpError(404, f"there is no model '{name[:128]}' to load: there are {', '.join(self.names())}.")

    def _is_bundle(self, path: Path) -> bool:
        """Whether a bundle lies there, and not elsewhere behind a link."""
        assert self.folder is not None
        inside = path.resolve().is_relative_to(self.folder.resolve())
        return inside and (path / MANIFEST).is_file()
