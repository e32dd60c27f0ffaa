"""The command that serves bundles over HTTP and gRPC, ``onecard serve``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape

from onecard.errors import OnecardError, UsageError
from onecard.server.config import MOST_COUNT, config_callback
from onecard.units import parse_duration, parse_size

if TYPE_CHECKING:
    from onecard.ipc.models import ModelOptions
    from onecard.server.access import Access
    from onecard.server.http_server import HttpServer
    from onecard.server.logs import Form
    from onecard.server.serving import Serving
    from onecard.telemetry.exposition import Compatibility

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MOST_PORT = 65_535
_LEAST_MEMORY = 1 << 20
_err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="serve")(serve_command)


def serve_command(  # noqa: PLR0913, PLR0917 - the options are the interface
    ctx: typer.Context,
    bundles: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=]BUNDLE...", help="Folders that 'onecard optimize' wrote.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=config_callback, is_eager=True, envvar="ONECARD_CONFIG", help="TOML with any of these options."
        ),
    ] = None,
    model_repository: Annotated[
        Path | None,
        typer.Option(envvar="ONECARD_MODEL_REPOSITORY", help="A folder of bundles that may be loaded while it runs."),
    ] = None,
    watch: Annotated[
        bool, typer.Option(envvar="ONECARD_WATCH", help="Load, reload and unload as the repository's folder changes.")
    ] = False,
    host: Annotated[str, typer.Option(envvar="ONECARD_HOST", help="The address to listen on.")] = "127.0.0.1",
    http_port: Annotated[
        int, typer.Option(min=0, max=_MOST_PORT, envvar="ONECARD_HTTP_PORT", help="0 for one that is free.")
    ] = 8000,
    grpc: Annotated[bool, typer.Option(envvar="ONECARD_GRPC", help="Whether to serve gRPC as well.")] = True,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=_MOST_PORT, envvar="ONECARD_GRPC_PORT", help="0 for one that is free.")
    ] = 8001,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=-1,
            max=_MOST_PORT,
            envvar="ONECARD_METRICS_PORT",
            help="For /metrics alone; 0 for one that is free, -1 for none.",
        ),
    ] = 8002,
    metrics_compat: Annotated[
        str, typer.Option(envvar="ONECARD_METRICS_COMPAT", help="triton: its names of metrics as well.")
    ] = "",
    uds: Annotated[Path | None, typer.Option(envvar="ONECARD_UDS", help="Also a Unix-domain socket there.")] = None,
    device: Annotated[str, typer.Option(envvar="ONECARD_DEVICE", help="auto, cpu or cuda:0.")] = "auto",
    device_memory: Annotated[
        str | None, typer.Option(envvar="ONECARD_DEVICE_MEMORY", help="Run each model within so much: 4GiB.")
    ] = None,
    ingest: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL:]INPUT=DTYPE ...",
            envvar="ONECARD_INGEST",
            help="An input may also come so: 'image=uint8 NHWC mean=.. std=..', 'ids=int32'. Repeat it.",
        ),
    ] = None,
    p99: Annotated[
        str | None, typer.Option("--p99", envvar="ONECARD_P99", help="Run as 'onecard tune' found for this limit: 5ms.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, max=MOST_COUNT, envvar="ONECARD_MAX_BATCH", help="Most rows of a batch.")
    ] = None,
    max_delay: Annotated[
        str | None, typer.Option(envvar="ONECARD_MAX_DELAY", help="How long a request may wait for others: 2ms.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(envvar="ONECARD_TIMEOUT", help="Deadline of requests that name none: 1s.")
    ] = None,
    queue_items: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, envvar="ONECARD_QUEUE_ITEMS", help="Most requests that wait.")
    ] = 1000,
    queue_bytes: Annotated[str, typer.Option(envvar="ONECARD_QUEUE_BYTES", help="Most bytes that wait.")] = "1GiB",
    queue_wait: Annotated[
        str, typer.Option(envvar="ONECARD_QUEUE_WAIT", help="A request that would wait longer is refused.")
    ] = "10s",
    max_body: Annotated[str, typer.Option(envvar="ONECARD_MAX_BODY", help="Largest request body.")] = "64MiB",
    request_memory: Annotated[
        str, typer.Option(envvar="ONECARD_REQUEST_MEMORY", help="Shared memory for all requests that are held at once.")
    ] = "512MiB",
    answer_memory: Annotated[
        str, typer.Option(envvar="ONECARD_ANSWER_MEMORY", help="Shared memory for answers that are being sent.")
    ] = "256MiB",
    max_connections: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, envvar="ONECARD_MAX_CONNECTIONS", help="Open at once.")
    ] = 1000,
    workers: Annotated[
        int, typer.Option(min=1, max=64, envvar="ONECARD_WORKERS", help="Processes with sockets, on the same ports.")
    ] = 1,
    tls_certificate: Annotated[Path | None, typer.Option(envvar="ONECARD_TLS_CERTIFICATE", help="PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="ONECARD_TLS_KEY", help="PEM file.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(envvar="ONECARD_TLS_CLIENT_CA", help="Only clients signed by these may connect.")
    ] = None,
    auth_token_file: Annotated[
        Path | None, typer.Option(envvar="ONECARD_AUTH_TOKEN_FILE", help="Clients must show the token in this file.")
    ] = None,
    control_token_file: Annotated[
        Path | None,
        typer.Option(envvar="ONECARD_CONTROL_TOKEN_FILE", help="Loading and unloading need the token in this file."),
    ] = None,
    shared_memory_prefix: Annotated[
        str | None,
        typer.Option(
            envvar="ONECARD_SHARED_MEMORY_PREFIX", help="Clients may share memory whose name begins with this."
        ),
    ] = None,
    cuda_shared_memory: Annotated[
        bool, typer.Option(envvar="ONECARD_CUDA_SHARED_MEMORY", help="Clients may share memory of the card.")
    ] = False,
    sentinel: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_COUNT,
            envvar="ONECARD_SENTINEL",
            help="One request in so many is answered again by the original; 0: none.",
        ),
    ] = 0,
    sentinel_device: Annotated[
        str, typer.Option(envvar="ONECARD_SENTINEL_DEVICE", help="Where that runs: cpu, or same as the model.")
    ] = "cpu",
    hang_timeout: Annotated[
        str, typer.Option(envvar="ONECARD_HANG_TIMEOUT", help="An engine silent for so long is started again.")
    ] = "10s",
    batch_timeout: Annotated[
        str, typer.Option(envvar="ONECARD_BATCH_TIMEOUT", help="So is one that is at one batch for so long.")
    ] = "60s",
    drain_timeout: Annotated[
        str, typer.Option(envvar="ONECARD_DRAIN_TIMEOUT", help="For open requests, when told to end.")
    ] = "30s",
    log_format: Annotated[str, typer.Option(envvar="ONECARD_LOG_FORMAT", help="human or json.")] = "human",
    access_log: Annotated[
        float,
        typer.Option(min=0, max=1, envvar="ONECARD_ACCESS_LOG", help="Part of the requests that is logged: 1 is all."),
    ] = 0.0,
    log_level: Annotated[str, typer.Option(envvar="ONECARD_LOG_LEVEL", help="debug, info, warning ...")] = "info",
    trace_endpoint: Annotated[
        str | None,
        typer.Option(envvar="ONECARD_TRACE_ENDPOINT", help="Trace requests; tell this collector (OTLP over HTTP)."),
    ] = None,
    trace_sample: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            envvar="ONECARD_TRACE_SAMPLE",
            help="Part that is traced of requests whose caller traces not.",
        ),
    ] = 0.01,
) -> None:
    """Serve bundles by the Open Inference Protocol v2. Without TLS and tokens: for trusted networks only."""
    from onecard.server.config import model_options, named_bundles
    from onecard.server.engine_client import ClientOptions
    from onecard.server.engine_guard import GuardOptions
    from onecard.server.grpc_limits import GrpcListen
    from onecard.server.http_server import Listen
    from onecard.server.http_tls import tls_context
    from onecard.server.http_types import HttpLimits
    from onecard.server.logs import setup_logs
    from onecard.server.raw_forms import check_forms
    from onecard.server.repository import Source, read_names
    from onecard.server.serve import ENGINE_COMMAND, ServeOptions, run_server
    from onecard.server.traces import TraceOptions
    from onecard.server.worker_keeper import KeeperOptions
    from onecard.server.worker_messages import TlsFiles
    from onecard.server.workers import WorkersOptions

    if tls_certificate is None and (tls_key or tls_client_ca):
        raise UsageError("--tls-key and --tls-client-ca need --tls-certificate.", "Give the certificate as well.")
    tls = tls_context(tls_certificate, tls_key, tls_client_ca) if tls_certificate else None
    setup_logs(cast("Form", log_format), log_level)
    announcer = _Announcer(logged=log_format == "json")
    access = _access(auth_token_file, control_token_file)
    names = read_names(named_bundles(ctx, bundles))
    check_forms(ingest or (), None if model_repository else names)
    if host not in _LOOPBACK and tls is None:
        tokens = "" if auth_token_file else " and without tokens"
        announcer.warn(f"{host} may be reached from elsewhere, without TLS{tokens}.")
    options = ServeOptions(
        {name: Source(path, _model(model_options(ctx, name))) for name, path in names.items()},
        Listen(host, http_port, uds, tls=tls),
        HttpLimits(max_body_bytes=parse_size(max_body), max_connections=max_connections),
        ClientOptions(_memory("--request-memory", request_memory), _memory("--answer-memory", answer_memory)),
        GuardOptions(hang_s=parse_duration(hang_timeout), hang_batch_s=parse_duration(batch_timeout)),
        access,
        access_log,
        shared_memory_prefix,
        cuda_shared_memory,
        model_repository,
        watch,
        _model(model_options(ctx, "")),
        (*ENGINE_COMMAND, "--log-format", log_format, "--log-level", log_level),
        drain_s=parse_duration(drain_timeout),
        workers=WorkersOptions(
            workers,
            TlsFiles(tls_certificate, tls_key, tls_client_ca) if tls_certificate else None,
            cast("Form", log_format),
            log_level,
            KeeperOptions(hang_s=parse_duration(hang_timeout)),
        ),
        trace=TraceOptions(trace_endpoint, trace_sample) if trace_endpoint else None,
        metrics=Listen(host, metrics_port) if metrics_port >= 0 else None,
        metrics_names=_names(metrics_compat),
        grpc=GrpcListen(host, grpc_port, None, 0o600, tls_certificate, tls_key, tls_client_ca) if grpc else None,
    )
    try:
        run_server(options, announcer)
    except OnecardError as error:
        if log_format != "json":
            raise
        announcer.fail(error)
        raise typer.Exit(error.exit_code) from error


def _model(values: Mapping[str, Any]) -> ModelOptions:
    """How a model is opened, from the options that it has: the command's, or its own of the configuration file."""
    from onecard.ipc.models import ModelOptions

    policy: dict[str, Any] = {
        "queue_items": values["queue_items"],
        "queue_bytes": parse_size(values["queue_bytes"]),
        "queue_wait_s": parse_duration(values["queue_wait"]),
    }
    if values["max_batch"] is not None:
        policy["max_rows"] = values["max_batch"]
    if values["max_delay"] is not None:
        policy["max_delay_s"] = parse_duration(values["max_delay"])
    p99, timeout, memory = values["p99"], values["timeout"], values["device_memory"]
    return ModelOptions(
        values["device"],
        parse_duration(p99) * 1e3 if p99 else None,
        policy,
        parse_duration(timeout) if timeout else None,
        tuple(values["ingest"] or ()),
        device_memory=parse_size(memory) if memory else None,
        sentinel=values["sentinel"],
        sentinel_device=_sentinel_device(values["sentinel_device"]),
    )


