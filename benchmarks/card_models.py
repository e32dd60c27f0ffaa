"""Searches of well-known models on a card: the original, every candidate's verdict and time, and the choice.

    python benchmarks/card_models.py --out benchmarks/results/nvidia-h200 --models resnet50 --batches 1 8 32 128

Weights are random, with the libraries' own initialisation and a fixed seed. Each model's whole evidence goes to
``<model>.json``, its table to ``<model>.md``. After an interruption run it again: finished candidates are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import torch

from onecard import OnecardError
from onecard.api import make_bundle, prepare
from onecard.evidence import Evidence, to_json
from onecard.search.job import EffortSpec

IMAGE = "image: float32[B,3,{side},{side}], B=1..{batch}"
TEXT = ("input_ids: int64[B,384] in 0..30521, B=1..{batch}", "attention_mask: int64[B,384] in 0..1")
BERT = {
    "architectures": ["BertForQuestionAnswering"],
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
MODELS = {
    "resnet50": ("torchvision:resnet50", 224),
    "mobilenet_v3_small": (f"{Path(__file__).with_name('random_models.py')}:mobilenet_v3_small", 224),
    "vit_b_16": (f"{Path(__file__).with_name('random_models.py')}:vit_b_16", 224),
    "deeplabv3_resnet50": ("torchvision:deeplabv3_resnet50", 512),
    "bert_base_qa": ("hf", 384),
}
EFFORTS = {"quick": EffortSpec(0.4, 0.3, 0.25, 3), "full": EffortSpec()}


def describe(name: str, batches: list[int], work: Path) -> tuple[str, list[str]]:
    """The reference of a model, and its inputs as text for batches up to the largest."""
    reference, side = MODELS[name]
    batch = max(batches)
    if reference == "hf":
        folder = work / "bert"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(BERT))
        reference = f"hf:{folder}"
        inputs = [text.format(batch=batch) for text in TEXT]
    else:
        inputs = [IMAGE.format(side=side, batch=batch)]
    if batch == 1:
        inputs = [text.replace("[B,", "[1,").replace(", B=1..1", "") for text in inputs]
    return reference, inputs


def search(name: str, arguments: argparse.Namespace, work: Path) -> Evidence:
    reference, inputs = describe(name, arguments.batches, work)
    options = {
        "batches": tuple(arguments.batches) if max(arguments.batches) > 1 else (),
        "recipes": tuple(arguments.recipes),
        "effort": EFFORTS[arguments.effort],
        "time_limit_s": arguments.time_limit,
        "candidate_time_limit_s": 150.0,
    }
    torch.manual_seed(0)
    model, settled = prepare(reference, device=arguments.device, inputs=inputs, options=options)
    command = shlex.join(["python", "benchmarks/card_models.py", *sys.argv[1:]])
    _, evidence = make_bundle(model, settled, output=work / f"{name}.onecard", command=command, observe=Watch())
    return evidence


class Watch:
    """One line for each candidate that ends, with the time, so that a log shows where the time went."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.start = time.monotonic()

    def __call__(self, progress) -> None:
        for name, candidate in progress.done.items():
            if name not in self.seen:
                self.seen.add(name)
                times = " ".join(f"{t.label}={t.median_ms:.3g}" for t in candidate.measurement.timings)
                detail = f"{times} {candidate.verdict.detail[:160]}"
                elapsed = time.monotonic() - self.start
                print(f"  {elapsed:5.0f}s {candidate.verdict.reason:>12} {name:<58} {detail}", flush=True)


def without_logs(evidence: Evidence) -> bytes:
    """The evidence as JSON without the candidates' logs, which are full of this machine's paths."""
    candidates = tuple(msgspec.structs.replace(c, log="") for c in evidence.candidates)
    return to_json(msgspec.structs.replace(evidence, candidates=candidates))


def table(evidence: Evidence) -> list[str]:
    """Markdown: a row a candidate, a column a bucket, medians of the play-off where it took part, else its own."""
    buckets = evidence.buckets or ({},)
    labels = ["-".join(f"{k}{v}" for k, v in b.items()) or "fixed" for b in buckets]
    card = evidence.environment.card
    versions = evidence.environment.versions
    own = evidence.reference_error
    lines = [
        f"## {evidence.model}",
        "",
        f"{card.name if card else evidence.environment.cpu}, driver {card.driver if card else '-'}, "
        f"torch {versions['torch']}, search {evidence.seconds:.0f} s, "
        f"error of fp32 itself {'not defined' if own is None else format(own, '.1e')}",
        "",
        "| recipe | verdict | " + " | ".join(f"{x} ms" for x in labels) + " | rel. error | top-1 | peak MiB |",
        "|---|---|" + "---:|" * (len(labels) + 3),
    ]
    best = {str(r.bucket): r.variants[0] for r in evidence.ranks if r.variants}
    for c in evidence.candidates:
        cells = []
        for b in buckets:
            t = evidence.timing(c.id, b)
            text = f"{t.median_ms:.3f}" if t else ""
            cells.append(f"**{text}**" if best.get(str(b)) == c.id else text)
        tops = [e.top1_agreement for e in c.errors if e.top1_agreement is not None]
        why = "" if c.verdict.reason in ("ok", "slower") else f": {c.verdict.detail[:90]}"
        detail = c.verdict.reason + why
        error = f"{c.worst_error:.1e}" if c.errors else ""
        top = f"{min(tops):.3f}" if tops else ""
        peak = f"{c.measurement.peak_bytes >> 20}" if c.measurement.timings else ""
        lines.append(f"| {c.id} | {detail} | " + " | ".join(cells) + f" | {error} | {top} | {peak} |")
    for r in evidence.ranks:
        if r.variants:
            lines.append(f"\n{r.bucket}: **{r.variants[0]}**, {r.speedup:.2f} times the original, noise {r.noise:.1%}")
    lines += ["", *(f"- {note}" for note in evidence.notes)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--recipes", nargs="+", default=[])
    parser.add_argument("--effort", choices=EFFORTS, default="full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, default=900.0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as work:
        for name in arguments.models:
            print(f"{name}:", flush=True)
            try:
                evidence = search(name, arguments, Path(work))
            except OnecardError as error:
                print(f"  failed: {error}", flush=True)
                continue
            (arguments.out / f"{name}.json").write_bytes(without_logs(evidence))
            lines = table(evidence)
            (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
