"""``onecard monitor``: its figures, what it draws, and the command against a real server."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from onecard import cli_monitor
from onecard.errors import DataError, UsageError
from onecard.telemetry.histogram import Distribution
from onecard.telemetry.monitor_client import StateClient, UnreachableError
from onecard.telemetry.monitor_figures import Watch, model_point, sparkline
from onecard.telemetry.monitor_view import show
from onecard.telemetry.snapshot import ModelFigures, ServerFigures, Snapshot
from tests.services.console_server import P50_S, P90_S, P99_S, Scene, console_server

pytestmark = pytest.mark.timeout(200)
URL = "http://127.0.0.1:8000"
_COMMAND = (
    "import sys, typer; from onecard.cli_monitor import register; app = typer.Typer(); register(app);"
    "sys.exit(app(standalone_mode=False))"
)


def snapshot(time_s: float, requests: int, started_s: float = 1.0, **changes: object) -> Snapshot:
    """Of one model that answered so many requests, all of them within 1 to 2 ms."""
    latency = Distribution((0.001, 0.002, 0.004), (0, requests, 0, 0), 0.0015 * requests)
    model = ModelFigures(
        name="m", version="1", requests=requests, rows=2 * requests, failures={"deadline": requests // 10},
        histograms={"request_s": latency},
    )  # fmt: skip
    return Snapshot(
        time_s=time_s, server=ServerFigures(started_s=started_s), models=(msgspec.structs.replace(model, **changes),)
    )


def drawn(watch: Watch, width: int = 120, trouble: str = "") -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(show(watch, URL, width, trouble))
    return console.file.getvalue()  # type: ignore[attr-defined]


def run(*words: str) -> tuple[int, str]:
    """Exit code and output of the command; errors of onecard come as they are."""
    app = typer.Typer()
    cli_monitor.register(app)
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def url(scene: Scene) -> Iterator[str]:
    with console_server(scene) as port:
        yield f"http://127.0.0.1:{port}"


def test_rates_and_percentiles_are_of_what_came_between() -> None:
    now, past = snapshot(20.0, 300).models[0], snapshot(10.0, 100).models[0]
    point = model_point(now, past, 10.0)
    assert (point.requests_per_s, point.rows_per_s, point.failures_per_s) == (20.0, 40.0, 2.0)
    assert (point.p50_s, point.p99_s) == pytest.approx((0.0015, 0.00199))


def test_window_is_the_last_seconds() -> None:
    watch = Watch()
    for second in range(20):
        watch.add(snapshot(second, 100 * min(second, 10)))  # a hundred a second, and then none
    model = watch.newest.models[0]
    rates = [point.requests_per_s for point in watch.points(model)]
    assert math.isnan(rates[0])
    assert rates[1:11] == [100.0] * 10
    assert rates[-1] == 0.0
    assert math.isnan(watch.points(model)[-1].p50_s), "nothing was asked in the window"


@pytest.mark.parametrize(
    "after", [snapshot(3.0, 5, started_s=2.5), snapshot(3.0, 5), snapshot(0.5, 500), snapshot(60.0, 500)]
)
def test_differences_begin_anew_after_a_restart_or_a_silence(after: Snapshot) -> None:
    watch = Watch()
    for earlier in (snapshot(1.0, 100), snapshot(2.0, 200), after):
        watch.add(earlier)
    assert math.isnan(watch.points(watch.newest.models[0])[-1].requests_per_s)


def test_models_come_and_go() -> None:
    watch = Watch()
    watch.add(snapshot(1.0, 100))
    watch.add(snapshot(2.0, 100, name="other"))
    watch.add(snapshot(3.0, 150, name="other"))
    assert [point.requests_per_s for point in watch.points(watch.newest.models[0])][1:] == [50.0]


def test_sparkline_has_its_width_and_its_heights() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, math.nan, 2], 5) == "  ▅ █"
    assert sparkline([0.5], 1, top=1.0) == "▅"
    assert sparkline([0, 0], 2) == "▁▁"
    assert sparkline([], 3) == "   "


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_view_fits_the_terminal(width: int) -> None:
    scene, watch = Scene(models=("resnet50", "a-long-name-" * 8)), Watch()
    for second in range(3):
        watch.add(msgspec.structs.replace(scene.snapshot(), time_s=second))
    lines = drawn(watch, width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(word in text for word in ("resnet50", "requests", "p50", "p99", "waiting", "NVIDIA H200", "GiB"))
    assert ("variant" in text) == (width == 200)


def test_view_says_what_is_wrong_and_shows_text_of_the_server_as_text() -> None:
    watch = Watch()
    reason = "[bold]no[/] variant\x1b[2J can run"
    changed = snapshot(1.0, 1, state="UNAVAILABLE", reason=reason)
    watch.add(
        msgspec.structs.replace(changed, server=ServerFigures(ready=False), card={"name": "c", "lost": "fell off"})
    )
    text = drawn(watch, trouble="no server answers")
    assert "not ready" in text and "unavailable" in text and "no server answers" in text
    assert "[bold]no[/] variant can run" in text and "\x1b" not in text
    assert "cannot be reached: fell off" in text
    watch.add(Snapshot(time_s=2.0))
    assert "no model is loaded" in drawn(watch)


def test_once_prints_one_table_of_two_samples(scene: Scene, url: str) -> None:
    scene.speed = 20.0
    code, output = run(url, "--once", "--interval", "500ms")
    assert code == 0
    row = next(line for line in output.splitlines() if line.startswith("resnet50"))
    assert f"{P50_S * 1e3:.2f} ms" in row and f"{P90_S * 1e3:.2f} ms" in row and f"{P99_S * 1e3:.1f} ms" in row
    assert "NVIDIA H200" in output and "\x1b" not in output


def test_json_is_one_snapshot(url: str) -> None:
    code, output = run(url, "--json")
    found = json.loads(output)
    assert code == 0
    assert [model["name"] for model in found["models"]] == ["resnet50", "sentiment"]


def test_address_may_lack_its_scheme_and_end_in_a_slash(url: str) -> None:
    assert StateClient(url.removeprefix("http://") + "/").snapshot().server.version == "0.1.0"


@pytest.mark.parametrize("address", ["ftp://x", "http://", "http://x:port", "http://x?y", "http://[::1"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match="cannot read the address"):
        StateClient(address)


def test_nobody_there_is_said_with_a_cure() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match=r"no server answers at .*: Connection refused") as caught:
            run(f"http://127.0.0.1:{free.getsockname()[1]}", "--once")
    assert "onecard serve" in caught.value.cure


def test_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = StateClient(f"http://127.0.0.1:{silent.getsockname()[1]}", limit_s=0.2)
        with pytest.raises(UnreachableError, match="timed out"):
            client.ask()


def test_token_is_sent_and_its_want_explained(scene: Scene, url: str, tmp_path: Path) -> None:
    scene.token = "0123456789abcdef"
    with pytest.raises(UsageError, match=r"\(401\): this needs the inference token") as caught:
        run(url, "--once")
    assert "--auth-token-file" in caught.value.cure
    file = tmp_path / "token"
    file.write_text(scene.token)
    file.chmod(0o600)
    assert run(url, "--json", "--auth-token-file", str(file))[0] == 0


def test_other_refusals_are_the_servers_own_words(scene: Scene, url: str) -> None:
    scene.status = 503
    with pytest.raises(UsageError, match=r"\(503\): the state is not told just now"):
        run(url, "--once")
    with pytest.raises(UsageError, match="has no /v2/onecard/state"):
        run(f"{url}/elsewhere", "--json")


def test_something_else_than_a_state_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DataError, match="not the state of an onecard server"):
            StateClient(f"http://127.0.0.1:{listener.getsockname()[1]}").snapshot()
        thread.join(60)


def test_interval_must_be_a_time(url: str) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        run(url, "--once", "--interval", "0s")


def test_lines_where_there_is_no_terminal_and_a_quiet_end(url: str) -> None:
    command = [sys.executable, "-c", _COMMAND, url, "--interval", "100ms"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert "resnet50 ready: " in line and "p99" in line
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_terminal_shows_a_server_that_goes_and_comes_back(scene: Scene) -> None:
    ours, theirs = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        with console_server(scene) as port:
            command = [sys.executable, "-c", _COMMAND, f"127.0.0.1:{port}", "--interval", "100ms"]
            environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
            process = stack.enter_context(
                subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
            )
            stack.callback(process.kill)
            os.close(theirs)
            read_until(ours, "18.0 ms")
        read_until(ours, "no server answers")
        with console_server(scene, port):
            read_until(ours, "ready", without="no server answers")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr is not None and process.stderr.read() == b""


def read_until(terminal: int, text: str, without: str = "\0", limit_s: float = 60.0) -> None:
    """Read what is drawn until one piece of it has a text, and lacks another."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        piece = os.read(terminal, 1 << 16).decode(errors="replace")
        if text in piece and without not in piece:
            return
    raise AssertionError(f"{text!r} was not drawn within {limit_s} s")
