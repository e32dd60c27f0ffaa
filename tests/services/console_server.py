"""A small real HTTP server with the console's own files, a state that changes, and models that answer."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import numpy as np

from onecard.errors import OnecardError
from onecard.server.console import CONSOLE_HEADERS, console_file
from onecard.server.oip_contract import InferContract
from onecard.server.oip_request import parse_infer
from onecard.server.oip_response import encode_infer
from onecard.spec import parse_spec, parse_tensor
from onecard.telemetry.histogram import Distribution
from onecard.telemetry.snapshot import ModelFigures, ServerFigures, Snapshot, TensorFigures, encode

BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
PER_SECOND = 100
# Of each hundred requests 20 took up to 2 ms, 60 up to 5 ms, 15 up to 10 ms and 5 up to 20 ms.
SHARES = (0, 20, 60, 15, 5, 0, 0, 0)
P50_S, P90_S, P99_S = 0.002 + 0.003 * 30 / 60, 0.005 + 0.005 * 10 / 15, 0.01 + 0.01 * 4 / 5
GIB = 1 << 30


@dataclass
class Scene:
    """What the server shows; a test changes it while the server runs.

    Args:
        began_s: Unix time of its start.
        models: their names.
        ready: whether it says so.
        token: that is asked, if any.
        status: of the state, if it is another than 200.
        speed: how many times the usual rate.
    """

    began_s: float = field(default_factory=lambda: time.time() - 7300)
    models: tuple[str, ...] = ("resnet50", "sentiment")
    ready: bool = True
    token: str = ""
    status: int = 200
    speed: float = 1.0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    asked_away: list[str] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        now = time.time()
        card = {
            "kind": "nvidia", "name": "NVIDIA H200", "device": "cuda:0", "utilisation": 0.6 + 0.3 * np.sin(now / 9),
            "memory_used_bytes": int(61 * GIB + 4 * GIB * np.sin(now / 20)), "memory_total_bytes": 141 * GIB,
            "temperature_c": 58 + 5 * np.sin(now / 15), "memory_temperature_c": 66 + 4 * np.sin(now / 17),
            "power_w": 410 + 90 * np.sin(now / 9), "power_limit_w": 700.0, "energy_j": 400 * (now - self.began_s),
            "sm_clock_hz": 1.98e9, "throttle_reasons": ("sw_power_cap",),
        }  # fmt: skip
        return Snapshot(
            time_s=now,
            server=ServerFigures(
                version="0.1.0", started_s=self.began_s, ready=self.ready, open_connections=8, platform="Linux"
            ),
            models=tuple(self._model(name, i, now) for i, name in enumerate(self.models)),
            card={name: float(value) if isinstance(value, np.floating) else value for name, value in card.items()},
        )

    def _model(self, name: str, place: int, now: float) -> ModelFigures:
        hundreds = int((now - self.began_s) * self.speed) >> place  # the second model has half of the first one's
        count = PER_SECOND * hundreds
        ready = self.ready or place > 0
        contract = CONTRACTS.get(name)
        return ModelFigures(
            name=name,
            version="1",
            variant="openvino@bucket" if place % 2 else "tensorrt+fp16+channels_last",
            variants={"B1": "cudagraph+bf16", "B8": "tensorrt+fp16+channels_last"},
            state="READY" if ready else "UNAVAILABLE",
            reason="" if ready else "the bundle was made for another card: <b>no</b> variant can run here.",
            device="cuda:0",
            inputs=TEXT_INPUTS if contract is None else _tensors(contract.spec.inputs),
            outputs=TEXT_OUTPUTS if contract is None else _tensors(contract.spec.outputs),
            queue_requests=int(6 + 5 * np.sin(now / 7 + place)),
            queue_bytes=3 << 20,
            queue_limit_requests=1000,
            in_flight=int(14 + 5 * np.sin(now / 7 + place)),
            p99_target_s=0.025,
            requests=count,
            failures={"refused_queue_full": count // 500, "deadline": 3, "bad_input": 0},
            rows=2 * count,
            padded_rows=count // 5,
            batches=count // 4,
            histograms={
                "request_s": _distribution(SHARES, hundreds),
                **{
                    name: _distribution((50 - 10 * i, 30, 10, 10 + 10 * i, 0, 0, 0, 0), hundreds)
                    for i, name in enumerate(("queue_s", "copy_in_s", "compute_s", "copy_out_s"))
                },
            },
            load_s=3.4,
            memory_bytes={"weights": 98 << 20, "reserved": 412 << 20, "peak": 380 << 20},
        )


def _distribution(shares: tuple[int, ...], times: int) -> Distribution:
    middles = (0.0005, 0.0015, 0.0035, 0.0075, 0.015, 0.035, 0.075, 0.1)
    total = sum(share * middle for share, middle in zip(shares, middles, strict=True))
    return Distribution(BOUNDS_S, tuple(share * times for share in shares), times * total)


def _tensors(tensors: Any) -> tuple[TensorFigures, ...]:
    words = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}
    return tuple(
        TensorFigures(each.name, words[each.dtype], tuple(dim if isinstance(dim, int) else -1 for dim in each.shape))
        for each in tensors
    )


def _contract(inputs: str, *outputs: str) -> InferContract:
    spec = parse_spec([inputs])
    return InferContract(msgspec.structs.replace(spec, outputs=tuple(parse_tensor(each)[0] for each in outputs)))


# What each answers is so simple that a test knows it: mean and corner of a picture's channels, and scores by place.
CONTRACTS = {
    "resnet50": _contract(
        "image: float32[B,3,24,32], B=1..8", "means: float32[B,3]", "corner: float32[B,3]", "scores: float32[B,10]"
    ),
    "bytes": _contract("image: uint8[B,16,16,3], B=1..8", "means: float32[B,3]", "corner: float32[B,3]"),
    "halves": _contract("image: float16[B,3,16,16], B=1..8", "means: float32[B,3]", "corner: float32[B,3]"),
    "ids": _contract("x: int64[B,4], B=1..8", "sum: int64[B]"),
}
TEXT_INPUTS = (TensorFigures("text", "BYTES", (-1,)),)
TEXT_OUTPUTS = (TensorFigures("lengths", "INT64", (-1,)),)


def _answers(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    (array,) = inputs.values()
    if name == "ids":
        return {"sum": array.sum(1)}
    channels_first = array.astype(np.float32)
    if name == "bytes":
        channels_first = channels_first.transpose(0, 3, 1, 2)
    scores = np.tile(np.arange(10, dtype=np.float32) % 7, (len(array), 1))
    means = channels_first.mean((2, 3), dtype=np.float64).astype(np.float32)
    return {"means": means, "corner": np.ascontiguousarray(channels_first[:, :, 0, 0]), "scores": scores}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scene: Scene

    def do_GET(self) -> None:
        if (file := console_file(self.path)) is not None:
            fields = [(name.decode(), value.decode()) for name, value in CONSOLE_HEADERS]
            self._send(200, file.body, [("Content-Type", file.content_type.decode()), *fields])
        elif self.path == "/v2/onecard/state":
            if self._is_refused():
                return
            if self.scene.status != 200:
                self._send_json(self.scene.status, {"error": "the state is not told just now"})
            else:
                self._send(200, encode(self.scene.snapshot()), [("Content-Type", "application/json")])
        elif self.path.endswith("/report"):
            self._send(200, b"<title>report</title>", [("Content-Type", "text/html")])
        else:
            self.scene.asked_away.append(self.path)
            self._send_json(404, {"error": f"there is nothing at {self.path}."})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._is_refused():
            return
        self.scene.requests.append((self.path, dict(self.headers.items()), body))
        name = self.path.split("/")[3]
        length = self.headers.get("Inference-Header-Content-Length")
        try:
            if name == "sentiment":
                self._answer_text(json.loads(body))
                return
            contract = CONTRACTS[name]
            asked = parse_infer(body, int(length) if length else None, contract)
            encoded = encode_infer(asked, _answers(name, asked.inputs), contract, (name, "1"))
        except OnecardError as error:
            self._send_json(error.http_status, {"error": str(error)})
            return
        fields = [("Content-Type", encoded.content_type.decode())]
        if encoded.json_length is not None:
            fields.append(("Inference-Header-Content-Length", str(encoded.json_length)))
        self._send(200, b"".join(map(bytes, encoded.body)), fields)

    def _answer_text(self, request: dict[str, Any]) -> None:
        data = request["inputs"][0]["data"]
        lengths = {"name": "lengths", "datatype": "INT64", "shape": [len(data)], "data": [len(each) for each in data]}
        self._send_json(200, {"model_name": "sentiment", "outputs": [lengths]})

    def _is_refused(self) -> bool:
        if not self.scene.token or self.headers.get("Authorization") == f"Bearer {self.scene.token}":
            return False
        self._send_json(401, {"error": "this needs the inference token: send 'Authorization: Bearer TOKEN'."})
        return True

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), [("Content-Type", "application/json")])

    def _send(self, status: int, body: bytes, fields: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in (*fields, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *details: Any) -> None:
        super().__init__(*details)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""

    def server_close(self) -> None:
        super().server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def console_server(scene: Scene, port: int = 0) -> Iterator[int]:
    """The port of a server that shows a scene; it and its connections are closed afterwards."""
    handler = type("Handler", (_Handler,), {"scene": scene})
    server = _Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
