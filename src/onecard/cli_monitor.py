"""The command that shows in a terminal what a running server does, ``onecard monitor``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from onecard.errors import DataError, UsageError
from onecard.units import parse_duration

if TYPE_CHECKING:
    from onecard.telemetry.monitor_client import StateClient
    from onecard.telemetry.monitor_figures import Watch

_PIPE_WIDTH = 140
_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="monitor")(monitor_command)


def monitor_command(
    url: Annotated[str, typer.Argument(help="Of the server's HTTP port.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="One table of two samples, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One snapshot as the server tells it, and end.")] = False,
    interval: Annotated[str, typer.Option(help="Between two samples: 1s.")] = "1s",
    auth_token_file: Annotated[
        Path | None, typer.Option(envvar="ONECARD_AUTH_TOKEN_FILE", help="With the token that the server asks for.")
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="PEM file that vouches for the server's certificate.")] = None,
) -> None:
    """Show what a running server does: rates, latency, queues and the card. Ctrl-C ends it."""
    from onecard.server.access import read_token
    from onecard.telemetry.monitor_client import StateClient
    from onecard.telemetry.monitor_figures import Watch

    interval_s = parse_duration(interval)
    token = read_token(auth_token_file).decode("ascii") if auth_token_file else ""
    client = StateClient(url, token, tls_ca)
    try:
        if json:
            sys.stdout.write(client.ask().decode().rstrip() + "\n")
            return
        watch = Watch()
        watch.add(client.snapshot())
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
        if once:
            time.sleep(interval_s)
            watch.add(client.snapshot())
            _print(console, watch, client)
        elif console.is_terminal:
            _live(console, watch, client, interval_s)
        else:
            _lines(watch, client, interval_s)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None


def _print(console: Console, watch: Watch, client: StateClient) -> None:
    from onecard.telemetry.monitor_view import show

    console.print(show(watch, client.url, console.width))


def _live(console: Console, watch: Watch, client: StateClient, interval_s: float) -> None:
    """Show it until Ctrl-C; what was shown last stays."""
    from rich.live import Live

    from onecard.telemetry.monitor_view import show

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        trouble = ""
        while True:
            live.update(show(watch, client.url, console.width, trouble), refresh=True)
            time.sleep(interval_s)
            trouble = _next(watch, client, trouble)


def _lines(watch: Watch, client: StateClient, interval_s: float) -> None:
    """Where nothing can be drawn: lines, each with its time."""
    from onecard.telemetry.monitor_view import plain_lines

    trouble = ""
    while True:
        time.sleep(interval_s)
        trouble = _next(watch, client, trouble)
        clock = time.strftime("%H:%M:%S")
        for line in [trouble] if trouble else plain_lines(watch):
            sys.stdout.write(f"{clock} {line}\n")
        sys.stdout.flush()


def _next(watch: Watch, client: StateClient, trouble: str) -> str:
    """Take the next sample; else say why there is none, and since when."""
    from onecard.telemetry.monitor_client import UnreachableError

    try:
        watch.add(client.snapshot())
    except (UnreachableError, UsageError, DataError) as error:
        return trouble or f"since {time.strftime('%H:%M:%S')} {error.message} Trying again."
    return ""
