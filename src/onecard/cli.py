"""The command line: ``onecard optimize``, ``serve``, ``bench`` and all the others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from onecard import (
    cli_bench,
    cli_cache,
    cli_dashboards,
    cli_memory,
    cli_mlperf,
    cli_monitor,
    cli_prune,
    cli_runtime,
    cli_serve,
    cli_training,
)
from onecard.errors import InterruptedSearch, ModelError, OnecardError, UsageError
from onecard.report.machine import user_code_on_stderr
from onecard.units import parse_duration, parse_size

app = typer.Typer(
    name="onecard",
    help="The fastest verified way to run a PyTorch model on one card.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_MODEL_HELP = (
    "file.py:callable, package.module:callable, torchvision:NAME, timm:NAME, hf:DIR_OR_ID, or a .pt, .pt2 or .onnx file"
)
_PIPE_WIDTH = 120
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True, highlight=False)


@app.command()
def optimize(  # noqa: PLR0913, PLR0917 - the options are the interface
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="An input: 'image: float32[B,3,224,224], B=1..64'. Repeat it.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="State dict: .safetensors, .pt or .pth.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled data: .npz, .safetensors, file.py:callable or module:callable.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Representative rows for INT8/FP8 scales, in the same forms; by default --data's."),
    ] = None,
    pruned: Annotated[Path | None, typer.Option(help="A .pt2 file that 'onecard prune' wrote, to try as well.")] = None,
    qat: Annotated[Path | None, typer.Option(help="A .pt2 file that 'onecard qat' wrote, to try as well.")] = None,
    metric: Annotated[
        str, typer.Option(help="accuracy, top5, f1, recall@5 ..., file.py:callable or module:callable.")
    ] = "",
    objective: Annotated[str, typer.Option(help="latency, throughput, memory or size.")] = "latency",
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes to build for and time. Repeat it.")] = None,
    max_latency_p99: Annotated[str | None, typer.Option(help="No slower than this: 5ms.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="No more memory than this: 2GiB.")] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Run within so much of the device's memory, streaming weights if need be: 4GiB.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="How far the metric may fall; by default 0.01.", show_default=False)
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="Largest relative error by precision: bf16=0.1. Repeat it.")
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Try only recipes that match this glob. Repeat it.")] = None,
    time_limit: Annotated[str, typer.Option(help="After it nothing new is tried.")] = "30m",
    candidate_time_limit: Annotated[str, typer.Option(help="For building, and again for running, one.")] = "5m",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier searches found.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The bundle's folder.")] = None,
) -> None:
    """Try every way to run MODEL here, prove and measure each, and write the best as a bundle."""
    options: dict[str, Any] = {
        "objective": objective,
        "batches": tuple(batch or ()),
        "max_latency_p99_ms": parse_duration(max_latency_p99) * 1000 if max_latency_p99 else None,
        "max_memory_bytes": parse_size(max_memory) if max_memory else None,
        "device_memory": parse_size(device_memory) if device_memory else None,
        "recipes": tuple(recipe or ()),
        "time_limit_s": parse_duration(time_limit),
        "candidate_time_limit_s": parse_duration(candidate_time_limit),
        "metric": _absolute(metric),
        "fresh": fresh,
        "thresholds": _thresholds(threshold or []),
        **_max_drop(max_drop, metric),
    }
    from onecard.api import make_bundle, prepare
    from onecard.live import LiveView
    from onecard.report.console import print_table

    _err.print(f"Loading [bold]{escape(model)}[/] ...")
    loaded, settled = prepare(model, device=device, inputs=inputs or (), weights=weights, options=options)
    _err.print(f"Inputs: {escape(str(loaded.spec))}")
    with LiveView(_err) as view:
        command = shlex.join(["onecard", *sys.argv[1:]])
        out, evidence = make_bundle(
            loaded,
            settled,
            output=output,
            data=data,
            calibration=calibration,
            alternatives={name: path for name, path in (("pruned", pruned), ("qat", qat)) if path},
            observe=view.update,
            command=command,
        )
    print_table(evidence, _out, out)


cli_training.register(app)
cli_prune.register(app)
cli_memory.register(app)
cli_runtime.register(app)
cli_serve.register(app)
cli_bench.register(app)
cli_mlperf.register(app)
cli_monitor.register(app)
cli_dashboards.register(app)
cli_cache.register(app)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'onecard optimize' wrote.")],
    inputs: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Arrays named like the inputs: .npz or .safetensors.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the outputs: .npz or .safetensors.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
) -> None:
    """Answer one file of inputs."""
    from onecard.api import load
    from onecard.arrays import check_output, describe_arrays, read_arrays, write_arrays

    if output is not None:
        check_output(output)
    arrays = read_arrays(inputs)
    outputs = load(bundle, device)(**arrays)
    if output is not None:
        write_arrays(output, outputs)
        _out.print(f"Wrote {escape(str(output))}", soft_wrap=True)
    for line in describe_arrays(outputs):
        _out.print(escape(line))


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'onecard optimize' wrote.")],
    json: Annotated[bool, typer.Option("--json", help="The whole manifest as JSON.")] = False,
) -> None:
    """Show what a bundle holds, and whether its files are whole."""
    from onecard.bundle.files import damaged
    from onecard.bundle.manifest import read_manifest
    from onecard.listing import print_manifest

    manifest = read_manifest(bundle)
    broken = damaged(bundle.absolute(), manifest.files.items())
    if json:
        sys.stdout.write((bundle / "onecard.json").read_text())
    else:
        print_manifest(manifest, _out)
    for name, what in broken.items():
        _err.print(f"[bold red]damaged[/] {escape(name)} {escape(what)}", soft_wrap=True)
    if broken:
        raise typer.Exit(6)


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'onecard optimize' wrote.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the page.")] = None,
) -> None:
    """Write the evidence of a bundle as a page, and name it."""
    from onecard.bundle.evidence_file import read_evidence
    from onecard.bundle.tuning_file import read_tuning
    from onecard.report.html import write_report

    evidence = read_evidence(bundle)
    page = output or Path(f"{bundle.absolute().name.removesuffix('.onecard')}-report.html")
    write_report(evidence, page, read_tuning(bundle))
    _out.print(str(page.absolute()), soft_wrap=True, markup=False)


@app.command()
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="A folder that 'onecard optimize' wrote: will it run here, and with what?")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    load: Annotated[bool, typer.Option("--load", help="Load every variant of BUNDLE and prove its answers.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A warning also ends with exit code 1.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The facts and the findings as JSON.")] = False,
) -> None:
    """Check this machine, and a bundle on it: driver, CUDA, torch, compilers and engines against each other."""
    from onecard.doctor import exit_code, visit

    if load and bundle is None:
        raise UsageError("--load is about a bundle:", "write onecard doctor BUNDLE --load.")
    with user_code_on_stderr(json):
        found = visit(device, bundle, load=load)
    if json:
        from onecard.evidence import to_json

        sys.stdout.write(to_json(found).decode() + "\n")
    else:
        from onecard.doctor.show import print_findings

        print_findings(found.findings, _out)
    raise typer.Exit(exit_code(found.findings, strict=strict))


def _thresholds(texts: list[str]) -> dict[str, float]:
    from onecard.recipe import COMPRESSIONS, PRECISIONS

    known = (*PRECISIONS, *COMPRESSIONS)
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"cannot read --threshold '{text}':", "write it like bf16=0.1.") from None
        if name not in known:
            raise UsageError(f"unknown precision '{name}': expected one of {', '.join(known)}.")
    return found


def _max_drop(given: float | None, metric: str) -> dict[str, float]:
    """The option, if it was given: without a metric nothing would look at it."""
    if given is None:
        return {}
    if not given >= 0:  # NaN neither
        raise UsageError(f"--max-drop is {given}, expected 0 or more.")
    if not metric:
        raise UsageError("--max-drop is about the metric, and there is none.", "Name it with --metric, beside --data.")
    return {"max_drop": given}


def _absolute(reference: str) -> str:
    """A ``file.py:callable`` whose file is found from any folder, for the workers."""
    path, colon, name = reference.rpartition(":")
    return f"{Path(path).absolute()}:{name}" if colon and path.endswith(".py") else reference


def _fail(error: OnecardError) -> int:
    _err.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.cure:
        _err.print(f"       {escape(error.cure)}", soft_wrap=True)
    return error.exit_code


def _ended(error: SystemExit) -> ModelError:
    """No command of onecard's ends like this: it was a model, or a function that --data, --metric or --loss names."""
    return ModelError(
        f"your own code called sys.exit({'' if error.code is None else repr(error.code)}).",
        "In the file that --data, --metric or --loss names, keep what a script does under if __name__ == '__main__', "
        "and let functions return.",
    )


