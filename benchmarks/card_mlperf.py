"""MLPerf's LoadGen on a card: ResNet-50 with random weights and pictures, one picture a sample, fp32 from host memory.

    python benchmarks/card_mlperf.py --seconds 60 --out benchmarks/results/nvidia-h200

SingleStream, Offline and Server; the Server's bound is MLPerf's own for this model (15 ms), its rate begins at a share
of the Offline rate and is lowered until LoadGen finds the bound kept. Weights and data are not MLPerf's, so the figures
are no MLPerf results. LoadGen's summaries go to ``mlperf/``, the table to ``mlperf.md``. ``--small`` tries it all on a
CPU. Needs the ``mlperf`` extra and torchvision.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path

from cpu_mlperf import SHARES, Subject, make, note, page, runs

HERE = Path(__file__).parent
RESNET = Subject(
    "torchvision:resnet50",
    "image: float32[B,3,224,224], B=1..64",
    f"{HERE / 'random_models.py'}:pictures",
    (1, 8, 64),
    0.015,
    labelled=False,
    device="auto",
)
SMALL = dataclasses.replace(RESNET, model=f"{HERE / 'random_models.py'}:small_cnn", batches=(1, 8), device="cpu")
RECIPE = "cudagraph.inductor+channels_last+fold_bn+fp16@bucket"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run, at least")
    parser.add_argument("--bundle", type=Path, help="one made before, for batches of 1 to 64")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the Offline rate, for the Server")
    parser.add_argument("--small", action="store_true", help="a small model on the CPU, to try the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name, subject = ("small", SMALL) if arguments.small else ("resnet50", RESNET)
    subject = dataclasses.replace(subject, shares=tuple(arguments.shares))
    recipes = ("eager+channels_last",) if arguments.small else (RECIPE,)
    command = shlex.join(["python", "benchmarks/card_mlperf.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as folder:
        work = Path(folder)
        bundle = arguments.bundle or make(name, subject, work, recipes)
        results = runs(name, subject, bundle, arguments.seconds, work)
        lines = page([note(results, name, work, arguments.out)], arguments.seconds, command)
    print("\n".join(lines))
    if arguments.out:
        (arguments.out / "mlperf.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
