"""The configuration file: what may stand in it, and that the command line and the environment go before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from onecard.errors import OnecardError, UsageError
from onecard.server.config import (
    MODEL_NAME,
    MODEL_OPTIONS,
    ServeConfig,
    config_callback,
    model_options,
    named_bundles,
    read_config,
)
from onecard.server.repository import read_names


def make_app() -> typer.Typer:
    """A command with an option of each kind that ``onecard serve`` has."""
    app = typer.Typer()

    @app.command()
    def serve(  # noqa: PLR0913, PLR0917 - the options are the interface
        ctx: typer.Context,
        bundles: Annotated[list[str] | None, typer.Argument()] = None,
        config: Annotated[
            Path | None, typer.Option(callback=config_callback, is_eager=True, envvar="ONECARD_CONFIG")
        ] = None,
        host: Annotated[str, typer.Option(envvar="ONECARD_HOST")] = "127.0.0.1",
        port: Annotated[int, typer.Option("--http-port", envvar="ONECARD_HTTP_PORT")] = 8000,
        sample: Annotated[float, typer.Option()] = 1.0,
        reload: Annotated[bool, typer.Option("--reload/--no-reload", envvar="ONECARD_RELOAD")] = False,
        tls_key: Annotated[Path | None, typer.Option(envvar="ONECARD_TLS_KEY")] = None,
        allow: Annotated[list[str] | None, typer.Option()] = None,
        max_batch: Annotated[int | None, typer.Option(envvar="ONECARD_MAX_BATCH")] = None,
        max_delay: Annotated[str | None, typer.Option(envvar="ONECARD_MAX_DELAY")] = None,
    ) -> None:
        found = {k: v for k, v in ctx.params.items() if k != "config"}
        found["bundles"] = named_bundles(ctx, bundles)
        found["models"] = {name: model_options(ctx, name) for name in read_names(found["bundles"])}
        print(json.dumps(found, default=str))

    @app.command()
    def other() -> None:
        """So that ``serve`` is a command of its own, as it is in onecard."""

    return app


def serve(*arguments, environment=None):
    """What the command was given; an error of onecard is raised."""
    done = CliRunner().invoke(make_app(), ["serve", *map(str, arguments)], env=environment)
    if isinstance(done.exception, OnecardError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a configuration into a folder that is not the current one."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "etc" / "onecard.toml"

    def write(text):
        path.write_text(text, encoding="utf-8")
        return path

    return write


FULL = """
host = "::"
http-port = 1
sample = 1
reload = true
tls_key = "keys/key.pem"
allow = ["a", "b"]
max-batch = 8

[models]
plain = "plain.onecard"
"dotted.v1" = "/abs/olute"

