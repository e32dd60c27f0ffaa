"""A callable named by text: ``package.module:callable`` or ``path/to/file.py:callable``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from onecard.errors import ModelError, UsageError

_EXAMPLE = "Write it like 'package.module:callable' or 'path/to/file.py:callable'."


def resolve_callable(reference: str) -> Callable[..., Any]:
    """Import what a user's reference names.

    The folder of a file, and the working folder for a module, are appended to ``sys.path`` and stay there:
    the user's code imports its neighbours, perhaps only when it is called.

    Args:
        reference: the module or file, a colon, and the name in it (with dots for an attribute of a class).

    Returns:
        The callable itself; it has not been called.

    Raises:
        UsageError: the text cannot be read, or the module, file or name is not there; close ones are named.
        ModelError: importing the module failed.
    """
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"cannot read the reference '{reference}'.", _EXAMPLE)
    is_file = source.endswith(".py")
    module = _load_file(Path(source)) if is_file else _load_module(source)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"'{source}' has no '{name}'.", _suggest(name, _callables(module)))
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"'{reference}' is a {type(found).__name__}, which cannot be called.", _EXAMPLE)
    return found  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        folder = path.parent
        near = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        raise UsageError(f"there is no file '{path}'.", _suggest(path.name, near))
    path = path.resolve()
    # One name per file: two users' "model.py" must not be taken for one another.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"cannot import '{path}'.")
    module = importlib.util.module_from_spec(spec)
    _append_to_path(path.parent)
    sys.modules[name] = module  # dataclasses and type hints look their own module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(str(path), error) from error
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"'{name}' is neither a module nor a file that ends in .py.", _EXAMPLE)
    _append_to_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            near = [p.stem for p in Path.cwd().glob("*.py")] + list(sys.modules)
            raise UsageError(f"there is no module '{error.name}'.", _suggest(name, near)) from error
        raise _import_failed(name, error) from error
    except Exception as error:
        raise _import_failed(name, error) from error


def _import_failed(source: str, error: Exception) -> ModelError:
    return ModelError(
        f"importing '{source}' failed with {type(error).__name__}: {error}.",
        "Mend it until 'python -c' can import it.",
    )


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end: a user's file must not hide an installed package


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _suggest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"It has: {', '.join(sorted(names)[:10])}." if 0 < len(names) <= 50 else ""  # noqa: PLR2004 - a screen
