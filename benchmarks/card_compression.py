"""Low precision on a card: whole models beside fp16, and the linear layers of their encoders alone.

    python benchmarks/card_compression.py --out benchmarks/results/nvidia-h200 --models bert_base_qa --batches 1 8 32
    python benchmarks/card_compression.py --out benchmarks/results/nvidia-h200 --models --linears --batches 1 8 32

Weights are random, and so are the calibration rows, so errors say what rounding does and nothing of accuracy. Each
model's evidence goes to ``<model>-compression.json``, its table to ``.md``; the layers' to ``linears-compression``.
Every scheme's layers are timed in a process of their own, so that a failure is a row. ``--device cpu --models tiny``
and ``--shapes 64x64`` try it all without a card.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from card_models import BERT, EFFORTS, Watch, describe, without_logs
from safetensors.torch import save_file
from torch import Tensor, nn

from onecard.api import make_bundle, prepare
from onecard.backends.pointwise import respell_pointwise
from onecard.environment import detect
from onecard.evidence import Candidate, Evidence
from onecard.inputs import make_inputs
from onecard.transforms.fp8 import Fp8Product, Fp8RowwiseProduct
from onecard.transforms.int8_linear import Int8Product
from onecard.transforms.low_precision import Gemm, as_gemm
from onecard.transforms.sparse24 import MaskedProduct, Sparse24Product
from onecard.transforms.weight_only import Int4WeightProduct, Int8WeightProduct

BEFORE = {
    "resnet50": "channels_last+fold_bn+",
    "vit_b_16": "channels_last+",
    "bert_base_qa": "",
    "tiny": "",
}
"""What comes before the cast, by model."""
SCHEMES = ("fp8", "fp8_tensor", "fp8_static", "int8_dynamic", "int8", "sparse24", "int8_weights")
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
CALIBRATION_ROWS = 64


# Whole models


def recipes_of(name: str, device: str) -> list[str]:
    """fp16 eager and compiled, and every scheme on the compiled one; the first of the list is the yardstick."""
    head, half = ("inductor", "bf16") if device == "cpu" else ("cudagraph.inductor", "fp16")
    before = BEFORE[name]
    recipes = [f"{head}+{before}{half}@bucket", f"eager+{before}{half}"]
    recipes += [f"{head}+{before}{half}+{scheme}@bucket" for scheme in SCHEMES]
    recipes += [f"{head}+{before}bf16+{scheme}@bucket" for scheme in ("fp8", "int4_weights")]
    if name in ("bert_base_qa", "tiny"):
        recipes += [f"{head}+fuse_qkv+{half}{scheme}@bucket" for scheme in ("", "+fp8", "+fp8_static")]
    return list(dict.fromkeys(recipes))


def search(name: str, arguments: argparse.Namespace, work: Path) -> tuple[Evidence, list[str]]:
    if name == "tiny":
        folder = work / "tiny"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**BERT, **TINY}))
        high = max(arguments.batches)
        reference = f"hf:{folder}"
        inputs = [f"input_ids: int64[B,16] in 0..30521, B=1..{high}", "attention_mask: int64[B,16] in 0..1"]
    else:
        reference, inputs = describe(name, arguments.batches, work)
    recipes = arguments.recipes or recipes_of(name, arguments.device)
    options = {
        "batches": tuple(arguments.batches) if max(arguments.batches) > 1 else (),
        "recipes": tuple(recipes),
        "effort": EFFORTS[arguments.effort],
        "time_limit_s": arguments.time_limit,
        "candidate_time_limit_s": arguments.candidate_time_limit,
    }
    torch.manual_seed(0)
    model, settled = prepare(reference, device=arguments.device, inputs=inputs, options=options)
    calibration = work / f"{name}-calibration.safetensors"
    sizes = {symbol: limits.high for symbol, limits in model.spec.symbols.items()}
    rows_a_draw = next(iter(sizes.values()), 1)
    draws = [
        make_inputs(model.spec, sizes, seed=1000 + i, ragged=True) for i in range(-(-CALIBRATION_ROWS // rows_a_draw))
    ]
    save_file({key: torch.cat([d[key] for d in draws])[:CALIBRATION_ROWS] for key in draws[0]}, calibration)
    command = shlex.join(["python", "benchmarks/card_compression.py", *sys.argv[1:]])
    _, evidence = make_bundle(
        model,
        settled,
        output=work / f"{name}.onecard",
        calibration=str(calibration),
        command=command,
        observe=Watch(),
    )
    return evidence, recipes


def table(evidence: Evidence, recipes: list[str]) -> list[str]:
    """Markdown: a row a candidate; each one's own timing, and how many times faster than the first recipe."""
    buckets = evidence.buckets or ({},)
    labels = ["-".join(f"{k}{v}" for k, v in b.items()) or "fixed" for b in buckets]
    card, versions = evidence.environment.card, evidence.environment.versions
    heads = " | ".join(f"{x} ms | ratio" for x in labels)
    lines = [
        f"## {evidence.model}, compressed",
        "",
        f"{card.name if card else evidence.environment.cpu}, driver {card.driver if card else '-'}, "
        f"torch {versions['torch']}, `{evidence.command}`; times are each variant's own, "
        f"ratios to {recipes[0]} (above 1 is faster)",
        "",
        f"| recipe | verdict | {heads} | rel. error | top-1 | MiB | disk MiB | layers | kept |",
        "|---|---|" + "---:|" * (2 * len(labels) + 6),
    ]
    yardstick = evidence.candidate(recipes[0])
    for candidate in evidence.candidates:
        cells = []
        for bucket in buckets:
            timing = candidate.measurement.timing(bucket)
            base = yardstick.measurement.timing(bucket) if yardstick else None
            cells.append(f"{timing.median_ms:.3f}" if timing else "")
            cells.append(f"{base.median_ms / timing.median_ms:.2f}" if timing and base else "")
        lines.append(f"| {candidate.id} | {_verdict(candidate)} | " + " | ".join([*cells, *_rest(candidate)]) + " |")
    return [*lines, "", *(f"- {note}" for note in evidence.notes)]


