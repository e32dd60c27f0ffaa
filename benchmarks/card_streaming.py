"""A model larger than the device memory that it may use: weights streamed, against the whole model and accelerate.

    python benchmarks/card_streaming.py --out benchmarks/results/nvidia-h200
    python benchmarks/card_streaming.py --out /tmp/streaming --small

The model is a decoder of 21 GiB in fp16 (35 layers of width 5120, tied embeddings) with random weights, made a weight
at a time on the card. It is run whole on the card first, where that fits, for the answers; then streamed under
``--device-memory``; then by accelerate's ``dispatch_model`` under the same limit, and by its ``cpu_offload``, on a
model of the same weights. The link's rate is measured in the same run, from memory locked in the same way. ``--small``
tries it all on a CPU, where the limit is only counted and the rates mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from onecard.environment import detect
from onecard.streaming import stream
from onecard.streaming.link import make_link
from onecard.streaming.model import StreamOptions
from onecard.streaming.store import host_buffer
from onecard.units import parse_size

GIB = 1 << 30
SEED = 1


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder and of its input."""

    width: int = 5120
    heads: int = 40
    hidden: int = 13824
    layers: int = 35
    vocabulary: int = 32000
    rows: int = 4
    length: int = 512
    dtype: str = "float16"


SMALL = Shape(128, 4, 384, 8, 1000, 2, 16, "float32")


