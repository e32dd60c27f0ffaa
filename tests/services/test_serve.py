"""``onecard serve`` with its real clients: tritonclient, unchanged, and plain HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.services.running_server import GOLDEN, Server, serving

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
import tritonclient.http.aio as triton_aio  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def port():
    with serving(f"small={GOLDEN}", f"other={GOLDEN}", "--max-batch", "4") as (port, _):
        yield port


@pytest.fixture
def client(port):
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def infer_body(image: np.ndarray, **more: object) -> bytes:
    data = {"name": "image", "datatype": "FP32", "shape": list(image.shape), "data": image.ravel().tolist()}
    return json.dumps({"inputs": [data], **more}).encode()


def wanted(golden, rows: int) -> np.ndarray:
    return np.repeat(golden["out.output"][:1], rows, axis=0)


def given(golden, rows: int) -> np.ndarray:
    return np.repeat(golden["in.image"][:1], rows, axis=0)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_official_client_gets_the_originals_answers(client, golden, binary, rows):
    image = given(golden, rows)
    tensor = triton.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image, binary_data=binary)
    asked = [triton.InferRequestedOutput("output", binary_data=binary)]
    result = client.infer("small", [tensor], outputs=asked, request_id="mine", model_version="1")
    np.testing.assert_allclose(result.as_numpy("output"), wanted(golden, rows), rtol=1e-3, atol=1e-4)
    assert result.get_response()["id"] == "mine"
    assert result.get_response()["model_name"] == "small"


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests(client, golden, compression):
    tensor = triton.InferInput("image", [1, 3, 16, 16], "FP32")
    tensor.set_data_from_numpy(given(golden, 1))
    result = client.infer("small", [tensor], request_compression_algorithm=compression)
    np.testing.assert_allclose(result.as_numpy("output"), wanted(golden, 1), rtol=1e-3, atol=1e-4)


def test_classification(client, golden):
    tensor = triton.InferInput("image", [1, 3, 16, 16], "FP32")
    tensor.set_data_from_numpy(given(golden, 1))
    asked = [triton.InferRequestedOutput("output", class_count=3)]
    rows = client.infer("small", [tensor], outputs=asked).as_numpy("output")
    order = np.argsort(-golden["out.output"][0], kind="stable")[:3]
    assert [int(text.decode().split(":")[1]) for text in rows.ravel()] == order.tolist()


def test_everything_else_that_the_client_can_ask(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("small") and client.is_model_ready("other", "1")
    about = client.get_server_metadata()
    assert about["name"] == "onecard" and "binary_tensor_data" in about["extensions"]
    model = client.get_model_metadata("small")
    assert model["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert model["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 10]}]
    assert client.get_model_config("small")["max_batch_size"] == 4
    assert [(m["name"], m["state"]) for m in client.get_model_repository_index()] == [
        ("small", "READY"),
        ("other", "READY"),
    ]


def test_statistics_count_what_happened(client, golden):
    def counts() -> tuple[int, int, int]:
        (found,) = client.get_inference_statistics("other")["model_stats"]
        return (
            found["inference_count"],
            found["inference_stats"]["success"]["count"],
            found["inference_stats"]["fail"]["count"],
        )

    before = counts()
    tensor = triton.InferInput("image", [3, 3, 16, 16], "FP32")
    tensor.set_data_from_numpy(given(golden, 3))
    client.infer("other", [tensor])
    with pytest.raises(InferenceServerException):
        client.infer("other", [triton.InferInput("wrong", [1], "FP32")])  # never gets to the model
    with pytest.raises(InferenceServerException):
        client.infer("other", [tensor], timeout=1)
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, 1]
    assert len(client.get_inference_statistics()["model_stats"]) == 2


def test_many_at_once_get_their_own_answers(port, golden):
    async def main() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{port}") as client:

            async def one(tag: int) -> None:
                image = given(golden, 1 + tag % 4) * np.float32(1 + tag / 64)
                tensor = triton_aio.InferInput("image", list(image.shape), "FP32")
                tensor.set_data_from_numpy(image)
                first, again = await client.infer("small", [tensor]), await client.infer("other", [tensor])
                np.testing.assert_allclose(first.as_numpy("output"), again.as_numpy("output"), rtol=1e-3, atol=1e-4)
                seen[tag] = first.as_numpy("output")[0]

            await asyncio.gather(*(one(tag) for tag in range(64)))

    seen: dict[int, np.ndarray] = {}
    asyncio.run(main())
    assert len(seen) == 64
    assert not np.allclose(seen[0], seen[63], rtol=1e-3, atol=1e-4)  # another picture, another answer


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v3", 404, "begins with /v2"),
        ("GET", "/v2/nothing", 404, "nothing at"),
        ("GET", "/v2/models/none", 404, "no model 'none'"),
        ("GET", "/v2/models/small/versions/7", 404, "no version '7'"),
        ("DELETE", "/v2/models/small", 405, "expected GET"),
        ("GET", "/v2/models/small/infer", 405, "expected POST"),
        ("POST", "/v2/repository/models/other-one/unload", 404, "there is no model"),
    ],
)
def test_what_is_not_there(port, method, path, status, words):
    got, headers, body = ask(port, method, path)
    assert (got, headers["Content-Type"]) == (status, "application/json")
    assert words in json.loads(body)["error"]
    assert status != 405 or "Allow" in headers


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"inputs": []}', "image"),
        (infer_body(np.zeros((1, 3, 8, 8), np.float32)), "dimension 2"),
        (infer_body(np.zeros((5, 3, 16, 16), np.float32)), "outside the range"),
        (infer_body(np.zeros((1, 3, 16, 16), np.float32)).replace(b"FP32", b"INT8"), "INT8"),
        (infer_body(np.zeros((1, 3, 16, 16), np.float32), outputs=[{"name": "gone"}]), "gone"),
    ],
)
def test_requests_that_do_not_fit_are_refused_with_the_reason(port, body, words):
    status, _, answer = ask(port, "POST", "/v2/models/small/infer", body)
    assert status == 400
    assert words in json.loads(answer)["error"]


def test_a_deadline_that_cannot_be_kept(port, golden):
    body = infer_body(given(golden, 4), parameters={"timeout": 1})
    status, _, answer = ask(port, "POST", "/v2/models/small/infer", body)
    assert status == 504
    assert "deadline" in json.loads(answer)["error"]


def test_more_than_may_wait_is_refused_with_the_time_to_come_back(golden):
    body = infer_body(given(golden, 4))
    with serving(f"small={GOLDEN}", "--queue-items", "2", "--max-batch", "1", "--max-delay", "200ms") as (port, _):
        found: list[tuple[int, dict]] = []

        def one() -> None:
            status, headers, _ = ask(port, "POST", "/v2/models/small/infer", body)
            found.append((status, headers))

        callers = [threading.Thread(target=one) for _ in range(40)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert {status for status, _ in found} <= {200, 429}
        refused = [headers for status, headers in found if status == 429]
        assert len(found) == 40 and any(status == 200 for status, _ in found)
        assert all(int(headers["Retry-After"]) >= 1 for headers in refused)


def test_a_client_that_goes_away_is_not_answered_for(golden):
    body = infer_body(given(golden, 1))
    head = f"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(f"small={GOLDEN}", "--max-delay", "300s") as (port, server):

        def stats() -> dict:
            (found,) = json.loads(ask(port, "GET", "/v2/models/small/stats")[2])["model_stats"]
            return found

        def waits() -> bool:
            (model,) = json.loads(ask(port, "GET", "/v2/onecard/state")[2])["models"]
            return model["in_flight"] == 1

        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head + body)
        until(waits, server)
        connection.close()
        until(lambda: stats()["inference_stats"]["fail"]["count"], server)
        assert stats()["inference_stats"]["fail"]["count"] == 1
        assert stats()["execution_count"] == 0


def until(true: Callable[[], object], server: Server) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, server.output
        time.sleep(0.05)


def test_sigterm_answers_what_came_in_and_refuses_nothing_that_was_under_way(golden):
    with serving(f"small={GOLDEN}", "--max-delay", "300ms", "--drain-timeout", "20s") as (port, server):
        body = infer_body(given(golden, 1))
        # Fifteen: the last batch is not full, and waits. All are known to the server before they ask.
        with contextlib.ExitStack() as opened:
            callers = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(15)]
            for caller in callers:
                opened.callback(caller.close)
                caller.request("GET", "/v2/health/live")
                assert caller.getresponse().read() == b'{"live":true}'
            for caller in callers:
                caller.request("POST", "/v2/models/small/infer", body)
            assert server.end() == 0
            assert [caller.getresponse().status for caller in callers] == [200] * 15
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=2)


def test_ctrl_c_ends_it_too():
    with serving(f"small={GOLDEN}") as (_, server):
        assert server.end(signal.SIGINT) == 0
        assert "Traceback" not in server.output


def test_it_is_live_before_it_is_ready():
    with serving(f"small={GOLDEN}") as (port, server):
        text = server.output
        assert text.index("listening on") < text.index("ready small")
        assert ask(port, "GET", "/v2/health/live")[0] == 200
        status, _, body = ask(port, "HEAD", "/v2/health/ready")
        assert (status, body) == (200, b"")


def test_a_unix_domain_socket(tmp_path, golden):
    path = tmp_path / "s"
    with serving(f"small={GOLDEN}", "--uds", str(path)) as (_, server):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert oct(os.stat(path).st_mode & 0o777) == "0o600"
        assert server.end() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["/nowhere"], 6, "nowhere"),
        ([f"a b={GOLDEN}"], 2, "cannot be a model's name"),
        ([f"x={GOLDEN}", f"x={GOLDEN}"], 2, "two models"),
        ([f"x={GOLDEN}", "--p99", "5ms"], 2, "onecard tune"),
        ([f"x={GOLDEN}", "--host", "203.0.113.1"], 2, "not possible"),
        ([f"x={GOLDEN}", "--tls-key", "k.pem"], 2, "--tls-certificate"),
        ([f"x={GOLDEN}", "--queue-bytes", "much"], 2, "not a size"),
    ],
)
def test_mistakes_end_in_one_message(words, code, text):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "onecard", "serve", *words,
         "--http-port", "0", "--no-grpc", "--metrics-port", "-1"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_options_come_from_the_environment_too():
    with serving(f"small={GOLDEN}", environment={"ONECARD_MAX_BODY": "1kB"}) as (port, _):
        status, _, body = ask(port, "POST", "/v2/models/small/infer", b"x" * 2000)
        assert status == 413 and "error" in json.loads(body)