def _verdict(candidate: Candidate) -> str:
    verdict = candidate.verdict
    return verdict.reason + ("" if verdict.reason in ("ok", "slower") else f": {verdict.detail[:80]}")


def _rest(candidate: Candidate) -> list[str]:
    """Error, agreement, peak memory, size, layers that could be compressed, and layers kept."""
    measured = candidate.measurement
    tops = [e.top1_agreement for e in candidate.errors if e.top1_agreement is not None]
    found = candidate.compression[-1] if candidate.compression else None
    return [
        f"{candidate.worst_error:.1e}" if candidate.errors else "",
        f"{min(tops):.3f}" if tops else "",
        f"{measured.peak_bytes >> 20}" if measured.timings else "",
        f"{measured.size_bytes / (1 << 20):.0f}" if measured.timings else "",
        str(found.layers) if found else "",
        str(len(found.kept)) if found else "",
    ]


# Linear layers alone


@dataclass(frozen=True)
class Layer:
    """One scheme of the layers' table: the dtype around it, and how a layer is made (None: left as it is)."""

    dtype: torch.dtype
    make: Callable[[Gemm, float], nn.Module] | None = None


HALF = torch.float16
LAYERS = {
    "fp16": Layer(HALF),
    "bf16": Layer(torch.bfloat16),
    "fp8": Layer(HALF, lambda gemm, _: Fp8RowwiseProduct(gemm)),
    "fp8 in bf16": Layer(torch.bfloat16, lambda gemm, _: Fp8RowwiseProduct(gemm)),
    "fp8_tensor": Layer(HALF, lambda gemm, _: Fp8Product(gemm)),
    "fp8_static": Layer(HALF, Fp8Product),
    "int8_dynamic": Layer(HALF, lambda gemm, _: Int8Product(gemm)),
    "int8": Layer(HALF, Int8Product),
    "sparse24": Layer(HALF, lambda gemm, _: Sparse24Product(gemm) if gemm.weight.is_cuda else MaskedProduct(gemm)),
    "int8_weights": Layer(HALF, lambda gemm, _: Int8WeightProduct(gemm)),
    "int4_weights": Layer(torch.bfloat16, lambda gemm, _: Int4WeightProduct(gemm)),
}
SHAPES = ("768x768", "768x2304", "768x3072", "3072x768")
"""KxN of an encoder layer: attention's output, its fused projections, and the two of the feed-forward part."""
TOKENS = {"BERT-base s384": 384, "ViT-B/16": 197}
_CALLS, _REPLAYS, _INPUTS = 12, 9, 4


