"""What is lost on the way through the server: EfficientNet-Lite0 through HTTP beside the same engine in a process.

    python benchmarks/cpu_serving.py --out benchmarks/results/cpu

Each measurement starts its side anew, in turn, round after round. At saturation 16 requests of one picture are under
way all the time. Latency is at 70 % of the engine's own rate, at random times (Poisson) that do not wait for answers,
and counts from when a request was due. The client of the server is one more process on the same cores.

Pictures travel as a decoder gives them, bytes in NHWC, which both sides' engines normalise (``--ingest``), or with
``--floats`` as the four times larger tensors that the model takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
UNDER_WAY = 16
CONNECTIONS = 64
SHARE = 0.7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PORT = re.compile(r"listening on 127\.0\.0\.1 port (\d+)")


def make(work: Path, recipes: tuple[str, ...]) -> Path:
    """A bundle for batches of 1 to 8."""
    from card_models import Watch

    from onecard.api import make_bundle, prepare

    model, settled = prepare(
        f"{ROOT / 'examples' / 'efficientnet_lite0.py'}:model",
        device="cpu",
        inputs="image: float32[B,3,224,224], B=1..8",
        options={"batches": (1, 8), "recipes": recipes},
    )
    return make_bundle(model, settled, output=work / "efficientnet.onecard", observe=Watch(), command="benchmark")[0]


def picture(floats: bool) -> np.ndarray:
    chance = np.random.default_rng(0)
    if floats:
        return chance.standard_normal((1, 3, 224, 224), dtype=np.float32)
    return chance.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)


def arrivals(rate: float, seconds: float) -> list[float]:
    """Poisson times from 0 on."""
    chance, times = random.Random(1), [0.0]
    while times[-1] < seconds:
        times.append(times[-1] + chance.expovariate(rate))
    return times


# In a process


def engine_side(bundle: Path, floats: bool, rate: float | None, seconds: float, told: Any) -> None:
    """Rows a second, or latencies at a rate."""
    from onecard.runtime.engine import Engine, EngineOptions
    from onecard.runtime.ingest import Picture

    inputs = {"image": picture(floats)}
    options = None if floats else EngineOptions(ingest=(Picture.unit("image", MEAN, STD),))
    with Engine.open(bundle, "cpu", options) as engine:
        if rate is None:
            engine_rate(engine, inputs, 1.0)
            told.send(engine_rate(engine, inputs, seconds))
        else:
            told.send(engine_latencies(engine, inputs, arrivals(rate, seconds)))


def engine_rate(engine: Any, inputs: Any, seconds: float) -> float:
    free = threading.Semaphore(UNDER_WAY)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        free.acquire()
        engine.submit(inputs).add_done_callback(lambda _: free.release())
        count += 1
    for _ in range(UNDER_WAY):
        free.acquire()
    return count / (time.perf_counter() - began)


def engine_latencies(engine: Any, inputs: Any, times: list[float]) -> list[float]:
    found: list[float] = []
    waiting = []
    began = time.perf_counter() + 0.1
    for at in times:
        due = began + at
        time.sleep(max(0.0, due - time.perf_counter()))
        answer = engine.submit(inputs)
        answer.add_done_callback(lambda _, due=due: found.append(time.perf_counter() - due))
        waiting.append(answer)
    for answer in waiting:
        answer.result()
    return found


# Through HTTP


def server_side(bundle: Path, floats: bool, rate: float | None, seconds: float, told: Any) -> None:
    """The same through ``onecard serve``."""
    words = [
        sys.executable,
        "-m",
        "onecard",
        "serve",
        f"m={bundle}",
        "--http-port",
        "0",
        "--no-grpc",
        "--metrics-port",
        "-1",
    ]
    if not floats:
        mean, std = (",".join(str(value) for value in values) for values in (MEAN, STD))
        words += ["--ingest", f"image=uint8 NHWC mean={mean} std={std}"]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        told.send(asyncio.run(client(ready_port(server), floats, rate, seconds)))
    finally:
        server.terminate()
        server.wait(60)


def ready_port(server: subprocess.Popen[str]) -> int:
    port = 0
    assert server.stderr is not None
    for line in server.stderr:
        port = int(found[1]) if (found := _PORT.search(line)) else port
        if line.startswith("ready"):
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return port
    raise SystemExit("the server did not start")


def request_bytes(floats: bool) -> bytes:
    array = picture(floats)
    data = array.tobytes()
    tensor = {"name": "image", "shape": array.shape, "datatype": "FP32" if floats else "UINT8"}
    head = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    lines = (
        "POST /v2/models/m/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Length: {len(text) + len(data)}\r\nInference-Header-Content-Length: {len(text)}\r\n\r\n"
    )
    return lines.encode() + text + data


class Connection:
    """One connection; one request at a time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = bytearray(1 << 16)

    async def ask(self, payload: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, payload)
        got = await loop.sock_recv_into(self._socket, self._memory)
        end = self._memory.find(b"\r\n\r\n", 0, got)
        if not self._memory.startswith(b"HTTP/1.1 200") or end < 0:
            raise SystemExit(f"not answered: {bytes(self._memory[: min(got, 300)])!r}")
        length = int(bytes(self._memory[:end]).lower().split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
        missing = end + 4 + length - got
        while missing > 0:
            missing -= await loop.sock_recv_into(self._socket, self._memory)


async def client(port: int, floats: bool, rate: float | None, seconds: float) -> Any:
    payload = request_bytes(floats)
    if rate is None:
        await closed_loop(port, payload, 1.0)
        return await closed_loop(port, payload, seconds)
    idle = [Connection(port) for _ in range(CONNECTIONS)]
    await asyncio.gather(*(connection.ask(payload) for connection in idle[:UNDER_WAY]))
    found: list[float] = []
    free = asyncio.Semaphore(CONNECTIONS)

    async def one(due: float) -> None:
        async with free:
            connection = idle.pop()
            await connection.ask(payload)
            found.append(time.perf_counter() - due)
            idle.append(connection)

    began, tasks = time.perf_counter() + 0.1, []
    for at in arrivals(rate, seconds):
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(began + at)))
    await asyncio.gather(*tasks)
    return found


