"""What ``onecard serve`` makes of its options: numbers that cannot be, and how it says how far it is."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from onecard.cli import app
from onecard.errors import OnecardError, StorageError
from onecard.server.serve import ENGINE_COMMAND


@pytest.fixture
def serve(monkeypatch):
    """Calls the command up to where it would serve: what was said, and what the server would be told."""
    told = SimpleNamespace()
    monkeypatch.setattr("onecard.server.serve.run_server", lambda *given: vars(told).update(given=given))
    monkeypatch.setattr("onecard.server.logs.setup_logs", lambda *given: None)

    def call(*words, environment=None):
        told.given = None
        done = CliRunner().invoke(app, ["serve", "m=bundle", *words], env={"COLUMNS": "200", **(environment or {})})
        said = str(done.exception) if isinstance(done.exception, OnecardError) else done.output
        return said, told.given

    return call


WRONG = {
    "http-port": ("99999", "65536", "-1"),
    "grpc-port": ("65536", "-1"),
    "metrics-port": ("65536", "-2"),
    "max-connections": ("0", "-1", "1000000001"),
    "max-batch": ("0", "-1", "1000000001"),
    "queue-items": ("0", "-1", "1000000000000000000000"),
    "sentinel": ("-1", "1000000000000000000000"),
    "workers": ("0", "65"),
    "access-log": ("-0.1", "1.5"),
    "trace-sample": ("-0.1", "1.5"),
    "request-memory": ("1KiB", "1B", "1048575"),
    "answer-memory": ("1KiB", "1B", "1048575"),
}
CASES = [(option, value) for option, values in WRONG.items() for value in values]


@pytest.mark.parametrize("source", ["line", "environment", "file"])
@pytest.mark.parametrize(("option", "value"), CASES)
def test_a_number_that_cannot_be_is_refused_by_its_name(serve, tmp_path, option, value, source):
    words, environment = [], {}
    if source == "line":
        words = [f"--{option}", value]
    elif source == "environment":
        environment[f"ONECARD_{option.upper().replace('-', '_')}"] = value
    else:
        (tmp_path / "c.toml").write_text(f"{option} = {json.dumps(value) if 'memory' in option else value}\n")
        words = ["--config", str(tmp_path / "c.toml")]
    said, given = serve(*words, environment=environment)
    assert given is None
    assert f"--{option}" in said and ("1MiB or more" if "memory" in option else "Invalid value") in said


def test_the_least_and_the_most_are_taken(serve):
    words = ["--http-port", "65535", "--grpc-port", "0", "--metrics-port", "-1", "--max-connections", "1"]
    words += ["--max-batch", "1", "--queue-items", "1000000000", "--access-log", "1", "--sentinel", "0"]
    _, (options, _) = serve(*words, "--request-memory", "1MiB", "--answer-memory", "1048576")
    assert (options.listen.port, options.grpc.port, options.metrics, options.limits.max_connections) == (
        *(65535, 0, None, 1),
    )
    assert (options.client.request_bytes, options.client.answer_bytes) == (1 << 20, 1 << 20)
    policy = options.sources["m"].options.policy
    assert (policy["max_rows"], policy["queue_items"], options.access_log) == (1, 1_000_000_000, 1.0)


def test_the_engine_logs_as_the_server_does(serve):
    _, (options, _) = serve("--log-format", "json", "--log-level", "warning")
    assert options.engine == (*ENGINE_COMMAND, "--log-format", "json", "--log-level", "warning")
    assert (options.workers.log_form, options.workers.log_level) == ("json", "warning")


@pytest.mark.parametrize("form", ["human", "json"])
def test_what_ends_a_server_is_a_record_too(serve, monkeypatch, caplog, form):
    def fail(*given):
        raise StorageError("the disk is full.")

    monkeypatch.setattr("onecard.server.serve.run_server", fail)
    done = CliRunner().invoke(app, ["serve", "m=bundle", "--log-format", form])
    said = [record.getMessage() for record in caplog.records if record.name == "onecard.server"]
    if form == "json":
        assert (done.exit_code, said) == (StorageError.exit_code, ["the disk is full."])
    else:
        assert isinstance(done.exception, StorageError) and not said


def notices(announcer):
    server = SimpleNamespace(sockets=[SimpleNamespace(getsockname=lambda: ("127.0.0.1", 7))])
    contract = SimpleNamespace(spec="x: float32[B]", also=())
    model = SimpleNamespace(name="m", contract=contract, device="cpu")
    announcer.listening(server)
    announcer.listening_grpc(8)
    announcer.listening_metrics(9)
    announcer.ready(SimpleNamespace(client=SimpleNamespace(models={"m": model})))
    announcer.warn("[::] may be reached")


SAID = [
    "listening on 127.0.0.1 port 7",
    "gRPC on port 8",
    "metrics on port 9",
    "ready m: x: float32[B] on cpu",
]


def test_people_read_lines(serve, capsys, monkeypatch):
    _, (_, announcer) = serve()
    monkeypatch.setattr("onecard.cli_serve._err.file", sys.stderr)
    notices(announcer)
    assert capsys.readouterr().err.splitlines() == [*SAID, "warning: [::] may be reached"]


def test_programs_read_records(serve, capsys, caplog):
    _, (_, announcer) = serve("--log-format", "json")
    with caplog.at_level(logging.INFO, "onecard.server"):
        notices(announcer)
    assert [record.getMessage() for record in caplog.records] == [*SAID, "[::] may be reached"]
    assert capsys.readouterr().err == ""
