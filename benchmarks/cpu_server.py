"""What the server costs at the door: pictures of 150,528 bytes, and a model that computes nothing.

    python benchmarks/cpu_server.py --out benchmarks/results/cpu

The load comes from a process of its own, 8 connections with one request each under way, over loopback, and is the same
bytes for all of a row. CPU is the processor time of all of a server's processes for each request. onecard's rows go
through everything: protocol, admission, shared memory, batching, staging, the answer; pictures come as HTTP's binary
data, as gRPC's raw contents, or lie in the system's shared memory, where the answer is written too. ``bare ASGI`` is
uvicorn with a handler that reads the body and answers 4,000 bytes, and nothing else, if uvicorn is installed; gRPC's
rate is as much its client's (grpc.aio). Rounds are interleaved, the best of each shown; all are in the JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shlex
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

CONNECTIONS = 8
PICTURE = 224 * 224 * 3
CLASSES = 1000
ASGI = "bare ASGI (uvicorn)"
PREFIX = "onecard-bench-"


def run_null_engine(socket_path: Path) -> None:
    """The engine's process: one model that computes nothing."""
    import msgspec
    import torch

    from onecard.runtime.engine import Engine, EngineOptions
    from onecard.runtime.limits import BatchPolicy
    from onecard.runtime.null import NullModel
    from onecard.server.engine_process import run_engine
    from onecard.spec import TensorSpec, parse_spec

    torch.set_num_threads(1)
    spec = msgspec.structs.replace(
        parse_spec(["image: uint8[B,224,224,3], B=1..64"]), outputs=(TensorSpec("scores", "float32", ("B", CLASSES)),)
    )

    def open_null(name: str, path: Path, options: Any, on_batch: Any) -> Engine:
        return Engine([NullModel(spec)], EngineOptions(policy=BatchPolicy(queue_wait_s=10.0)), on_batch)

    run_engine(socket_path, open_null)


def onecard_server(ready: Any, grpc: bool = False) -> None:
    from onecard.server.grpc_limits import GrpcListen
    from onecard.server.http_server import Listen
    from onecard.server.repository import Source
    from onecard.server.serve import ServeOptions, run_server

    class Announce:
        def listening(self, server: Any) -> None:
            self.port = server.port

        def listening_grpc(self, port: int) -> None:
            self.port = port

        def ready(self, serving: Any) -> None:
            ready.send(self.port)

    run_server(
        ServeOptions(
            {"null": Source(Path())},
            Listen(port=0),
            engine=(sys.executable, __file__),
            shared_memory=PREFIX,
            grpc=GrpcListen("127.0.0.1", 0) if grpc else None,
        ),
        Announce(),
    )


def grpc_server(ready: Any) -> None:
    onecard_server(ready, grpc=True)


def front_server(ready: Any) -> None:
    """HTTP alone: every request has the same answer."""
    import uvloop

    from onecard.server.http_server import Listen, serve_http
    from onecard.server.http_types import HttpService, Response

    answer = Response(200, [], [bytes(4 * CLASSES)])

    async def serve() -> None:
        server = await serve_http(HttpService(lambda request: answer), Listen(port=0))
        ready.send(server.port)
        await asyncio.Event().wait()

    uvloop.run(serve())


def asgi_server(ready: Any) -> None:
    import uvicorn

    answer = bytes(4 * CLASSES)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4000")]})
        await send({"type": "http.response.body", "body": answer})

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or it waits 40 ms for each acknowledgement
    ready.send(listening.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, loop="uvloop"))
    asyncio.run(server.serve([listening]))


def shared_request_bytes() -> bytes:
    """A request whose picture and answer lie in shared memory."""

    def place(region: str, nbytes: int) -> dict[str, Any]:
        return {"shared_memory_region": region, "shared_memory_byte_size": nbytes}

    head = {
        "inputs": [
            {
                "name": "image",
                "shape": [1, 224, 224, 3],
                "datatype": "UINT8",
                "parameters": place("pictures", PICTURE),
            }
        ],
        "outputs": [{"name": "scores", "parameters": place("answers", 4 * CLASSES)}],
    }
    text = json.dumps(head).encode()
    lines = f"POST /v2/models/null/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(text)}\r\n\r\n"
    return lines.encode() + text


def post(port: int, path: str, said: dict[str, Any]) -> None:
    url = f"http://127.0.0.1:{port}/v2/systemsharedmemory/{path}"
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(said).encode(), method="POST")).close()


@contextlib.contextmanager
def shared_memory(port: int) -> Iterator[None]:
    """The two regions, made and registered."""
    sizes = {"pictures": PICTURE, "answers": 4 * CLASSES}
    paths = {name: Path("/dev/shm") / f"{PREFIX}{os.getpid()}-{name}" for name in sizes}
    try:
        for name, path in paths.items():
            path.write_bytes(bytes(sizes[name]))
            said = {"key": f"/{path.name}", "offset": 0, "byte_size": sizes[name]}
            post(port, f"region/{name}/register", said)
        yield
        post(port, "unregister", {})
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def load_shared(port: int, seconds: float) -> int:
    with shared_memory(port):
        return load(port, seconds, shared_request_bytes())


