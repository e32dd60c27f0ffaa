"""The command that writes files for Prometheus and Grafana, ``onecard dashboards``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

_PIPE_WIDTH = 120
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="dashboards")(dashboards_command)


def dashboards_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder.")] = Path("monitoring"),
    server: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a server to watch. Repeat it. Default: 127.0.0.1:8000.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that were changed.")] = False,
) -> None:
    """Write dashboards, alert rules and settings for Prometheus and Grafana, and a compose file that starts both."""
    from onecard.telemetry.monitoring import write_monitoring

    written = write_monitoring(output, server or (), force)
    _out.print(f"{len(written)} files in {escape(str(output))}", soft_wrap=True)
    _out.print(f"Start both: docker compose -f {escape(str(output / 'compose.yml'))} up -d", soft_wrap=True)
    _out.print("Then look at http://127.0.0.1:3000")
