"""The command ``onecard plan``: options in, progress, a table of predicted and measured memory, and advice out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onecard.report.machine import user_code_on_stderr
from onecard.units import parse_duration

if TYPE_CHECKING:
    from types import TracebackType

    from rich.status import Status

    from onecard.memory.plan import BucketPlan, MemoryPlan

_TARGET_HELP = (
    "A bundle's folder, or a model: file.py:callable, package.module:callable, torchvision:NAME, timm:NAME, "
    "hf:DIR_OR_ID, or a .pt, .pt2 or .onnx file"
)
_PIPE_WIDTH = 120


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="plan")(plan_command)


def plan_command(  # noqa: PLR0913, PLR0917 - the options are the interface
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_BUNDLE", help=_TARGET_HELP)],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="An input: 'image: float32[B,3,224,224], B=1..64'. Repeat it.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="State dict: .safetensors, .pt or .pth.")] = None,
    device_memory: Annotated[str | None, typer.Option(help="What may be used: 8GiB. By default all there is.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes to plan for. Repeat it.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16; of a model, not of a bundle.")] = "fp32",
    depth: Annotated[
        int | None,
        typer.Option(help="Staging slots: batches whose inputs and outputs are held; 3 on a GPU, 1 on a CPU."),
    ] = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Only predict; nothing is run.")] = False,
    time_limit: Annotated[str, typer.Option(help="For measuring one size.")] = "5m",
    json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Predict and measure the memory that MODEL_OR_BUNDLE takes at each size, and what would make it fit."""
    from onecard.device_memory import parse_device_memory
    from onecard.evidence import to_json
    from onecard.memory.plan import PlanOptions, make_plan

    options = PlanOptions(
        device=device,
        device_memory=parse_device_memory(device_memory) if device_memory is not None else None,
        batches=tuple(batch or ()),
        precision=precision,
        depth=depth,
        measure=not no_measure,
        time_limit_s=parse_duration(time_limit),
    )
    with user_code_on_stderr(json), _Progress(Console(stderr=True, highlight=False)) as progress:
        found = make_plan(target, inputs=inputs or (), weights=weights, options=options, observe=progress.update)
    if json:
        sys.stdout.write(to_json(found).decode() + "\n")
    else:
        print_plan(found, Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH))


def print_plan(plan: MemoryPlan, out: Console) -> None:
    """The table, where the peak is, what failed, the largest batch, and the advice."""
    from onecard.report.format import bytes_

    arithmetic = plan.precision if plan.source == "model" else "each variant in its own precision"
    out.print(f"[bold]{escape(plan.model)}[/] on {plan.device}, {arithmetic}, {bytes_(plan.limit_bytes)} to use")
    out.print(_table(plan))
    for row in plan.buckets:
        if not row.verdict.ok and row.verdict.reason != "skipped":
            text = f"{row.label}: {row.verdict.reason}: {row.verdict.detail}. {row.verdict.cure}"
            out.print(f"[red]{escape(text.strip())}[/]", soft_wrap=True)
    for note in dict.fromkeys(row.note for row in plan.buckets if row.note):
        labels = ", ".join(row.label for row in plan.buckets if row.note == note)
        out.print(f"[yellow]{escape(f'{labels}: not predicted: {note}')}[/]", soft_wrap=True)
    for line in _detail(plan):
        out.print(escape(line), soft_wrap=True)
    out.print(f"[bold]{escape(_largest(plan))}[/]", soft_wrap=True)
    if plan.advice:
        out.print(f"What would help at {_label(plan)}:")
    for advice in plan.advice:
        mark = "[green]fits[/]" if advice.fits else "[yellow]nearer[/]"
        size = f"{bytes_(advice.need_bytes)} {advice.basis}"
        out.print(f"  {mark}: {escape(advice.what)} ({size})", soft_wrap=True)
    for note in plan.notes:
        out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)


def _table(plan: MemoryPlan) -> Table:
    from onecard.report.format import NONE, mib

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, caption="in MiB", caption_justify="left")
    table.add_column("size", no_wrap=True)
    names = ("weights", "activations", "in/out", "workspace", "predicted", "measured", f"{plan.depth} slots", "fits")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in plan.buckets:
        parts: list[str] = [NONE] * 4
        if row.call_bytes is not None:
            figures = (
                row.part("weights"),
                row.part("activations"),
                row.part("inputs") + row.part("outputs"),
                row.part("workspace") + row.part("graphs") + row.part("slack"),
            )
            parts = [mib(nbytes) for nbytes in figures]
        measured = mib(row.measured.peak_bytes) if row.measured and row.verdict.ok else NONE
        table.add_row(row.label, *parts, mib(row.call_bytes or 0), measured, mib(row.need_bytes or 0), _fits(row))
    return table


def _fits(row: BucketPlan) -> str:
    if row.fits is None:
        return "[red]failed[/]" if row.failed else "[yellow]unknown[/]"
    return "[green]yes[/]" if row.fits else "[red]no[/]"


def _detail(plan: MemoryPlan) -> list[str]:
    """What serves each size, where the peak of the largest is, and what the allocator held then."""
    from onecard.report.format import bytes_

    lines = []
    if plan.source == "bundle":
        served: dict[str, list[str]] = {}
        for row in plan.buckets:
            served.setdefault(row.variant, []).append(row.label)
        lines += [f"{', '.join(labels)}: served by {variant}" for variant, labels in served.items()]
    predicted = [row for row in plan.buckets if row.peak]
    if predicted:
        lines.append(f"{predicted[-1].label}: {predicted[-1].peak}")
    on_card = [row for row in plan.buckets if row.measured and row.verdict.ok and row.measured.how == "cuda"]
    if on_card and on_card[-1].measured:
        held = on_card[-1].measured
        lines.append(
            f"{on_card[-1].label}: allocated {bytes_(held.allocated_bytes)}, reserved {bytes_(held.reserved_bytes)}, "
            f"outside of PyTorch {bytes_(held.outside_bytes)} (the CUDA context not counted)"
        )
    return lines


def _largest(plan: MemoryPlan) -> str:
    from onecard.report.format import bytes_, sizes

    limit = bytes_(plan.limit_bytes)
    largest = plan.largest
    if largest is None:
        fits = [row.fits for row in plan.buckets]
        if all(fits):
            return f"All of it fits in {limit}."
        return f"Not all of it fits in {limit}." if False in fits else f"Nothing tells what fits in {limit}."
    if not largest.batch:
        return f"Not even the smallest batch fits in {limit}."
    basis = "measured" if largest.verified else "predicted"
    end = "; the range of --input ends there" if largest.is_range_end else ""
    return (
        f"The largest batch that fits in {limit}: {sizes(largest.bucket)} ({bytes_(largest.need_bytes)} {basis}{end})"
    )


def _label(plan: MemoryPlan) -> str:
    from onecard.spec import bucket_label

    return bucket_label(plan.advice_for)


class _Progress:
    """A line that is kept up to date on a terminal; elsewhere a line for each new phase.

    Args:
        console: standard error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = console.status("") if console.is_terminal else None
        self._phase = ""

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, text: str) -> None:
        """Show what is going on."""
        if text == self._phase:
            return
        self._phase = text
        if self._status is not None:
            self._status.update(escape(text) + " ...")
        elif not text.startswith("the worker"):
            self._console.print(f"{escape(text)} ...", soft_wrap=True)
