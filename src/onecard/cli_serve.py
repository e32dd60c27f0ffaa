"""The command that serves bundles over HTTP, ``onecard serve``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from onecard.errors import UsageError
from onecard.units import parse_duration, parse_size

if TYPE_CHECKING:
    from onecard.runtime.engine import EngineOptions
    from onecard.server.hosting import Hosting
    from onecard.server.http_server import HttpServer

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="serve")(serve_command)


def serve_command(  # noqa: PLR0913, PLR0917 - the options are the interface
    bundles: Annotated[
        list[str], typer.Argument(metavar="[NAME=]BUNDLE...", help="Folders that 'onecard optimize' wrote.")
    ],
    host: Annotated[str, typer.Option(envvar="ONECARD_HOST", help="The address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(envvar="ONECARD_HTTP_PORT", help="0 for one that is free.")] = 8000,
    uds: Annotated[Path | None, typer.Option(envvar="ONECARD_UDS", help="Also a Unix-domain socket there.")] = None,
    device: Annotated[str, typer.Option(envvar="ONECARD_DEVICE", help="auto, cpu or cuda:0.")] = "auto",
    p99: Annotated[
        str | None, typer.Option("--p99", envvar="ONECARD_P99", help="Run as 'onecard tune' found for this limit: 5ms.")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(envvar="ONECARD_MAX_BATCH", help="Most rows of a batch.")] = None,
    max_delay: Annotated[
        str | None, typer.Option(envvar="ONECARD_MAX_DELAY", help="How long a request may wait for others: 2ms.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(envvar="ONECARD_TIMEOUT", help="Deadline of requests that name none: 1s.")
    ] = None,
    queue_items: Annotated[int, typer.Option(envvar="ONECARD_QUEUE_ITEMS", help="Most requests that wait.")] = 1000,
    queue_bytes: Annotated[str, typer.Option(envvar="ONECARD_QUEUE_BYTES", help="Most bytes that wait.")] = "1GiB",
    queue_wait: Annotated[
        str, typer.Option(envvar="ONECARD_QUEUE_WAIT", help="A request that would wait longer is refused.")
    ] = "10s",
    max_body: Annotated[str, typer.Option(envvar="ONECARD_MAX_BODY", help="Largest request body.")] = "64MiB",
    max_bodies: Annotated[
        str, typer.Option(envvar="ONECARD_MAX_BODIES", help="Bytes of all bodies that are held at once.")
    ] = "4GiB",
    max_connections: Annotated[int, typer.Option(envvar="ONECARD_MAX_CONNECTIONS", help="Open at once.")] = 1000,
    tls_certificate: Annotated[Path | None, typer.Option(envvar="ONECARD_TLS_CERTIFICATE", help="PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="ONECARD_TLS_KEY", help="PEM file.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(envvar="ONECARD_TLS_CLIENT_CA", help="Only clients signed by these may connect.")
    ] = None,
    drain_timeout: Annotated[
        str, typer.Option(envvar="ONECARD_DRAIN_TIMEOUT", help="For open requests, when told to end.")
    ] = "30s",
) -> None:
    """Serve bundles over HTTP, by the Open Inference Protocol v2. Without TLS and tokens: for trusted networks only."""
    from onecard.server.hosting import read_names
    from onecard.server.http_server import Listen
    from onecard.server.http_tls import tls_context
    from onecard.server.http_types import HttpLimits
    from onecard.server.serve import ServeOptions, run_server

    if tls_certificate is None and (tls_key or tls_client_ca):
        raise UsageError("--tls-key and --tls-client-ca need --tls-certificate.", "Give the certificate as well.")
    tls = tls_context(tls_certificate, tls_key, tls_client_ca) if tls_certificate else None
    changes: dict[str, Any] = {
        "queue_items": queue_items,
        "queue_bytes": parse_size(queue_bytes),
        "queue_wait_s": parse_duration(queue_wait),
    }
    if max_batch is not None:
        changes["max_rows"] = max_batch
    if max_delay is not None:
        changes["max_delay_s"] = parse_duration(max_delay)
    limit_ms = parse_duration(p99) * 1e3 if p99 else None
    timeout_s = parse_duration(timeout) if timeout else None
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if host not in _LOOPBACK and tls is None:
        _err.print(f"[yellow]warning:[/] {escape(host)} may be reached from elsewhere, without TLS and without tokens.")
    options = ServeOptions(
        read_names(bundles),
        Listen(host, http_port, uds, tls=tls),
        HttpLimits(max_body_bytes=parse_size(max_body), max_connections=max_connections),
        parse_size(max_bodies),
        device,
        lambda folder: _engine_options(folder, device, limit_ms, changes, timeout_s),
        parse_duration(drain_timeout),
    )
    run_server(options, _Announcer())


def _engine_options(
    folder: Path, device: str, limit_ms: float | None, changes: dict[str, Any], timeout_s: float | None
) -> EngineOptions:
    """What the bundle was tuned to, and what the command line says over it."""
    from onecard.runtime.tune import tuned_options

    tuned = tuned_options(folder, limit_ms, device)
    options = dataclasses.replace(tuned, policy=dataclasses.replace(tuned.policy, **changes))
    return options if timeout_s is None else dataclasses.replace(options, timeout_s=timeout_s)


class _Announcer:
    """Says on the terminal how far the server is."""

    def listening(self, server: HttpServer) -> None:
        for each in server.sockets:
            _err.print(f"listening on {escape(_address(each.getsockname()))}", soft_wrap=True)

    def ready(self, hosting: Hosting) -> None:
        for model in hosting.models:
            if model.engine is not None:
                what = f"{model.engine.spec} on {model.engine.device}"
                _err.print(f"[green]ready[/] {escape(model.name)}: {escape(what)}", soft_wrap=True)


def _address(name: Any) -> str:
    return str(name) if isinstance(name, str | bytes) else f"{name[0]} port {name[1]}"
