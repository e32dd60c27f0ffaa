"""What the engine itself costs: requests through a model that computes nothing.

    python benchmarks/cpu_engine.py --out benchmarks/results/cpu

Each row is one way to use it. ``rate`` is requests a second from the first ``submit`` to the last answer, ``cpu`` the
processor time of the whole process for each of them, callers included; the best of ``--rounds``, all of which are in
the JSON. The row "one at a time" is the latency of a caller that waits. No request is dropped: each answer is compared
with its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch

from onecard.environment import detect
from onecard.evidence import to_json
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.spec import TensorSpec, parse_spec

SPEC = msgspec.structs.replace(
    parse_spec(["x: float32[B,16], B=1..64"]), outputs=(TensorSpec("y", "float32", ("B", 16)),)
)
IN_FLIGHT = 512  # requests a caller has waiting at once


def open_engine() -> Engine:
    model = NullModel(SPEC, batches=(1, 8, 64), compute=lambda inputs: {"y": inputs["x"] + 1})
    return Engine([model], EngineOptions(policy=BatchPolicy(queue_items=1_000_000)))


def row_of(tag: int) -> np.ndarray:
    return np.full((1, 16), tag % 8192, dtype=np.float32)


def check(answer: dict[str, np.ndarray], tag: int) -> None:
    if answer["y"].shape != (1, 16) or answer["y"][0, 0] != tag % 8192 + 1:
        raise SystemExit(f"request {tag} was given another's answer: {answer['y'][0, 0]}")


def submitting(engine: Engine, requests: int, offset: int = 0) -> None:
    """One thread, always IN_FLIGHT requests ahead of the answer that it waits for."""
    waiting = []
    for tag in range(offset, offset + requests):
        waiting.append(engine.submit({"x": row_of(tag)}))
        if len(waiting) == IN_FLIGHT:
            for at, answer in enumerate(waiting):
                check(answer.result(), tag - IN_FLIGHT + 1 + at)
            waiting = []
    for at, answer in enumerate(waiting):
        check(answer.result(), offset + requests - len(waiting) + at)


def threads(engine: Engine, requests: int) -> None:
    each = requests // 4
    workers = [threading.Thread(target=submitting, args=(engine, each, n * each)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def event_loop(engine: Engine, requests: int) -> None:
    async def caller(number: int, each: int) -> None:
        for tag in range(number * each, (number + 1) * each):
            check(await engine.infer_async({"x": row_of(tag)}), tag)

    async def main() -> None:
        await asyncio.gather(*(caller(number, requests // 256) for number in range(256)))

    asyncio.run(main())


def one_at_a_time(engine: Engine, requests: int) -> None:
    for tag in range(requests // 20):
        check(engine.infer({"x": row_of(tag)}), tag)


WAYS: dict[str, tuple[Callable[[Engine, int], None], float]] = {
    "submit, one thread": (submitting, 1.0),
    "submit, four threads": (threads, 1.0),
    "256 tasks in an event loop": (event_loop, 256 / 256),
    "one at a time": (one_at_a_time, 1 / 20),
}
"""What is measured, and the share of the requests that it makes."""


def measure(run: Callable[[Engine, int], None], requests: int, share: float) -> dict[str, float]:
    with open_engine() as engine:
        run(engine, max(1024, requests // 20))
        wall, cpu = time.perf_counter(), time.process_time()
        run(engine, requests)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        batches = engine.queued
    made = requests * share
    return {"rate": made / wall, "cpu_us": cpu / made * 1e6, "latency_us": wall / made * 1e6, "left": batches[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(arguments.rounds):
        for name, (run, share) in WAYS.items():
            rounds[name].append(measure(run, arguments.requests, share))
            print(f"{name}: {rounds[name][-1]['rate']:,.0f}/s", file=sys.stderr)
    lines = ["| null model, one row a request | requests/s | µs of CPU each |", "|---|---|---|"]
    for name, found in rounds.items():
        best = max(found, key=lambda r: r["rate"])
        what = f"{name} ({best['latency_us']:.0f} µs)" if name == "one at a time" else name
        lines.append(f"| {what} | {best['rate']:,.0f} | {best['cpu_us']:.1f} |")
    command = shlex.join(["python", *sys.argv])
    print("\n".join(lines))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        environment = json.loads(to_json(detect("cpu")))
        result = {"command": command, "environment": environment, "requests": arguments.requests, "rounds": rounds}
        (arguments.out / "engine.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "engine.md").write_text("\n".join([*lines, "", f"`{command}`", ""]))


if __name__ == "__main__":
    main()