[models.own]
path = "../own"
max-batch = 4
max_delay = "2ms"
"""


def test_the_file_goes_before_the_defaults(file):
    path = file(FULL)
    found = serve("--config", path)
    assert found == {
        "host": "::", "port": 1, "sample": 1.0, "reload": True, "allow": ["a", "b"], "max_batch": 8, "max_delay": None,
        "tls_key": str(path.parent / "keys/key.pem"),
        "bundles": [
            f"plain={path.parent}/plain.onecard", "dotted.v1=/abs/olute", f"own={path.parent}/../own",
        ],
        "models": {
            "plain": {"max_batch": 8, "max_delay": None},
            "dotted.v1": {"max_batch": 8, "max_delay": None},
            "own": {"max_batch": 4, "max_delay": "2ms"},
        },
    }  # fmt: skip


SAID = {
    "host": ("::", "0.0.0.0", "h"),
    "http-port": (1, 2, 3),
    "max-batch": (8, 9, 10),
    "reload": (True, False, True),
    "tls-key": ("key.pem", "/env", "/line"),
}
PARAMETERS = {"http-port": "port", "max-batch": "max_batch", "tls-key": "tls_key"}


@pytest.mark.parametrize("option", SAID)
@pytest.mark.parametrize("sources", range(8), ids=lambda bits: f"{bits:03b}")
def test_command_line_before_environment_before_file_before_default(file, option, sources):
    in_file, in_environment, on_line = SAID[option]
    parameter = PARAMETERS.get(option, option)
    expected = serve("x=y")[parameter]
    arguments, environment = ["x=y"], {}
    if sources & 1:
        path = file(f"{option} = {json.dumps(in_file)}")
        arguments += ["--config", path]
        expected = str(path.parent / in_file) if option == "tls-key" else in_file
    if sources & 2:
        environment[f"ONECARD_{option.upper().replace('-', '_')}"] = str(in_environment)
        expected = in_environment
    if sources & 4:
        arguments += [f"--{option}"] if option == "reload" else [f"--{option}", on_line]
        expected = on_line
    assert serve(*arguments, environment=environment)[parameter] == expected


def test_what_a_model_has_for_itself_goes_behind_command_line_and_environment(file):
    path = file(FULL)
    assert serve("--config", path, "--max-batch", 9)["models"]["own"] == {"max_batch": 9, "max_delay": "2ms"}
    found = serve("--config", path, environment={"ONECARD_MAX_DELAY": "3ms"})
    assert found["models"]["own"] == {"max_batch": 4, "max_delay": "3ms"}
    assert found["models"]["plain"] == {"max_batch": 8, "max_delay": "3ms"}


def test_bundles_of_the_command_line_replace_the_models_of_the_file(file):
    found = serve("own=elsewhere", "--config", file(FULL))
    assert found["bundles"] == ["own=elsewhere"]
    assert found["models"] == {"own": {"max_batch": 4, "max_delay": "2ms"}}  # its options go with its name


def test_the_environment_names_the_file_and_the_place_of_the_option_does_not_matter(file):
    path = file(FULL)
    assert serve(environment={"ONECARD_CONFIG": str(path)}) == serve("--config", path)
    assert serve("--host", "h", "--config", path) == serve("--config", path, "--host", "h")


def test_an_empty_file_changes_nothing(file):
    assert serve("x=y", "--config", file("")) == serve("x=y")
    assert serve("--config", file(""))["bundles"] == serve()["bundles"] == []
    assert read_config(file("[models]")) == ServeConfig(file("[models]"), {}, ())


def test_all_options_of_a_model(file):
    text = "".join(
        f"{name.replace('_', '-')} = {value}\n"
        for name, value in {
            "device": '"cuda:0"', "p99": '"5ms"', "max_batch": 8, "max_delay": '"2ms"', "timeout": '"1s"',
            "queue_items": 10, "queue_bytes": '"1GiB"', "queue_wait": '"10s"', "device_memory": '"2GiB"',
            "sentinel": 100, "sentinel_device": '"same"', "ingest": '["image=uint8 NHWC"]',
        }.items()
    )  # fmt: skip
    model = read_config(file(f'[models.m]\npath = "b"\n{text}')).model("m")
    assert set(model.options) == set(MODEL_OPTIONS)
    assert (model.options["max_batch"], model.options["p99"]) == (8, "5ms")


WRONG = {
    "unknown option": ("htttp-port = 1", "no option 'htttp-port'", "'http-port'"),
    "unknown option, nothing near": ("q = 1", "no option 'q'", "Expected one of allow, host"),
    "unknown table": ("[model]\na = 'b'", "no option 'model'", "'models'"),
    "the file itself": ("config = 'x'", "no option 'config'", "host"),
    "help": ("help = true", "no option 'help'", "host"),
    "the argument": ("bundles = ['a']", "no option 'bundles'", "host"),
    "a parameter that is no option's name": ("port = 1", "no option 'port'", "'http-port'"),
    "twice": ("http-port = 1\nhttp_port = 2", "'http-port' twice", "Keep one"),
    "text for a number": ("http-port = '1'", "http-port must be a whole number; it is '1'", ""),
    "truth for a number": ("http-port = true", "whole number; it is True", ""),
    "fraction for a whole number": ("http-port = 1.5", "whole number; it is 1.5", ""),
    "number for text": ("max-delay = 2", "text in quotes", "5ms"),
    "number for truth": ("reload = 1", "true or false; it is 1", ""),
    "text for a fraction": ("sample = 'all'", "sample must be a number", ""),
    "truth for a fraction": ("sample = true", "sample must be a number", ""),
    "number for a path": ("tls-key = 1", "a path in quotes", ""),
    "empty path": ("tls-key = ''", "a path in quotes", ""),
    "text for a list": ("allow = 'a'", "allow must be a list", ""),
    "list of others": ("allow = ['a', 1]", "text in quotes", "it is 1"),
    "table for text": ("[host]\na = 1", "host must be text", ""),
    "date for text": ("host = 2020-01-01", "host must be text", ""),
    "models no table": ("models = 'a'", "models must be a table", "NAME"),
    "model is a number": ("[models]\na = 1", "models.a must be the path", "table"),
    "model without path": ("[models.a]\nmax-batch = 1", "models.a.path must be", "it is missing"),
    "model with a dot": ("[models]\na.v1 = 'b'", "models.a.path must be", "it is missing"),
    "model's path": ("[models]\na = ''", "models.a must be a path", ""),
    "model's name": ("[models]\n'a/b' = 'b'", "'a/b' cannot be a model's name", "letters"),
    "model's option": ("[models.a]\npath = 'b'\nmax-bach = 1", "no option 'models.a.max-bach'", "'max-batch'"),
    "server's option": ("[models.a]\npath = 'b'\nhost = 'b'", "no option 'models.a.host'", "path"),
    "model's count": ("[models.a]\npath = 'b'\nmax-batch = 0", "models.a.max-batch must be a whole number", "0"),
    "model's truth": ("[models.a]\npath = 'b'\nmax-batch = true", "models.a.max-batch must be", "True"),
    "model's duration": ("[models.a]\npath = 'b'\np99 = 'soon'", "models.a.p99: 'soon' is not a duration", "5ms"),
    "model's bare number": ("[models.a]\npath = 'b'\np99 = 5", "models.a.p99 must be text in quotes", "5ms"),
    "model's size": ("[models.a]\npath = 'b'\nqueue-bytes = 'x'", "models.a.queue-bytes: 'x' is not a size", "2GiB"),
    "model's option twice": ("[models.a]\npath = 'b'\nmax-batch = 1\nmax_batch = 2", "'models.a.max-batch' twice", ""),
    "no TOML": ("http-port: 1", "is no TOML", "line 1"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes(file, mistake):
    text, said, cure = WRONG[mistake]
    path = file(text)
    with pytest.raises(UsageError) as refused:
        serve("x=y", "--config", path)
    message = str(refused.value)
    assert str(path) in message and said in message and cure in message


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"host = '\xe9'")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n")
    (tmp_path / "deep").write_bytes(b"a = " + b"[" * 100_000)
    for name, said in {
        "latin": "no TOML",
        "large": "1 MiB",
        "deep": "no TOML",
        "none": "No such file",
        ".": "directory",
    }.items():
        with pytest.raises(UsageError, match=said):
            read_config(tmp_path / name)


@pytest.mark.parametrize("name", ["a", "A.b_c-1", "x" * 128, "", "x" * 129, ".a", "-a", "a b", "é", "a/b", "a\n"])
def test_the_names_of_models_are_those_of_the_command_line(name):
    try:
        fits = name in read_names([f"{name}=folder"])
    except UsageError:
        fits = False
    assert bool(MODEL_NAME.fullmatch(name)) == fits
