"""What it costs that a server can be watched: EfficientNet-Lite0 through HTTP, counted and scraped and not.

    python benchmarks/cpu_watching.py --out benchmarks/results/cpu

``nothing`` is a server whose counting was taken out, in both processes, and that nobody asks; ``counted`` is the server
as it is; ``scraped`` is asked for its metrics every five seconds, three times as often as Prometheus does by default;
``sentinel`` lets the original, loaded before, answer one request in a thousand again, scraped too. All four run all the
time, and one after the other is under load for five seconds, 16 requests of one picture under way, in an order that
changes from round to round. The ratio is the median over the rounds of each round's own ratio, with the interval that
holds it in 95 of 100 resamplings of the rounds: what a machine gives changes by more than what is measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import re
import shlex
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_serving import closed_loop, make, request_bytes

VARIANTS = ("nothing", "counted", "scraped", "sentinel")
BARE = "--bare"
SENTINEL = 1000
SLICE_S = 5.0
SCRAPE_AFTER_S = 2.0


def take_out_counting() -> None:
    """From this process on, nothing is counted for metrics."""
    from onecard.server.counters import Counters
    from onecard.server.request_figures import RequestFigures

    def nothing(*_: Any, **__: Any) -> None:
        return

    for kind, names in ((RequestFigures, ("began", "answered", "failed")), (Counters, ("came", "ended", "ran"))):
        for name in names:
            setattr(kind, name, nothing)


def serve(bundle: Path, variant: str, ready: Any) -> None:
    from onecard.ipc.models import ModelOptions
    from onecard.server.http_server import Listen
    from onecard.server.repository import Source
    from onecard.server.serve import ENGINE_COMMAND, ServeOptions, run_server

    class Announce:
        def listening(self, server: Any) -> None:
            self.port = server.port

        def listening_metrics(self, port: int) -> None:
            self.metrics = port

        def ready(self, serving: Any) -> None:
            ready.send((self.port, self.metrics))

    engine = ENGINE_COMMAND
    if variant == "nothing":
        take_out_counting()
        engine = (sys.executable, __file__, BARE)
    model = ModelOptions(sentinel=SENTINEL) if variant == "sentinel" else ModelOptions()
    sources = {"m": Source(bundle, model)}
    run_server(ServeOptions(sources, Listen(port=0), engine=engine, metrics=Listen(port=0)), Announce())


@contextlib.contextmanager
def scraping(port: int) -> Iterator[None]:
    """One request for the metrics in a slice."""

    def scrape() -> None:
        time.sleep(SCRAPE_AFTER_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            assert b"onecard_requests_answered_total" in page.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def wait_for_the_original(port: int) -> None:
    """Until it has checked the first request."""
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            checked = re.search(rb"^onecard_sentinel_checked_total.* (\S+)$", page.read(), re.MULTILINE)
        if checked is not None and float(checked[1]) >= 1:
            return
        time.sleep(0.2)


@dataclass
class Running:
    """A server."""

    port: int
    metrics: int
    scraped: bool

    def rate(self, seconds: float) -> float:
        """Rows a second, under load for so long."""
        with scraping(self.metrics) if self.scraped else contextlib.nullcontext():
            return asyncio.run(closed_loop(self.port, request_bytes(), seconds))


@contextlib.contextmanager
def running(bundle: Path, variant: str) -> Iterator[Running]:
    """A server of this kind that has answered some requests."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(bundle, variant, theirs))
    process.start()
    theirs.close()
    try:
        port, metrics = ours.recv()
        asyncio.run(closed_loop(port, request_bytes(), 2.0))
        if variant == "sentinel":
            wait_for_the_original(metrics)
        yield Running(port, metrics, variant in ("scraped", "sentinel"))
    finally:
        process.terminate()
        process.join(60)


def interval(shares: list[float]) -> tuple[float, float]:
    """Where the median lies in 95 of 100 resamplings."""
    chance = random.Random(0)
    found = sorted(statistics.median(chance.choices(shares, k=len(shares))) for _ in range(2000))
    return found[50], found[-50]


def main() -> None:
    if BARE in sys.argv:
        sys.argv.remove(BARE)
        take_out_counting()
        from onecard.server.engine_process import main as engine_process

        engine_process()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24, help="of 20 seconds")
    parser.add_argument("--recipes", nargs="+", default=["openvino*", "onnxruntime*"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    order, chance = list(VARIANTS), random.Random(1)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="onecard-bench-"))
        bundle = make(Path(folder), tuple(arguments.recipes))
        servers = {variant: stack.enter_context(running(bundle, variant)) for variant in VARIANTS}
        for round_ in range(arguments.rounds):
            chance.shuffle(order)
            for variant in order:
                rates[variant].append(servers[variant].rate(SLICE_S))
            said = ", ".join(f"{variant} {rates[variant][-1]:.1f}" for variant in VARIANTS)
            print(f"round {round_ + 1} of {arguments.rounds}: {said} rows/s", file=sys.stderr, flush=True)
    command = shlex.join(["python", "benchmarks/cpu_watching.py", *sys.argv[1:]])
    lines = [
        f"EfficientNet-Lite0 over HTTP, {arguments.rounds} rounds: `{command}`",
        "",
        "| | rows/s, median | of a server that counts nothing, median (95 % interval) |",
        "|---|---:|---:|",
    ]
    for variant, found in rates.items():
        shares = [rate / bare for rate, bare in zip(found, rates["nothing"], strict=True)]
        low, high = interval(shares)
        share = f"{statistics.median(shares):.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {variant} | {statistics.median(found):.1f} | {share} |")
    print("\n".join(lines))
    if arguments.out:
        from onecard.environment import detect
        from onecard.evidence import to_json

        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {"command": command, "environment": json.loads(to_json(detect("cpu"))), "rates": rates}
        (arguments.out / "watching.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "watching.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
