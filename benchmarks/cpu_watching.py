"""What it costs that a server can be watched: EfficientNet-Lite0 through HTTP, counted and scraped and not.

    python benchmarks/cpu_watching.py --out benchmarks/results/cpu

``nothing`` is a server whose counting was taken out, in both processes, and that nobody asks; ``counted`` is the server
as it is; ``scraped`` is asked for its metrics every five seconds, three times as often as Prometheus does by default;
``sentinel`` lets the original, loaded before, answer one request in a thousand again, scraped too. Each measurement
starts its server anew, in turn, round after round; 16 requests of one picture are under way all the time. The ratio is
the median over the rounds of each round's own ratio, since what the machine gives changes from one minute to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import re
import shlex
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_serving import closed_loop, make, request_bytes

VARIANTS = ("nothing", "counted", "scraped", "sentinel")
BARE = "--bare"
SENTINEL = 1000
SCRAPE_S = 5.0


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
    from onecard.ipc.messages import ModelOptions
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
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(SCRAPE_S):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                assert b"onecard_requests_answered_total" in page.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def wait_for_the_original(port: int) -> None:
    """Until it has checked the first request."""
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            checked = re.search(rb"^onecard_sentinel_checked_total.* (\S+)$", page.read(), re.MULTILINE)
        if checked is not None and float(checked[1]) >= 1:
            return
        time.sleep(0.2)


def measure(bundle: Path, variant: str, seconds: float) -> float:
    """Rows a second."""
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
        asked = scraping(metrics) if variant in ("scraped", "sentinel") else contextlib.nullcontext()
        with asked:
            return asyncio.run(closed_loop(port, request_bytes(), seconds))
    finally:
        process.terminate()
        process.join(60)


def main() -> None:
    if BARE in sys.argv:
        sys.argv.remove(BARE)
        take_out_counting()
        from onecard.server.engine_process import main as engine_process

        engine_process()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=["openvino*", "onnxruntime*"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as folder:
        bundle = make(Path(folder), tuple(arguments.recipes))
        for round_ in range(arguments.rounds):
            turn = VARIANTS[round_ % len(VARIANTS) :] + VARIANTS[: round_ % len(VARIANTS)]
            for variant in turn:
                rates[variant].append(measure(bundle, variant, arguments.seconds))
                print(f"{variant}: {rates[variant][-1]:.1f} rows/s", file=sys.stderr)
    command = shlex.join(["python", "benchmarks/cpu_watching.py", *sys.argv[1:]])
    lines = [
        f"EfficientNet-Lite0 over HTTP, {arguments.rounds} rounds: `{command}`",
        "",
        "| | rows/s, median | of a server that counts nothing, median (least, most) |",
        "|---|---:|---:|",
    ]
    for variant, found in rates.items():
        shares = sorted(rate / bare for rate, bare in zip(found, rates["nothing"], strict=True))
        share = f"{statistics.median(shares):.1%} ({shares[0]:.1%}, {shares[-1]:.1%})"
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