def _crash(error: Exception) -> int:
    """An error nobody foresaw: keep the traceback in a file, and tell the user where."""
    import tempfile
    import traceback

    _err.print(f"[bold red]internal error:[/] {type(error).__name__}: {escape(str(error))[:300]}", soft_wrap=True)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="onecard-", suffix=".log", delete=False) as log:
            log.write(f"$ {shlex.join(sys.argv)}\n")
            traceback.print_exception(error, file=log)
    except OSError:
        return 1  # nowhere to keep it either
    _err.print(f"       Please report it with {log.name}.", soft_wrap=True)
    return 1


def main() -> None:
    """Entry point: every error ends in one message and the exit code of :mod:`onecard.errors`."""
    import warnings

    from onecard.live import show_warning

    warnings.showwarning = show_warning
    code = 0
    try:
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except OnecardError as error:
        code = _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(InterruptedSearch("stopped; nothing was written.", "What is done is kept: run it again."))
    except BrokenPipeError:
        code = 1
    except SystemExit as error:
        code = 1 if isinstance(error.__context__, BrokenPipeError) else _fail(_ended(error))  # typer's, or somebody's
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the option parser shows itself
        if show is not None:
            show()
            code = int(getattr(error, "exit_code", 2))
        else:
            code = _crash(error)
    sys.exit(code)
