"""ResNet-50 behind the server on a card: pictures as bytes, 8 a request, beside the same engine without a server.

    python benchmarks/card_serving.py --out benchmarks/results/nvidia-h200

``engine, offline`` is the engine in a process with requests that fill its largest batch. The other rows: requests of
``--rows`` pictures, in a process, through HTTP (binary bodies) with so many front processes, and through HTTP with the
pictures and answers in the system's shared memory. The engine alone shares its process with who asks; behind the server
it does not. All send the pictures as uint8 NHWC; the card normalises them. The load comes from ``--clients`` processes
over loopback, each with 16 requests under way. Sides are measured in turn, round after round, medians shown.
``--small`` tries it all on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cpu_server import post
from cpu_serving import closed_loop, ready_port

INGEST = "image=uint8 NHWC mean=0.485,0.456,0.406 std=0.229,0.224,0.225"
RECIPE = "cudagraph.inductor+channels_last+fold_bn+fp16@bucket"
BATCHES = (1, 8, 64)
CLASSES = {"resnet50": 1000, "small_cnn": 10}
UNDER_WAY = 64
PREFIX = "onecard-bench-"


def make(model_name: str, work: Path) -> Path:
    """A bundle with the one variant that is served, beside the original."""
    from card_models import Watch

    from onecard.api import make_bundle, prepare
    from onecard.search.job import EffortSpec

    small = model_name == "small_cnn"
    reference = f"{Path(__file__).with_name('random_models.py')}:small_cnn" if small else f"torchvision:{model_name}"
    model, settled = prepare(
        reference,
        device="cpu" if small else "auto",
        inputs=[f"image: float32[B,3,224,224], B=1..{max(BATCHES)}"],
        options={
            "batches": BATCHES,
            "recipes": ("eager+channels_last",) if small else (RECIPE,),
            "effort": EffortSpec(0.3, 0.2, 0.2, 2),
            "candidate_time_limit_s": 200.0,
        },
    )
    return make_bundle(model, settled, output=work / "model.onecard", command="benchmark", observe=Watch())[0]


def pictures(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, 224, 224, 3), dtype=np.uint8)


# In a process


def engine_side(bundle: str, device: str, rows: int, seconds: float, told: Any) -> None:
    """Pictures a second of an engine that is never without work."""
    import torch

    from onecard.runtime.engine import Engine, EngineOptions
    from onecard.runtime.ingest_text import make_ingests

    inputs = {"image": torch.from_numpy(pictures(rows))}
    with Engine.open(Path(bundle), device, EngineOptions(ingest=make_ingests([INGEST]))) as engine:
        free = threading.Semaphore(UNDER_WAY)

        def run(limit_s: float) -> float:
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < limit_s:
                free.acquire()
                engine.submit(inputs).add_done_callback(lambda _: free.release())
                count += rows
            for _ in range(UNDER_WAY):
                free.acquire()
            spent = time.perf_counter() - began
            for _ in range(UNDER_WAY):
                free.release()
            return count / spent

        run(1.0)
        told.send(run(seconds))


# Through the server


def request(rows: int, classes: int, shared: bool) -> bytes:
    """A request with its pictures in the body, or in shared memory with a place for the answer."""
    body = b"" if shared else pictures(rows).tobytes()
    where = (
        {"shared_memory_region": "pictures", "shared_memory_byte_size": rows * 224 * 224 * 3}
        if shared
        else {"binary_data_size": len(body)}
    )
    head: dict[str, Any] = {
        "inputs": [{"name": "image", "shape": [rows, 224, 224, 3], "datatype": "UINT8", "parameters": where}]
    }
    if shared:
        place = {"shared_memory_region": "answers", "shared_memory_byte_size": rows * classes * 4}
        head["outputs"] = [{"name": "output", "parameters": place}]
    else:
        head["parameters"] = {"binary_data_output": True}
    text = json.dumps(head).encode()
    lines = (
        "POST /v2/models/m/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Length: {len(text) + len(body)}\r\nInference-Header-Content-Length: {len(text)}\r\n\r\n"
    )
    return lines.encode() + text + body


@contextlib.contextmanager
def shared_memory(port: int, rows: int, classes: int) -> Iterator[None]:
    """The two regions, made and registered."""
    contents = {"pictures": pictures(rows).tobytes(), "answers": bytes(rows * classes * 4)}
    paths = {name: Path("/dev/shm") / f"{PREFIX}{os.getpid()}-{name}" for name in contents}
    try:
        for name, path in paths.items():
            path.write_bytes(contents[name])
            said = {"key": f"/{path.name}", "offset": 0, "byte_size": len(contents[name])}
            post(port, f"region/{name}/register", said)
        yield
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def client(port: int, payload: bytes, seconds: float, told: Any) -> None:
    """One process of the load: requests a second."""
    told.send(asyncio.run(closed_loop(port, payload, seconds)))


def ask(port: int, payload: bytes, seconds: float, clients: int) -> float:
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe() for _ in range(clients)]
    processes = [fork.Process(target=client, args=(port, payload, seconds, told)) for _, told in pipes]
    for process in processes:
        process.start()
    rates = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    return sum(rates)


def server_rate(arguments: argparse.Namespace, bundle: Path, classes: int, workers: int, shared: bool) -> float:
    """Pictures a second through ``onecard serve``."""
    words = [sys.executable, "-W", "ignore", "-m", "onecard", "serve", f"m={bundle}"]
    words += ["--http-port", "0", "--no-grpc", "--metrics-port", "-1", "--ingest", INGEST]
    words += ["--workers", str(workers), "--device", arguments.device]
    words += ["--shared-memory-prefix", PREFIX] if shared else []
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        port = ready_port(server)
        with shared_memory(port, arguments.rows, classes) if shared else contextlib.nullcontext():
            payload = request(arguments.rows, classes, shared)
            ask(port, payload, 1.5, arguments.clients)
            return ask(port, payload, arguments.seconds, arguments.clients) * arguments.rows
    finally:
        server.terminate()
        server.wait(60)


def engine_rate(arguments: argparse.Namespace, bundle: Path, rows: int) -> float:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    given = (str(bundle), arguments.device, rows, arguments.seconds, theirs)
    process = spawn.Process(target=engine_side, args=given)
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="one made before, of the same model, for batches of 1 to 64")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model on the CPU, to try the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.device = "cpu" if arguments.small else "auto"
    name = "small_cnn" if arguments.small else "resnet50"
    classes = CLASSES[name]
    found: dict[str, list[float]] = {}

    def add(side: str, rate: float) -> None:
        found.setdefault(side, []).append(rate)
        print(f"{side}: {rate:,.0f} pictures/s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        bundle = arguments.bundle or make(name, Path(folder))
        for _ in range(arguments.rounds):
            add("engine, offline", engine_rate(arguments, bundle, max(BATCHES)))
            add(f"engine, {arguments.rows} a request", engine_rate(arguments, bundle, arguments.rows))
            for workers in arguments.workers:
                plural = "es" if workers > 1 else ""
                add(f"HTTP, {workers} front process{plural}", server_rate(arguments, bundle, classes, workers, False))
            add("shared memory, 1 front process", server_rate(arguments, bundle, classes, 1, True))
    from onecard.environment import detect
    from onecard.evidence import to_json

    environment = detect("cpu" if arguments.small else "cuda:0")
    card = environment.card
    command = shlex.join(["python", "benchmarks/card_serving.py", *sys.argv[1:]])
    medians = {side: statistics.median(rates) for side, rates in found.items()}
    lines = [
        f"## {name} behind the server, {arguments.rows} pictures a request as uint8",
        "",
        f"{card.name if card else environment.cpu}, driver {card.driver if card else '-'}, "
        f"torch {environment.versions['torch']}, {environment.cores} cores, clients on the same machine, random "
        f"weights, medians of {arguments.rounds} rounds of {arguments.seconds:g} s: `{command}`",
        "",
        "| | pictures/s | of the offline rate |",
        "|---|---:|---:|",
        *(f"| {side} | {rate:,.0f} | {rate / medians['engine, offline']:.1%} |" for side, rate in medians.items()),
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {"command": command, "environment": json.loads(to_json(environment)), "pictures_per_s": found}
        (arguments.out / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "serving.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
