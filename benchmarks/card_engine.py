"""From host memory to host memory: what overlap, pinned memory and bytes instead of floats gain on a card.

    python benchmarks/card_engine.py --out benchmarks/results/nvidia-h200 --batch 64

One model (random weights), one variant, one batch size; all roads are timed in turn, round after round, so that the
card's clocks favour none, and the answers of each are compared with those of the first. ``compute`` is the variant
alone on inputs that lie on the card already: nothing can be faster. ``in turn`` copies in, computes and copies out,
one behind the other; ``three streams`` is the engine's stage; ``engine`` is the same through requests. A torch
profiler's trace of the three streams is drawn as ``engine-timeline.svg``. ``--small`` tries it all on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from card_models import Watch, describe
from timeline import draw, overlap, read_trace
from torch import Tensor

from onecard.api import make_bundle, prepare
from onecard.environment import detect
from onecard.evidence import to_json
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.entries import Source
from onecard.runtime.ingest import Picture
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.served import BundleModel
from onecard.runtime.stages import open_stage
from onecard.runtime.staging import Stage
from onecard.search.job import EffortSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = "cudagraph.inductor+channels_last+fold_bn+fp16@bucket"
SMALL_SIDE = 32


def make(arguments: argparse.Namespace, work: Path) -> Path:
    """A bundle with the one variant that is measured, beside the original."""
    if arguments.small:
        high = arguments.batch
        reference, inputs = (
            f"{Path(__file__).with_name('random_models.py')}:small_cnn",
            [f"x: float32[B,3,{SMALL_SIDE},{SMALL_SIDE}], B=1..{high}"],
        )
    else:
        reference, inputs = describe(arguments.model, [arguments.batch], work)
    options = {
        "batches": (arguments.batch,),
        "recipes": ("eager+channels_last",) if arguments.small else (arguments.recipe,),
        "effort": EffortSpec(0.3, 0.2, 0.2, 2),
        "candidate_time_limit_s": 200.0,
    }
    torch.manual_seed(0)
    model, settled = prepare(
        reference, device="cpu" if arguments.small else arguments.device, inputs=inputs, options=options
    )
    out, _ = make_bundle(model, settled, output=work / "engine.onecard", command="benchmark", observe=Watch())
    return out


class Roads:
    """All ways from the same pictures to the same answers.

    Args:
        model: opened.
        batch: rows of each call.
        calls: in one timing.
    """

    def __init__(self, model: BundleModel, batch: int, calls: int) -> None:
        self.model, self.batch, self.calls = model, batch, calls
        self.spec = model.spec.inputs[0]
        self.size = model.fit(batch, ())
        shape = self.spec.concrete(self.size)
        generator = torch.Generator().manual_seed(1)
        height_first = (shape[0], shape[2], shape[3], shape[1])
        self.bytes = torch.randint(0, 256, height_first, dtype=torch.uint8, generator=generator)
        self.picture = Picture.unit(self.spec.name, MEAN, STD)
        self.floats = torch.empty(shape)
        self.picture(self.bytes, self.floats)
        self.on_card = model.device != "cpu"
        self.pinned = {
            n: (t.pin_memory() if self.on_card else t.clone()) for n, t in (("f", self.floats), ("b", self.bytes))
        }
        self.floats_there = self.floats.to(model.device)
        self.answers: dict[str, dict[str, Tensor]] = {}
        options = EngineOptions(policy=BatchPolicy(max_rows=batch), ingest=(self.picture,))
        self.ring = open_stage(model, options)
        self.single = open_stage(model, EngineOptions(policy=options.policy, ingest=options.ingest, depth=1))

    def compute(self) -> None:
        for _ in range(self.calls):
            answer = self.model.run({self.spec.name: self.floats_there}, self.size)
        self._synchronize()
        self.answers["compute"] = {name: t.float().cpu() for name, t in answer.items()}

    def plain(self) -> None:
        for _ in range(self.calls):
            given = self.floats.to(self.model.device)
            answer = {n: t.cpu() for n, t in self.model.run({self.spec.name: given}, self.size).items()}
        self.answers["pageable, in turn"] = answer

    def in_turn(self) -> None:
        self._fly(self.single, self.pinned["f"], "pinned, in turn", 1)

    def in_turn_bytes(self) -> None:
        self._fly(self.single, self.pinned["b"], "bytes, in turn", 1)

    def streams(self) -> None:
        self._fly(self.ring, self.pinned["f"], "three streams", self.ring.depth)

    def streams_gathered(self) -> None:
        self._fly(self.ring, self.floats, "three streams, pageable", self.ring.depth)

    def streams_bytes(self) -> None:
        self._fly(self.ring, self.pinned["b"], "three streams, bytes", self.ring.depth)

    def _fly(self, stage: Stage, rows: Tensor, name: str, ahead: int) -> None:
        """Keep so many flights under way."""
        source = [Source({self.spec.name: rows}, 0, self.batch)]
        under_way: deque[Any] = deque()
        for _ in range(self.calls):
            if len(under_way) == ahead:
                self._land(under_way.popleft(), name)
            under_way.append(stage.launch(source, self.batch, self.size))
        while under_way:
            self._land(under_way.popleft(), name)

    def _land(self, flight: Any, name: str) -> None:
        flight.wait()
        if name not in self.answers:
            self.answers[name] = {n: t.clone() for n, t in flight.outputs.items()}
        flight.release()

    def _synchronize(self) -> None:
        if self.on_card:
            torch.cuda.synchronize(self.model.device)

    def close(self) -> None:
        self.ring.close()
        self.single.close()


def through_engine(engine: Engine, name: str, rows: Tensor, calls: int) -> dict[str, Tensor]:
    """Requests of a whole batch each, a few ahead of the answer that is waited for."""
    waiting: deque[Any] = deque()
    for _ in range(calls):
        if len(waiting) == 6:
            waiting.popleft().result()
        waiting.append(engine.submit({name: rows}))
    return [answer.result() for answer in waiting][-1]


def time_all(roads: Roads, engine: Engine, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a batch of every road in every round."""
    name = roads.spec.name
    ways: dict[str, Callable[[], Any]] = {
        "compute": roads.compute,
        "pageable, in turn": roads.plain,
        "pinned, in turn": roads.in_turn,
        "bytes, in turn": roads.in_turn_bytes,
        "three streams, pageable": roads.streams_gathered,
        "three streams": roads.streams,
        "three streams, bytes": roads.streams_bytes,
        "engine": lambda: roads.answers.update(engine=through_engine(engine, name, roads.pinned["f"], roads.calls)),
        "engine, bytes": lambda: roads.answers.update(
            {"engine, bytes": through_engine(engine, name, roads.pinned["b"], roads.calls)}
        ),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            if turn:  # the first pays for what is made lazily
                found[way].append((time.perf_counter() - began) * 1e3 / roads.calls)
    return found


def worst_difference(roads: Roads) -> dict[str, float]:
    """Of every road's answers from the first's, relative L2."""
    first = roads.answers["compute"]
    worst = {}
    for way, answer in roads.answers.items():
        errors = [((answer[n].float() - t).norm() / t.norm()).item() for n, t in first.items()]
        worst[way] = max(errors)
    return worst


def profile(roads: Roads, folder: Path) -> tuple[str, float]:
    """The timeline of the three streams as SVG, and the share of copying that computation hides."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    roads.streams()
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        roads.streams()
    trace = folder / "trace.json"
    recorded.export_chrome_trace(str(trace))
    spans = read_trace(trace)
    batches_us = 5 * (spans[-1].end - spans[0].start) / roads.calls
    return draw(spans, f"Five batches of {roads.batch} pictures on three streams", batches_us), overlap(spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="a small model on the CPU, to try the script")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as folder:
        work = Path(folder)
        bundle = make(arguments, work)
        model = BundleModel.open(bundle, "cpu" if arguments.small else arguments.device)
        roads = Roads(model, arguments.batch, arguments.calls)
        options = EngineOptions(policy=BatchPolicy(max_rows=arguments.batch), ingest=(roads.picture,))
        with Engine([BundleModel.open(bundle, model.device)], options) as engine:
            found = time_all(roads, engine, arguments.rounds)
        errors = worst_difference(roads)
        svg, hidden = profile(roads, work) if roads.on_card else ("", 0.0)
        variant = model.variant(roads.size)
        roads.close()
        model.close()
    environment = detect(model.device)
    card = environment.card
    medians = {way: statistics.median(times) for way, times in found.items()}
    command = shlex.join(["python", "benchmarks/card_engine.py", *sys.argv[1:]])
    lines = [
        f"## {arguments.model if not arguments.small else 'a small CNN'}, batch {arguments.batch}, host to host",
        "",
        f"{card.name if card else environment.cpu}, driver {card.driver if card else '-'}, "
        f"torch {environment.versions['torch']}, {variant}, median of {arguments.rounds} rounds of {arguments.calls}: "
        f"`{command}`",
        "",
        "| road | ms a batch | of compute's throughput | of in turn | rel. difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, median in medians.items():
        lines.append(
            f"| {way} | {median:.3f} | {medians['compute'] / median:.1%} | "
            f"{median / medians['pinned, in turn'] - 1:+.1%} | {errors[way]:.1e} |"
        )
    if svg:
        lines += ["", f"Share of the copying that computation hides, from the trace: {hidden:.1%}"]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {"command": command, "variant": variant, "environment": json.loads(to_json(environment))}
        result |= {"batch": arguments.batch, "ms": found, "differences": errors, "hidden": hidden}
        (arguments.out / "engine.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "engine.md").write_text("\n".join(lines) + "\n")
        if svg:
            (arguments.out / "engine-timeline.svg").write_text(svg)


if __name__ == "__main__":
    main()