class Layer(nn.Module):
    """Pre-norm attention and a gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.before, self.between = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, W]
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Token ids to logits; embeddings tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [B, S] -> [B, S, V]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@dataclass
class Row:
    """One way to run the model.

    Args:
        way: its name.
        pass_s: seconds of each pass, raw.
        copied_bytes: of weights, in a pass; 0 where it is not known.
        peak_bytes: the most that PyTorch had given out on the card, and had reserved.
        same: whether the answers are those of the whole model to the last bit; None where there are none.
        note: what else is to be said, or why there is no result.
    """

    way: str
    pass_s: list[float] = field(default_factory=list)
    copied_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    same: bool | None = None
    note: str = ""
    prepare_s: float = 0.0


def build(shape: Shape, device: str) -> Decoder:
    """The decoder in main memory, its weights drawn on the device one at a time, always the same."""
    with torch.device("meta"):
        module = Decoder(shape)
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            drawn = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() > 1:
                drawn.normal_(0.0, 0.02, generator=generator)
            owner._parameters[name] = nn.Parameter(drawn.cpu(), requires_grad=False)
            del drawn
    module.head.weight = module.embed.weight
    return module.eval()


def settle(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def measure(row: Row, run: Callable[[], Tensor], passes: int, device: str, expected: Tensor | None) -> Tensor:
    """Warm up once, time passes one by one, and compare the last answer."""
    with torch.inference_mode():
        run()
        for _ in range(passes):
            sync(device)
            start = time.perf_counter()
            answer = run()
            sync(device)
            row.pass_s.append(time.perf_counter() - start)
    if device != "cpu":
        row.peak_bytes = torch.cuda.max_memory_allocated(device)
        row.reserved_bytes = torch.cuda.max_memory_reserved(device)
    on_host = answer.cpu()
    row.same = None if expected is None else torch.equal(on_host, expected)
    if row.same is False:
        row.note += f" largest difference {(on_host.float() - expected.float()).abs().max():.3g}"
    return on_host


def link_rate(device: str, nbytes: int) -> float:
    """Bytes a second of one copy after the other from locked main memory: the median of five rounds of eight."""
    link = make_link(device, 1 << 60)
    source, target = host_buffer(nbytes).fill_(1), link.allocate(nbytes)
    is_pinned = link.pin(source)
    rates = []
    for _ in range(6):
        link.finish()
        start = time.perf_counter()
        for _ in range(8):
            link.copy(target, source, None)
        link.finish()
        rates.append(8 * nbytes / (time.perf_counter() - start))
    if is_pinned:
        link.unpin(source)
    return statistics.median(rates[1:])


def run_whole(module: Decoder, ids: Tensor, passes: int, device: str) -> tuple[Row, Tensor | None]:
    row = Row("whole model on the device")
    try:
        start = time.perf_counter()
        module.to(device)
        module.head.weight = module.embed.weight
        sync(device)
        row.prepare_s = time.perf_counter() - start
        given = ids.to(device)
        return row, measure(row, lambda: module(given), passes, device, None)
    except torch.OutOfMemoryError as error:
        row.note = f"out of memory: {str(error).splitlines()[0]}"
        return row, None


def run_streamed(
    module: Decoder, ids: Tensor, arguments: argparse.Namespace, expected: Tensor | None
) -> tuple[Row, list[str]]:
    device, limit = arguments.device, arguments.limit
    row = Row(f"onecard.stream, {limit / GIB:.3g} GiB")
    if device != "cpu" and arguments.enforce:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
    start = time.perf_counter()
    options = StreamOptions(arguments.part_bytes, arguments.slots)
    with stream(module, ids, limit, device, consume=True, options=options) as streamed:
        sync(device)
        row.prepare_s = time.perf_counter() - start
        given = ids.to(device)
        row.copied_bytes = streamed.residency.pass_bytes
        measure(row, lambda: streamed(given)["output"], arguments.passes, device, expected)
        plan = streamed.residency
        lines = [
            f"{len(streamed.split.parts)} parts, {len(plan.streamed)} of them copied in a pass "
            f"({plan.pass_bytes / GIB:.2f} GiB), {plan.kept_bytes / GIB:.2f} GiB stay, {plan.slots} slots of "
            f"{plan.slot_bytes / GIB:.3f} GiB, {plan.budget.activation_bytes / GIB:.3f} GiB left for activations",
            f"main memory locked: {streamed.is_pinned}",
        ]
    if device != "cpu" and arguments.enforce:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return row, lines


def run_accelerate(arguments: argparse.Namespace, shape: Shape, ids: Tensor, expected: Tensor | None) -> list[Row]:
    """Its two ways: as much as fits kept on the card and the rest offloaded, and all of it offloaded."""
    rows = [Row("accelerate dispatch_model, same limit"), Row("accelerate cpu_offload")]
    try:
        from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
    except ImportError:
        for row in rows:
            row.note = "accelerate is not installed"
        return rows
    device, limit = arguments.device, arguments.limit
    for row in rows:
        settle(device)
        try:
            module = build(shape, device)
            settle(device)
            start = time.perf_counter()
            if row is rows[1]:
                cpu_offload(module, torch.device(device))
            elif device == "cpu":
                row.note = "needs a card"
                continue
            else:
                room = int(limit * 0.85)  # it counts weights only: leave the rest for the layer under way
                index = torch.device(device).index or 0
                places = infer_auto_device_map(
                    module, {index: room, "cpu": 1 << 60}, no_split_module_classes=["Layer"], verbose=False
                )
                dispatch_model(module, places)
            row.prepare_s = time.perf_counter() - start
            measure(row, partial(module, ids.to(device)), arguments.accelerate_passes, device, expected)
        except Exception as error:  # another library's failure is a row
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        finally:
            with suppress(NameError):
                del module
    return rows


def table(rows: list[Row], rate: float, total_bytes: int, about: list[str]) -> list[str]:
    """Markdown: a row for each way."""
    lines = [
        *about,
        f"weights {total_bytes / GIB:.2f} GiB; link {rate / 1e9:.1f} GB/s, measured here from locked memory",
        "",
        "| way | s a pass | spread | copied GiB | GB/s | of the link | peak GiB (reserved) | same answers | note |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        if not row.pass_s:
            lines.append(f"| {row.way} | | | | | | | | {row.note.strip()} |")
            continue
        median = statistics.median(row.pass_s)
        spread = (max(row.pass_s) - min(row.pass_s)) / median
        copied = gbps = share = ""
        if row.copied_bytes:
            copied = f"{row.copied_bytes / GIB:.2f}"
            gbps = f"{row.copied_bytes / median / 1e9:.1f}"
            share = f"{row.copied_bytes / median / rate:.1%}"
        same = {None: "", True: "to the last bit", False: "**no**"}[row.same]
        peak = f"{row.peak_bytes / GIB:.2f} ({row.reserved_bytes / GIB:.2f})"
        cells = (row.way, f"{median:.4f}", f"{spread:.1%}", copied, gbps, share, peak, same, row.note.strip())
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def parse() -> tuple[argparse.Namespace, Shape]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="")
    parser.add_argument("--device-memory", default="", help="by default 4GiB, or 3MB with --small")
    parser.add_argument("--small", action="store_true", help="a small model on a CPU")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--accelerate-passes", type=int, default=2)
    parser.add_argument("--part-bytes", type=parse_size)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--enforce", action="store_true", help="let PyTorch refuse more than the limit")
    parser.add_argument("--skip", nargs="*", choices=["whole", "accelerate"], default=[])
    arguments = parser.parse_args()
    arguments.device = arguments.device or ("cpu" if arguments.small else "cuda:0")
    arguments.limit = parse_size(arguments.device_memory or ("3MB" if arguments.small else "4GiB"))
    sizes = asdict(SMALL if arguments.small else Shape())
    given = {name: getattr(arguments, name) for name in ("layers", "rows") if getattr(arguments, name) is not None}
    return arguments, Shape(**{**sizes, **given})


def run_all(
    arguments: argparse.Namespace, shape: Shape, say: Callable[[str], None]
) -> tuple[list[Row], list[str], int]:
    """All ways, one after the other, each with a model built anew."""
    device = arguments.device
    ids = torch.randint(0, shape.vocabulary, (shape.rows, shape.length), generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    expected: Tensor | None = None
    if "whole" not in arguments.skip:
        module = build(shape, device)
        settle(device)
        row, expected = run_whole(module, ids, arguments.passes, device)
        rows.append(row)
        say(f"{row.way}: {row.pass_s or row.note}")
        del module
    module = build(shape, device)
    total_bytes = sum(p.nbytes for p in module.parameters())
    settle(device)
    row, about = run_streamed(module, ids, arguments, expected)
    rows.append(row)
    say(f"{row.way}: {row.pass_s}; prepared in {row.prepare_s:.1f} s")
    del module
    if "accelerate" not in arguments.skip:
        rows += run_accelerate(arguments, shape, ids, expected)
        say("accelerate done")
    return rows, about, total_bytes


def main() -> None:
    arguments, shape = parse()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f}s {text}", flush=True)

    rate = link_rate(arguments.device, 16 << 20 if arguments.small else 256 << 20)
    say(f"link {rate / 1e9:.2f} GB/s")
    rows, about, total_bytes = run_all(arguments, shape, say)
    environment = detect(arguments.device)
    name = environment.card.name if environment.card else environment.cpu
    head = [f"{name}, torch {torch.__version__}, {shape.rows} x {shape.length} tokens, {shape.dtype}", *about]
    lines = table(rows, rate, total_bytes, head)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = {
            "command": shlex.join(["python", "benchmarks/card_streaming.py", *sys.argv[1:]]),
            "shape": asdict(shape),
            "limit_bytes": arguments.limit,
            "weight_bytes": total_bytes,
            "link_bytes_per_s": rate,
            "about": head,
            "rows": [asdict(r) for r in rows],
        }
        (arguments.out / "streaming.json").write_text(json.dumps(found, indent=1))
        (arguments.out / "streaming.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
