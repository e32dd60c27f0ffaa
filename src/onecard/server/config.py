"""The configuration file of ``onecard serve``: TOML with the names of the options, and a table of models.

The command's own parameters say which options there are and of what type; only those of a model are listed here. What
the file says becomes the command's defaults, so the command line and the environment go before it.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import typer

from onecard.errors import UsageError
from onecard.server.raw_forms import check_forms
from onecard.units import parse_duration, parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS = "models"
"""The table of models."""

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}")
"""What a model may be called: it stands in the URL."""

MOST_COUNT = 1_000_000_000
"""Of rows, requests or connections: more than any machine holds, and still a number that all of its processes take."""

_MAX_BYTES = 1 << 20
_NOT_IN_FILES = ("config", "help")
_META = "onecard.config"
_Check: TypeAlias = "Callable[[Path, str, Any], None]"  # of the file, the place in it, and the value there
_TYPES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: 'text in quotes, such as the option takes: "5ms", "2GiB", "cpu"',
    Path: 'a path in quotes: "folder/file"',
}


@dataclass(frozen=True)
class ModelConfig:
    """One model of the file.

    Args:
        name: in the URL.
        path: of its bundle, absolute.
        options: those of ``MODEL_OPTIONS`` that it has for itself, under the names of the command's parameters.
    """

    name: str
    path: Path
    options: Mapping[str, str | int | list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ServeConfig:
    """What a configuration file says.

    Args:
        path: of the file, absolute.
        options: values by the options' names with ``_`` for ``-``, as the file has them; not checked yet.
        models: in the file's order.
    """

    path: Path
    options: Mapping[str, Any]
    models: tuple[ModelConfig, ...] = ()

    def model(self, name: str) -> ModelConfig | None:
        return next((model for model in self.models if model.name == name), None)


def read_config(path: Path) -> ServeConfig:
    """Read a file and check its form and its models; which options there are, the command knows.

    Raises:
        UsageError: it cannot be read, is no TOML, or says of a model what cannot be.
    """
    path = path.absolute()
    table = _read_toml(path)
    models = table.pop(MODELS, {})
    if not isinstance(models, dict):
        raise _wrong(path, MODELS, models, 'a table: [models] with lines such as NAME = "path"')
    return ServeConfig(
        path,
        _plain_names(path, "", table),
        tuple(_model(path, name, value) for name, value in models.items()),
    )


def config_callback(ctx: typer.Context, value: Path | None) -> Path | None:
    """For the option ``--config``, which must be eager: makes what the file says the defaults of all other options.

    Args:
        ctx: of the command.
        value: the file, if one is given.

    Raises:
        UsageError: the file cannot be used; the message says why.
    """
    if value is None or ctx.resilient_parsing:
        return value
    config = read_config(value)
    ctx.default_map = {**(ctx.default_map or {}), **option_defaults(config, option_types(ctx))}
    ctx.meta[_META] = config
    return value


def named_bundles(ctx: typer.Context, words: Sequence[str] | None) -> list[str]:
    """``NAME=FOLDER`` of all models: those of the command line, or else those of the file.

    Args:
        ctx: of the command.
        words: what its argument holds, if anything. It cannot be required: the parsers of some versions of typer do not
            ask for the default of an argument that takes any number of words.
    """
    config: ServeConfig | None = ctx.meta.get(_META)
    if words or config is None:
        return list(words or ())
    return [f"{model.name}={model.path}" for model in config.models]


def model_options(ctx: typer.Context, name: str) -> dict[str, Any]:
    """The options of one model: what its own table says, unless the command line or the environment said otherwise.

    Args:
        ctx: of the command, when all its parameters are there.
        name: of the model.

    Returns:
        Value by parameter name, for each of ``MODEL_OPTIONS`` that the command or the model has.
    """
    config: ServeConfig | None = ctx.meta.get(_META)
    model = config.model(name) if config is not None else None
    found = {option: ctx.params[option] for option in MODEL_OPTIONS if option in ctx.params}
    for option, value in (model.options if model is not None else {}).items():
        source = ctx.get_parameter_source(option)
        if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
            found[option] = value
    return found


def option_types(ctx: typer.Context) -> dict[str, tuple[str, Any]]:
    """The options that a file may set: by name, with ``_`` for ``-``, their parameter's name and its Python type."""
    hints = typing.get_type_hints(inspect.unwrap(ctx.command.callback)) if ctx.command.callback else {}
    found = {}
    for parameter in ctx.command.params:
        if parameter.param_type_name != "option" or parameter.name is None:
            continue
        for option in parameter.opts:
            name = option.lstrip("-").replace("-", "_")
            if option.startswith("--") and name not in _NOT_IN_FILES:
                found[name] = (parameter.name, hints.get(parameter.name, str))
    return found