def _sentinel_device(value: str) -> str:
    from onecard.ipc.models import SENTINEL_DEVICES

    if value not in SENTINEL_DEVICES:
        raise UsageError(f"--sentinel-device is '{value[:32]}', expected {' or '.join(SENTINEL_DEVICES)}.")
    return value


def _memory(option: str, text: str) -> int:
    """Bytes of memory that the server's processes share; less than the smallest is of no use to any request."""
    nbytes = parse_size(text)
    if nbytes < _LEAST_MEMORY:
        raise UsageError(f"{option} is '{text[:32]}', expected {_LEAST_MEMORY >> 20}MiB or more.")
    return nbytes


def _names(value: str) -> Compatibility:
    if value not in ("", "triton"):
        raise UsageError(f"--metrics-compat is '{value[:32]}', expected triton.")
    return cast("Compatibility", value)


def _access(auth: Path | None, control: Path | None) -> Access:
    from onecard.server.access import Access, read_token

    return Access(read_token(auth) if auth else None, read_token(control) if control else None)


class _Announcer:
    """Says how far the server is.

    Args:
        logged: whether as records of the log, which a program reads, and not as lines for people.
    """

    def __init__(self, logged: bool) -> None:
        self._logged = logged
        self._logger = logging.getLogger("onecard.server")

    def warn(self, text: str) -> None:
        if self._logged:
            self._logger.warning("%s", text)
        else:
            _err.print(f"[yellow]warning:[/] {escape(text)}")

    def fail(self, error: OnecardError) -> None:
        self._logger.critical("%s", error)

    def listening(self, server: HttpServer) -> None:
        for each in server.sockets:
            self._say("listening", f"on {_address(each.getsockname())}")

    def listening_grpc(self, port: int) -> None:
        self._say("gRPC", f"on port {port}")

    def listening_metrics(self, port: int) -> None:
        self._say("metrics", f"on port {port}")

    def ready(self, serving: Serving) -> None:
        for model in serving.client.models.values():
            if model.contract is not None:
                also = "".join(f", also {tensor}" for tensor in model.contract.also)
                what = f"{model.contract.spec}{also} on {model.device}"
                self._say("ready", f"{model.name}: {what}", "green")

    def _say(self, word: str, text: str, style: str = "none") -> None:
        if self._logged:
            self._logger.info("%s %s", word, text)
        else:
            _err.print(f"[{style}]{word}[/] {escape(text)}", soft_wrap=True)


def _address(name: Any) -> str:
    return str(name) if isinstance(name, str | bytes) else f"{name[0]} port {name[1]}"