class Produced(nn.Module):
    """A linear layer behind what feeds it in an encoder: GELU where it narrows, else layer norm."""

    def __init__(self, layer: nn.Module, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.before = nn.GELU() if inputs > outputs else nn.LayerNorm(inputs, dtype=dtype)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(self.before(x))
        return answer


def time_scheme(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Microseconds of every layer and number of rows: alone, and behind its producer."""
    scheme = LAYERS[name]
    for shape in arguments.shapes:
        inputs, outputs = map(int, shape.split("x"))
        for rows in arguments.rows:
            case = {"scheme": name, "shape": shape, "rows": rows}
            try:
                yield case | _time_layer(scheme, inputs, outputs, rows, arguments.device)
            except Exception as error:  # the next case may do better
                text = next(iter(str(error).splitlines()), "")
                yield case | {"failed": f"{type(error).__name__}: {text[:160]}"}


@torch.no_grad()
def _time_layer(scheme: Layer, inputs: int, outputs: int, rows: int, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, device=device)
    xs = [torch.randn(rows, inputs, device=device) for _ in range(_INPUTS)]
    wanted = layer(xs[0])
    layer.to(scheme.dtype)
    xs = [x.to(scheme.dtype) for x in xs]
    product = scheme.make(as_gemm(layer), float(xs[0].abs().amax())) if scheme.make else layer
    error = float((product(xs[0]).float() - wanted).norm() / wanted.norm())
    behind = Produced(product, inputs, outputs, scheme.dtype).to(device)
    return {"error": error, "alone_us": _time(product, xs), "behind_us": _time(behind, xs)}


def _time(module: nn.Module, xs: list[Tensor]) -> float:
    """Microseconds a call, compiled with frozen weights; on a card inside a CUDA graph."""
    from torch._inductor import config

    torch._dynamo.reset()
    graph = respell_pointwise(torch.export.export(module.eval(), (xs[0],)).module())  # as the backend does
    with config.patch({"freezing": True, "triton.cudagraphs": False}):
        compiled = torch.compile(graph, dynamic=False)
        for x in xs:
            compiled(x)
    if not xs[0].is_cuda:
        samples = []
        for x in xs:
            started = time.perf_counter()
            compiled(x)
            samples.append(1e6 * (time.perf_counter() - started))
        return statistics.median(samples)
    return _time_graph(compiled, xs)


def _time_graph(compiled: Callable[[Tensor], Tensor], xs: list[Tensor]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compiled(xs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(_CALLS):
            compiled(xs[call % len(xs)])
    samples = []
    for _ in range(_REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * begin.elapsed_time(end) / _CALLS)
    return statistics.median(samples[3:])


def time_linears(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every scheme in a process of its own."""
    found: list[dict[str, Any]] = []
    given = ["--device", arguments.device, "--out", str(arguments.out), "--shapes", *arguments.shapes]
    rows = arguments.rows or [batch * tokens for tokens in TOKENS.values() for batch in arguments.batches]
    given += ["--rows", *map(str, rows)]
    for name in arguments.schemes:
        command = [sys.executable, __file__, *given, "--scheme", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.time_limit, check=False)
            lines, why = done.stdout, (done.stderr.strip().splitlines() or [""])[-1]
            status = done.returncode
        except subprocess.TimeoutExpired as error:
            lines = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            status, why = -1, f"took more than {arguments.time_limit:.0f} s"
        found += [json.loads(line) for line in lines.splitlines() if line.startswith('{"scheme"')]
        if status:
            found.append(
                {"scheme": name, "shape": "", "rows": 0, "failed": f"process ended with {status}: {why[:160]}"}
            )
        print(f"  {name}: {sum('alone_us' in f for f in found if f['scheme'] == name)} cases", flush=True)
    return found


def linears_table(found: list[dict[str, Any]], device: str) -> list[str]:
    """Markdown: a row a scheme and shape, and for each number of rows microseconds and the ratio to fp16."""
    rows = sorted({f["rows"] for f in found if f["rows"]})
    by_case = {(f["scheme"], f["shape"], f["rows"]): f for f in found}
    environment = detect(device)
    card = environment.card
    where = f"{card.name}, driver {card.driver}" if card else environment.cpu
    lines = ["## Linear layers alone", "", f"{where}, torch {torch.__version__}. Microseconds alone, and behind "]
    lines[-1] += "layer norm or GELU; (ratio to fp16)"
    lines.append("")
    lines.append("| K x N | scheme | error | " + " | ".join(f"M={m} alone | behind" for m in rows) + " |")
    lines.append("|---|---|---:|" + "---:|" * (2 * len(rows)))
    schemes = list(dict.fromkeys(f["scheme"] for f in found))
    for shape in dict.fromkeys(f["shape"] for f in found if f["shape"]):
        for scheme in schemes:
            cases = [by_case.get((scheme, shape, m), {}) for m in rows]
            bases = [by_case.get(("fp16", shape, m), {}) for m in rows]
            error = next((f"{c['error']:.1e}" for c in cases if "error" in c), "")
            cells = [
                _ratio(case, base, key)
                for case, base in zip(cases, bases, strict=True)
                for key in ("alone_us", "behind_us")
            ]
            lines.append(f"| {shape} | {scheme} | {error} | " + " | ".join(cells) + " |")
    for scheme in schemes:
        totals = [_layer_total(by_case, scheme, m) for m in rows]
        bases = [_layer_total(by_case, "fp16", m) for m in rows]
        cells = [_ratio(t, b, key) for t, b in zip(totals, bases, strict=True) for key in ("alone_us", "behind_us")]
        lines.append(f"| all four | {scheme} | | " + " | ".join(cells) + " |")
    failures = dict.fromkeys(f"- {f['scheme']} {f['shape']}: {f['failed']}" for f in found if "failed" in f)
    return [*lines, "", *failures]


def _layer_total(by_case: dict[tuple[str, str, int], dict[str, Any]], scheme: str, rows: int) -> dict[str, Any]:
    """The four products of one encoder layer together; empty where one is missing."""
    cases = [by_case.get((scheme, shape, rows), {}) for shape in SHAPES]
    keys = [key for key in ("alone_us", "behind_us") if all(key in case for case in cases)]
    return {key: sum(case[key] for case in cases) for key in keys}


def _ratio(case: dict[str, Any], base: dict[str, Any], key: str) -> str:
    if key not in case:
        return "failed" if "failed" in case else ""
    return f"{case[key]:.1f}" + (f" ({base[key] / case[key]:.2f})" if key in base else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", choices=BEFORE, default=["resnet50", "vit_b_16", "bert_base_qa"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--recipes", nargs="+", default=[], help="the first is what the others are compared with")
    parser.add_argument("--effort", choices=EFFORTS, default="quick")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds for a model, or a scheme's layers")
    parser.add_argument("--candidate-time-limit", type=float, default=200.0)
    parser.add_argument("--linears", action="store_true", help="time the layers alone too")
    parser.add_argument("--schemes", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[], help="M; by default the models' tokens")
    parser.add_argument("--scheme", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scheme:
        for case in time_scheme(arguments.scheme, arguments):
            print(json.dumps(case), flush=True)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables: list[str] = []
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as work:
        for name in arguments.models:
            print(f"{name}:", flush=True)
            try:
                evidence, recipes = search(name, arguments, Path(work))
            except Exception as error:  # the next model may do better
                tables.append(f"{name} failed: {type(error).__name__}: {error}")
                continue
            (arguments.out / f"{name}-compression.json").write_bytes(without_logs(evidence))
            lines = table(evidence, recipes)
            (arguments.out / f"{name}-compression.md").write_text("\n".join(lines) + "\n")
            tables += [*lines, ""]
    if arguments.linears:
        print("linears:", flush=True)
        found = time_linears(arguments)
        (arguments.out / "linears-compression.json").write_text(json.dumps(found, indent=1))
        lines = linears_table(found, arguments.device)
        (arguments.out / "linears-compression.md").write_text("\n".join(lines) + "\n")
        tables += lines
    print("\n".join(tables), flush=True)


if __name__ == "__main__":
    main()
