"""The command that puts load on a server or a bundle, ``onecard bench``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape

from onecard.errors import StorageError, UsageError
from onecard.units import parse_duration

if TYPE_CHECKING:
    from onecard.bench.load import Load, Scenario
    from onecard.bench.result import BenchResult

_PIPE_WIDTH = 120
_NOT_KEPT = 1
_INTERRUPTED = 130
_CONNECTIONS = {"offline": 256}
_MOST_CONNECTIONS = 900
_DURATION = {True: "10s", False: "30s"}  # by whether the knee is looked for: a point, or the run
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="bench")(bench_command)


def bench_command(  # noqa: PLR0913, PLR0917 - the options are the interface
    target: Annotated[
        str, typer.Argument(help="http://host:port/MODEL, grpc://host:port, unix:PATH, or a bundle to run in process.")
    ],
    model: Annotated[str, typer.Option(help="Its name, where the address does not say it.")] = "",
    scenario: Annotated[str, typer.Option(help="server, offline, single-stream or multi-stream.")] = "server",
    qps: Annotated[float, typer.Option(help="Requests a second, on average (server).")] = 0.0,
    duration: Annotated[str | None, typer.Option(help="Of the run (30s), or of each point of a search (10s).")] = None,
    requests: Annotated[int, typer.Option(help="At most so many queries, instead of as many as the time has.")] = 0,
    slo: Annotated[str | None, typer.Option(help="What is to be kept: p99=20ms, p99.9=1s, max=2s.")] = None,
    find_knee: Annotated[bool, typer.Option("--find-knee", help="Find the most load that keeps --slo.")] = False,
    tolerance: Annotated[float, typer.Option(help="How near the knee is to be found: 0.03 is 3 %.")] = 0.03,
    rows: Annotated[int, typer.Option(help="Of every request.")] = 1,
    dimension: Annotated[
        list[str] | None, typer.Option(help="Size of another dimension that is open: S=128. Repeat it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows to send, named like the inputs: .npz or .safetensors.")
    ] = None,
    arrivals: Annotated[
        Path | None, typer.Option(help="A trace: one time in seconds a line; --qps stretches it to a mean rate.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Requests of a query (multi-stream).")] = 8,
    closed_loop: Annotated[
        bool, typer.Option("--closed-loop", help="Callers that wait for answers instead, for comparison.")
    ] = False,
    concurrency: Annotated[int, typer.Option(help="Callers of the closed loop.")] = 1,
    connections: Annotated[int | None, typer.Option(help="Most requests under way at once (900; offline 256).")] = None,
    warm_up: Annotated[str, typer.Option(help="Load before the figures; 0 for none.")] = "1s",
    drain: Annotated[str, typer.Option(help="How long answers are waited for at the end.")] = "10s",
    seed: Annotated[int, typer.Option(help="Of arrival times and random inputs.")] = 0,
    header: Annotated[
        list[str] | None, typer.Option(help="To send along: 'Authorization: Bearer X'. Repeat it.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file of authorities to trust (https).")] = None,
    device: Annotated[str, typer.Option(help="Of a bundle: auto, cpu or cuda:0.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write everything, the histogram too, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
) -> None:
    """Put load on TARGET as MLPerf's scenarios define it, and measure what it answers, and when.

    Exit code 1: --slo was not kept.
    """
    from onecard.bench.console import ConsoleView, print_bench
    from onecard.bench.load import Load, read_arrivals
    from onecard.bench.session import BenchOptions, run_bench
    from onecard.bench.slo import parse_slo
    from onecard.bench.target import parse_address

    _check_outputs(json, html)
    kind = _scenario(scenario, closed_loop)
    load = Load(
        kind,
        parse_duration(duration or _DURATION[find_knee]),
        qps,
        requests,
        read_arrivals(arrivals, qps) if arrivals else (),
        samples,
        concurrency,
        _CONNECTIONS.get(kind, _MOST_CONNECTIONS) if connections is None else connections,
        parse_duration(drain),
        seed,
    )
    if ca is not None and not ca.is_file():
        raise UsageError(f"there is no file {ca}.", "Pass the PEM file of the server's authority with --ca.")
    options = BenchOptions(
        address=parse_address(target, model),
        load=_as_long_as_its_trace(load, duration),
        rows=rows,
        dimensions=tuple(dimension or ()),
        data=data,
        arrivals=str(arrivals or ""),
        slo=parse_slo(slo) if slo else None,
        find_knee=find_knee,
        tolerance=tolerance,
        warm_up_s=0.0 if warm_up.strip().rstrip("s") == "0" else parse_duration(warm_up),
        fields=tuple(header or ()),
        ca=str(ca) if ca else None,
        device=device,
        command=shlex.join(["onecard", *sys.argv[1:]]),
    )
    with ConsoleView(_err) as view:
        found = run_bench(options, view)
    print_bench(found, _out)
    _write(found, json, html)
    raise typer.Exit(_exit_code(found))


def _scenario(name: str, closed_loop: bool) -> Scenario:
    from onecard.bench.load import CLOSED_LOOP, SCENARIOS

    if closed_loop:
        return CLOSED_LOOP
    if name not in SCENARIOS:
        raise UsageError(f"unknown scenario '{name}': expected one of {', '.join(SCENARIOS)}.")
    return cast("Scenario", name)


def _as_long_as_its_trace(load: Load, duration: str | None) -> Load:
    """A trace is sent whole unless a duration cuts it."""
    import msgspec

    if not load.arrivals or duration is not None:
        return load
    return msgspec.structs.replace(load, duration_s=load.arrivals[-1] + 1e-6)


def _check_outputs(*paths: Path | None) -> None:
    for path in filter(None, paths):
        if not path.absolute().parent.is_dir():
            raise StorageError(f"there is no folder {path.absolute().parent}.", "Make it first.")


def _write(found: BenchResult, json: Path | None, html: Path | None) -> None:
    from onecard.bench.page import write_page
    from onecard.evidence import to_json

    if json is not None:
        try:
            json.write_bytes(to_json(found) + b"\n")
        except OSError as error:
            raise StorageError(f"cannot write {json}: {error.strerror}.", "Choose another place.") from error
    if html is not None:
        write_page(found, html)
    for path in filter(None, (json, html)):
        _out.print(f"Wrote {escape(str(path))}", soft_wrap=True)


def _exit_code(found: BenchResult) -> int:
    run, knee = found.run, found.knee
    if found.interrupted:
        return _INTERRUPTED
    if knee is not None:
        return 0 if knee.qps else _NOT_KEPT
    return _NOT_KEPT if run is not None and run.objective and run.shortfall else 0
