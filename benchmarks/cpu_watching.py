"""What it costs that a server can be watched: EfficientNet-Lite0 through HTTP, counted and scraped and not.

    python benchmarks/cpu_watching.py --out benchmarks/results/cpu

``nothing`` is the server with its counting taken out, in both processes, that nobody asks; ``counted`` is the server as
it is; ``scraped`` is asked for its metrics every five seconds, three times as often as Prometheus does by default;
``sentinel`` lets the original, loaded before, answer one request in a thousand again, scraped too. One server is told
which to be: two of a kind differ by more than what is measured here. It is each of them for five seconds under
load, 16 requests of one picture under way, in an order that changes from round to round, and is started anew after some
rounds. The ratio is the median over the rounds of each round's own ratio, with the interval that holds it in 95 of 100
resamplings of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
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
ENGINE = "--engine"
SENTINEL = 1000
REQUEST = request_bytes(floats=True)
SLICE_S = 5.0
SCRAPE_AFTER_S = 2.0
ROUNDS_A_SERVER = 4
WHAT_TO_BE = "ONECARD_BENCH_VARIANT"
"""Names a file with the variant that both processes of the server are to be."""


def obey() -> None:
    """From now on be what the file says, looking ten times a second."""
    from onecard.runtime.sentinel import Sentinel
    from onecard.server.counters import Counters
    from onecard.server.request_figures import RequestFigures

    counting = ((RequestFigures, ("began", "answered", "failed")), (Counters, ("came", "ended", "ran")))
    own = {(kind, name): getattr(kind, name) for kind, names in counting for name in names}
    offer = Sentinel.offer
    path = Path(os.environ[WHAT_TO_BE])

    def nothing(*_: Any, **__: Any) -> None:
        return

    def watch() -> None:
        before = ""
        while True:
            if (variant := path.read_text()) != before:
                for (kind, name), method in own.items():
                    setattr(kind, name, nothing if variant == "nothing" else method)
                Sentinel.offer = offer if variant == "sentinel" else nothing  # type: ignore[method-assign]
                before = variant
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()


def serve(bundle: Path, ready: Any) -> None:
    """The server's own process; its engine's is this script, too."""
    from onecard.ipc.models import ModelOptions
    from onecard.server.http_server import Listen
    from onecard.server.repository import Source
    from onecard.server.serve import ServeOptions, run_server

    class Announce:
        def listening(self, server: Any) -> None:
            self.port = server.port

        def listening_metrics(self, port: int) -> None:
            self.metrics = port

        def ready(self, serving: Any) -> None:
            ready.send((self.port, self.metrics))

    obey()
    sources = {"m": Source(bundle, ModelOptions(sentinel=SENTINEL))}
    engine = (sys.executable, __file__, ENGINE)
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
    """A server that was started for this."""

    port: int
    metrics: int
    what_to_be: Path

    def rate(self, variant: str) -> float:
        """Rows a second as such a server, under load for a slice of time."""
        self.what_to_be.write_text(variant)
        asyncio.run(closed_loop(self.port, REQUEST, 0.5))  # long enough for both processes to have seen it
        with scraping(self.metrics) if variant in ("scraped", "sentinel") else contextlib.nullcontext():
            return asyncio.run(closed_loop(self.port, REQUEST, SLICE_S))


@contextlib.contextmanager
def running(bundle: Path) -> Iterator[Running]:
    """A server whose original has answered a request already."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    what_to_be = bundle.with_name("variant")
    what_to_be.write_text("sentinel")
    os.environ[WHAT_TO_BE] = str(what_to_be)
    process = spawn.Process(target=serve, args=(bundle, theirs))
    process.start()
    theirs.close()
    try:
        port, metrics = ours.recv()
        load = threading.Thread(target=lambda: asyncio.run(closed_loop(port, REQUEST, 10.0)))
        load.start()
        wait_for_the_original(metrics)
        load.join()
        yield Running(port, metrics, what_to_be)
    finally:
        process.terminate()
        process.join(60)


def interval(shares: list[float]) -> tuple[float, float]:
    """Where the median lies in 95 of 100 resamplings."""
    chance = random.Random(0)
    found = sorted(statistics.median(chance.choices(shares, k=len(shares))) for _ in range(2000))
    return found[50], found[-50]


def main() -> None:
    if ENGINE in sys.argv:
        sys.argv.remove(ENGINE)
        obey()
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
        for round_ in range(arguments.rounds):
            if round_ % ROUNDS_A_SERVER == 0:
                server = stack.enter_context(contextlib.ExitStack())
                one = server.enter_context(running(bundle))
            chance.shuffle(order)
            for variant in order:
                rates[variant].append(one.rate(variant))
            said = ", ".join(f"{variant} {rates[variant][-1]:.1f}" for variant in VARIANTS)
            print(f"round {round_ + 1} of {arguments.rounds}: {said} rows/s", file=sys.stderr, flush=True)
            if round_ % ROUNDS_A_SERVER == ROUNDS_A_SERVER - 1:
                server.close()
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