def load_grpc(port: int, seconds: float) -> int:
    """Requests answered over gRPC, without reading more of the answers than their length."""
    import grpc

    from onecard.server.grpc_messages import inference_messages

    request = inference_messages()["ModelInferRequest"](model_name="null", raw_input_contents=[bytes(PICTURE)])
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 224, 224, 3])
    payload = request.SerializeToString()

    async def main() -> int:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            until = time.perf_counter() + seconds

            async def one() -> int:
                count = 0
                while time.perf_counter() < until:
                    if len(await call(payload)) < 4 * CLASSES:
                        raise SystemExit("not answered")
                    count += 1
                return count

            return sum(await asyncio.gather(*(one() for _ in range(CONNECTIONS))))

    return asyncio.run(main())


def request_bytes() -> bytes:
    """The same request for all, as tritonclient sends it."""
    head = {
        "inputs": [
            {
                "name": "image",
                "shape": [1, 224, 224, 3],
                "datatype": "UINT8",
                "parameters": {"binary_data_size": PICTURE},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    lines = (
        "POST /v2/models/null/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Length: {len(text) + PICTURE}\r\nInference-Header-Content-Length: {len(text)}\r\n\r\n"
    )
    return lines.encode() + text + bytes(PICTURE)


def load(port: int, seconds: float, payload: bytes | None = None) -> int:
    """Requests answered in so many seconds, each answer read to its end and checked to be one."""
    payload = payload or request_bytes()

    async def one(until: float) -> int:
        loop = asyncio.get_running_loop()
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        memory = bytearray(1 << 16)
        count = 0
        while time.perf_counter() < until:
            await loop.sock_sendall(connection, payload)
            got = await loop.sock_recv_into(connection, memory)
            end = memory.find(b"\r\n\r\n", 0, got)
            if not memory.startswith(b"HTTP/1.1 200") or end < 0:
                raise SystemExit(f"not answered: {bytes(memory[: min(got, 300)])!r}")
            lower = bytes(memory[:end]).lower()
            length = int(lower.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
            missing = end + 4 + length - got
            while missing > 0:
                missing -= await loop.sock_recv_into(connection, memory)
            count += 1
        connection.close()
        return count

    async def main() -> int:
        until = time.perf_counter() + seconds
        return sum(await asyncio.gather(*(one(until) for _ in range(CONNECTIONS))))

    try:
        import uvloop

        return uvloop.run(main())
    except ImportError:
        return asyncio.run(main())


SERVERS: dict[str, tuple[Callable[[Any], None], Callable[[int, float], int]]] = {
    "onecard, HTTP": (onecard_server, load),
    "onecard, shared memory": (onecard_server, load_shared),
    "onecard, gRPC": (grpc_server, load_grpc),
    "its HTTP alone": (front_server, load),
    ASGI: (asgi_server, load),
}


def measure(name: str, seconds: float) -> dict[str, float]:
    """One server, started, loaded and ended."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    serve, ask = SERVERS[name]
    process = spawn.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    port = ours.recv()
    time.sleep(0.3)
    ask(port, 1.0)
    front = psutil.Process(process.pid)
    watched = [front, *front.children(recursive=True)]
    before, began = [cpu_s(each) for each in watched], time.perf_counter()
    count = ask(port, seconds)
    spent = time.perf_counter() - began
    used = [cpu_s(each) - then for each, then in zip(watched, before, strict=True)]
    process.terminate()
    process.join(30)
    return {"rate": count / spent, "cpu_us": sum(used) / count * 1e6, "front_us": used[0] / count * 1e6}


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    here = [name for name in SERVERS if name != ASGI or importlib.util.find_spec("uvicorn")]
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=here)
    parser.add_argument("--socket", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--die-with-parent", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.socket is not None:
        run_null_engine(arguments.socket)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.servers}
    for _ in range(arguments.rounds):
        for name in arguments.servers:
            found[name].append(measure(name, arguments.seconds))
            print(f"{name}: {found[name][-1]}", file=sys.stderr)
    lines = [f"| 150,528-byte picture, {CONNECTIONS} connections | requests/s | µs of CPU each |", "|---|---|---|"]
    for name, rounds in found.items():
        best = max(rounds, key=lambda r: r["rate"])
        lines.append(f"| {name} | {best['rate']:,.0f} | {best['cpu_us']:.0f} |")
    print("\n".join(lines))
    if arguments.out:
        from onecard.environment import detect
        from onecard.evidence import to_json

        arguments.out.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", *sys.argv])
        result = {"command": command, "environment": json.loads(to_json(detect("cpu"))), "rounds": found}
        (arguments.out / "server.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "server.md").write_text("\n".join([*lines, "", f"`{command}`", ""]))


if __name__ == "__main__":
    main()