def option_defaults(config: ServeConfig, known: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """What a file says, checked against the options that there are.

    Args:
        config: the file.
        known: by an option's name, its parameter's name and its Python type.

    Returns:
        Value by parameter name; paths are absolute.

    Raises:
        UsageError: an option that is not known, or a value of another type.
    """
    found = {}
    for name, value in config.options.items():
        if name not in known:
            raise _unknown(config.path, "", name, (*known, MODELS))
        parameter, hint = known[name]
        found[parameter] = _checked(config.path, _dashed(name), value, hint)
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UsageError(f"{path} has more than {_MAX_BYTES >> 20} MiB, which no configuration needs.")
        return tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"the configuration {path} cannot be read: {error.strerror or error}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {error}.", 'Write lines such as: http-port = 8000, host = "::1".') from (
            error
        )


def _plain_names(path: Path, table: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values by names with ``_`` for ``-``; either may be written."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        plain = name.replace("-", "_")
        if plain in found:
            raise UsageError(f"{path} says '{table}{_dashed(plain)}' twice, with '-' and with '_'.", "Keep one.")
        found[plain] = value
    return found


def _checked(path: Path, place: str, value: Any, hint: Any) -> Any:
    """A value of the type that a parameter's annotation asks for."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if typing.get_origin(hint) is list:
        (element,) = typing.get_args(hint)
        if not isinstance(value, list):
            raise _wrong(path, place, value, f"a list of which each is {_TYPES.get(element, _TYPES[str])}")
        return [_checked(path, place, each, element) for each in value]
    if not isinstance(hint, type) or issubclass(hint, enum.Enum) or hint not in _TYPES:
        hint = str  # choices are named in text
    accepted = {float: (int, float), Path: (str,)}.get(hint, (hint,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise _wrong(path, place, value, _TYPES[hint])
    return _absolute(path, place, value) if hint is Path else value


def _absolute(path: Path, place: str, value: str) -> Path:
    """A path of the file, which is relative to the file and not to where the command was called."""
    if not value or "\0" in value:
        raise _wrong(path, place, value, _TYPES[Path])
    return path.parent / value


def _model(path: Path, name: str, value: Any) -> ModelConfig:
    place = f"{MODELS}.{name}"
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(
            f"{path}: '{name}' cannot be a model's name: expected letters, digits, '.', '_' and '-', at most 128.",
            "One with a '.' stands in quotes.",
        )
    if isinstance(value, str):
        return ModelConfig(name, _absolute(path, place, value))
    if not isinstance(value, dict):
        raise _wrong(path, place, value, 'the path of its bundle in quotes, or a table with path = "..."')
    options = _plain_names(path, f"{place}.", value)
    bundle = options.pop("path", None)
    if not isinstance(bundle, str):
        raise _wrong(path, f"{place}.path", bundle, "the path of the model's bundle, in quotes")
    for option, given in options.items():
        if option not in MODEL_OPTIONS:
            raise _unknown(path, f"{place}.", option, (*MODEL_OPTIONS, "path"))
        MODEL_OPTIONS[option](path, f"{place}.{_dashed(option)}", given)
    return ModelConfig(name, _absolute(path, f"{place}.path", bundle), options)


def _text(path: Path, place: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(path, place, value, _TYPES[str])


def _count(path: Path, place: str, value: Any) -> None:
    _whole(path, place, value, 1)


def _count_or_none(path: Path, place: str, value: Any) -> None:
    _whole(path, place, value, 0)


def _whole(path: Path, place: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_COUNT:
        raise _wrong(path, place, value, f"a whole number from {least} to {MOST_COUNT}")


def _raw_forms(path: Path, place: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(path, place, value, 'a list of texts in quotes, such as ["image=uint8 NHWC"]')
    try:
        check_forms(value, ())
    except UsageError as error:
        raise UsageError(f"{path}: {place}: {error.message}", error.cure) from error


def _quantity(parse: Callable[[str], float]) -> _Check:
    def check(path: Path, place: str, value: Any) -> None:
        _text(path, place, value)
        try:
            parse(value)
        except UsageError as error:
            raise UsageError(f"{path}: {place}: {error.message}", error.cure) from error

    return check


MODEL_OPTIONS: Mapping[str, _Check] = {
    "device": _text,
    "p99": _quantity(parse_duration),
    "max_batch": _count,
    "max_delay": _quantity(parse_duration),
    "timeout": _quantity(parse_duration),
    "queue_items": _count,
    "queue_bytes": _quantity(parse_size),
    "queue_wait": _quantity(parse_duration),
    "device_memory": _quantity(parse_size),
    "ingest": _raw_forms,
    "sentinel": _count_or_none,
    "sentinel_device": _text,
}
"""What a model can have for itself, and what checks it."""


def _wrong(path: Path, place: str, value: Any, expected: str) -> UsageError:
    given = "missing" if value is None else repr(value)[:80]
    return UsageError(f"{path}: {place} must be {expected}; it is {given}.")


def _unknown(path: Path, table: str, name: str, known: Iterable[str]) -> UsageError:
    names = sorted(map(_dashed, known))
    near = difflib.get_close_matches(_dashed(name), names, n=1)
    cure = f"Did you mean '{near[0]}'?" if near else f"Expected one of {', '.join(names)}."
    return UsageError(f"{path}: there is no option '{table}{_dashed(name)}'.", cure)


def _dashed(name: str) -> str:
    """An option as it is written on the command line."""
    return name.replace("_", "-")
