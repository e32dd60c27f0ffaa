"""Models that a function makes: ``package.module:callable`` or ``path/file.py:callable``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from onecard.errors import ModelError, OnecardError
from onecard.models.assemble import assemble
from onecard.models.model import Model, Origin
from onecard.models.request import Request
from onecard.models.weights import load_strictly, read_checkpoint
from onecard.models.wording import what_it_did

_FORM = "Write it like 'package.module:callable' or 'path/file.py:callable'."


def load(reference: str, request: Request) -> Model:
    """Call the function and make a model of the module it returns.

    If the user gives no inputs, ``example_inputs`` of the module, or else of the file, says what it takes: a
    tuple of positional or a dict of keyword arguments, or a function that returns one.

    Raises:
        ModelError: the module, file or function does not exist, raises, or returns no ``nn.Module``.
    """
    place, _, name = reference.rpartition(":")
    code = import_place(place)
    module = call_factory(code, name, reference)
    if request.weights is not None:
        load_strictly(module, read_checkpoint(request.weights), request.weights)
    if not request.inputs and not request.has_examples:
        request = _with_examples(request, module, code, reference)
    files: dict[str, Path] = {}
    digest = ""
    if place.endswith(".py"):
        files["factory.py"] = Path(place)
        digest = hashlib.sha256(Path(place).read_bytes()).hexdigest()
        reference = f"{Path(place).name}:{name}"
    return assemble(reference, module, Origin("factory", reference, digest), request, files=files)


def import_place(place: str) -> ModuleType:
    """Import a dotted module, or run a ``.py`` file as one.

    Raises:
        ModelError: it does not exist or raises while it is imported.
    """
    if not place:
        raise ModelError("the model reference names no module before the colon.", _FORM)
    try:
        if place.endswith(".py"):
            return _import_file(Path(place))
        _allow_working_directory(place)
        return importlib.import_module(place)
    except OnecardError:
        raise
    except ModuleNotFoundError as error:
        raise ModelError(
            f"cannot import '{place}': there is no module '{error.name}'.",
            "Install its package, or give the file itself: path/file.py:callable.",
        ) from error
    except SystemExit as error:  # a script that reads its arguments, say
        raise ModelError(
            f"importing '{place}' {what_it_did(error)}.",
            "Keep what a script does under if __name__ == '__main__'.",
        ) from error
    except Exception as error:  # the user's own code
        raise ModelError(
            f"importing '{place}' {what_it_did(error)}.", "Run it with python to see the whole traceback."
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"the model file {path} does not exist.", _FORM)
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"onecard_factory_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} cannot be imported as Python.", _FORM)
    code = importlib.util.module_from_spec(spec)
    sys.modules[name] = code  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(code)
    except BaseException:
        del sys.modules[name]
        raise
    return code


def _allow_working_directory(place: str) -> None:
    """A console script has no working directory on its path; ``python -m`` has, and users expect it."""
    here = os.getcwd()
    top = Path(here, place.partition(".")[0])
    if (top.is_dir() or top.with_suffix(".py").is_file()) and here not in sys.path:
        sys.path.append(here)


def call_factory(code: ModuleType, name: str, reference: str) -> nn.Module:
    """Call a function of a module without arguments and check what it returns.

    Raises:
        ModelError: there is no such function, it raises, or it returns no ``nn.Module``.
    """
    factory: Any = code
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        callables = [n for n, value in vars(code).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(name, callables, 3, 0.5) or callables[:5]
        raise ModelError(
            f"'{reference}' names no callable: there is none called '{name}'.",
            f"Is it one of {', '.join(near)}?" if near else _FORM,
        )
    if isinstance(factory, nn.Module):
        return factory
    try:
        module = factory()
    except (Exception, SystemExit) as error:  # the user's own code
        raise ModelError(
            f"calling {reference} {what_it_did(error)}.", "It must take no arguments and return the model."
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{reference} returned a {type(module).__name__}, expected a torch.nn.Module.",
            "Return the model itself from that function.",
        )
    return module


def _with_examples(request: Request, module: nn.Module, code: ModuleType, reference: str) -> Request:
    examples = getattr(module, "example_inputs", None)
    examples = getattr(code, "example_inputs", None) if examples is None else examples
    if callable(examples):
        try:
            examples = examples()
        except (Exception, SystemExit) as error:  # the user's own code
            raise ModelError(
                f"example_inputs of {reference} {what_it_did(error)}.", "Or give --input instead."
            ) from error
    if examples is None:
        return request
    if isinstance(examples, Mapping):
        return replace(request, example_kwargs=dict(examples))
    if isinstance(examples, tuple | list):
        return replace(request, example_args=tuple(examples))
    return replace(request, example_args=(examples,))