async def closed_loop(port: int, payload: bytes, seconds: float) -> float:
    began = time.perf_counter()

    async def one() -> int:
        connection, count = Connection(port), 0
        while time.perf_counter() - began < seconds:
            await connection.ask(payload)
            count += 1
        return count

    counts = await asyncio.gather(*(one() for _ in range(UNDER_WAY)))
    return sum(counts) / (time.perf_counter() - began)


SIDES: dict[str, Callable[..., None]] = {"engine": engine_side, "HTTP": server_side}


def measure(side: str, bundle: Path, floats: bool, rate: float | None, seconds: float) -> Any:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=SIDES[side], args=(bundle, floats, rate, seconds, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["openvino*", "onnxruntime*"])
    parser.add_argument("--floats", action="store_true", help="pictures as float32, 602 KB, instead of bytes, 151 KB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    p99s: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="onecard-bench-") as folder:
        bundle = make(Path(folder), tuple(arguments.recipes))
        for _ in range(arguments.rounds):
            for side in SIDES:
                rates[side].append(measure(side, bundle, arguments.floats, None, arguments.seconds))
                print(f"{side}: {rates[side][-1]:.1f} rows/s", file=sys.stderr)
        load = SHARE * statistics.median(rates["engine"])
        for _ in range(arguments.rounds):
            for side in SIDES:
                found = measure(side, bundle, arguments.floats, load, arguments.seconds)
                p99s[side].append(float(np.quantile(found, 0.99)) * 1e3)
                print(f"{side}: p99 {p99s[side][-1]:.1f} ms of {len(found)}", file=sys.stderr)
    rate = {side: statistics.median(found) for side, found in rates.items()}
    p99 = {side: statistics.median(found) for side, found in p99s.items()}
    command = shlex.join(["python", "benchmarks/cpu_serving.py", *sys.argv[1:]])
    lines = [
        f"EfficientNet-Lite0, one picture a request, medians of {arguments.rounds} rounds: `{command}`",
        "",
        f"| | rows/s at saturation | of the engine's | p99 ms at {load:.0f} rows/s | of the engine's |",
        "|---|---:|---:|---:|---:|",
    ]
    for side in SIDES:
        lines.append(
            f"| {side} | {rate[side]:.1f} | {rate[side] / rate['engine']:.1%} | {p99[side]:.1f} | "
            f"{p99[side] / p99['engine']:.2f} |"
        )
    print("\n".join(lines))
    if arguments.out:
        from onecard.environment import detect
        from onecard.evidence import to_json

        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {"command": command, "environment": json.loads(to_json(detect("cpu"))), "rates": rates, "p99_ms": p99s}
        (arguments.out / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "serving.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
