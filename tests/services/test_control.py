"""Models that come and go while a real server runs, and who may have them do so."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.services.running_server import GOLDEN, serving

pytestmark = pytest.mark.timeout(180)
TOKEN, CONTROL = "t" * 20, "c" * 20


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDEN / "golden.safetensors")


def image(golden: dict[str, np.ndarray], rows: int = 1) -> triton.InferInput:
    array = np.ascontiguousarray(golden["in.image"][:rows])
    tensor = triton.InferInput("image", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    return tensor


def token_file(folder: Path, name: str, token: str) -> Path:
    path = folder / name
    path.write_text(token)
    path.chmod(0o600)
    return path


def ask(port: int, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, json.loads(body) if body else {}


def states(client: triton.InferenceServerClient) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}


def test_models_are_loaded_and_unloaded_by_the_official_client(tmp_path, golden):
    shutil.copytree(GOLDEN, tmp_path / "second.onecard")
    with serving(f"first={GOLDEN}", "--model-repository", str(tmp_path)) as (port, _):
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        assert states(client) == {"first": "READY", "second": "UNAVAILABLE"}
        assert not client.is_model_ready("second")
        client.load_model("second")
        assert states(client) == {"first": "READY", "second": "READY"}
        answer = client.infer("second", [image(golden)]).as_numpy("output")
        np.testing.assert_allclose(answer, golden["out.output"][:1], rtol=1e-3, atol=1e-4)
        client.unload_model("second")
        assert states(client)["second"] == "UNAVAILABLE"
        with pytest.raises(InferenceServerException, match="not ready"):
            client.infer("second", [image(golden)])
        client.load_model("second")
        assert client.infer("second", [image(golden)]).get_response()["model_version"] == "2"
        for name, words in (("third", "no model 'third'"), ("..", "no model '..'")):
            with pytest.raises(InferenceServerException, match=words):
                client.load_model(name)
        with pytest.raises(InferenceServerException, match="not taken"):
            client.load_model("second", config="{}")


def test_a_reload_under_load_loses_nothing_and_a_broken_one_changes_nothing(tmp_path, golden):
    bundle = tmp_path / "m.onecard"
    shutil.copytree(GOLDEN, bundle)
    wrong: list[object] = []
    versions: set[str] = set()
    over = threading.Event()

    def load(port: int) -> None:
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        while not over.is_set():
            try:
                answer = client.infer("m", [image(golden)])
                versions.add(answer.get_response()["model_version"])
                if not np.allclose(answer.as_numpy("output"), golden["out.output"][:1], rtol=1e-3, atol=1e-4):
                    wrong.append(answer.as_numpy("output"))
            except InferenceServerException as error:
                wrong.append(error)

    with serving("--model-repository", str(tmp_path), f"m={bundle}") as (port, _):
        clients = [threading.Thread(target=load, args=(port,)) for _ in range(3)]
        for client in clients:
            client.start()
        control = triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=90)
        control.load_model("m")
        control.load_model("m")
        manifest = bundle / "onecard.json"
        whole = manifest.read_bytes()
        manifest.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InferenceServerException):
            control.load_model("m")
        assert states(control)["m"] == "READY"
        time.sleep(0.3)
        over.set()
        for client in clients:
            client.join()
    assert not wrong
    assert versions >= {"1", "3"}


def test_tokens(tmp_path, golden):
    words = ("--auth-token-file", str(token_file(tmp_path, "a", TOKEN)))
    words += ("--control-token-file", str(token_file(tmp_path, "c", CONTROL)))
    with serving(f"m={GOLDEN}", *words) as (port, _):
        assert ask(port, "GET", "/v2/health/ready")[0] == 200
        assert ask(port, "GET", "/v2/models/m")[0] == 401
        assert ask(port, "GET", "/v2/models/m", {"Authorization": f"Bearer {TOKEN}x"})[0] == 401
        assert ask(port, "GET", "/v2/models/m", {"Authorization": f"Bearer {TOKEN}"})[0] == 200
        load = "/v2/repository/models/m/load"
        assert ask(port, "POST", load, {"Authorization": f"Bearer {TOKEN}"})[0] == 401
        assert ask(port, "POST", load, {"Authorization": f"Bearer {CONTROL}"})[0] == 200
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        answer = client.infer("m", [image(golden)], headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.as_numpy("output").shape == (1, 10)


def test_control_from_elsewhere_needs_a_token():
    with serving(f"m={GOLDEN}") as (port, _):
        status, body = ask(port, "POST", "/v2/repository/models/m/load", {"X-Forwarded-For": "203.0.113.9"})
        assert status == 403
        assert "control token" in body["error"]


def test_a_configuration_file(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "bundle")
    file = tmp_path / "onecard.toml"
    file.write_text(
        "http-port = 0\nmetrics-port = 0\n"
        'log-format = "json"\naccess-log = 1.0\n\n[models.tom]\npath = "bundle"\nmax-batch = 2\n'
    )
    with serving("--config", str(file)) as (port, server):
        assert ask(port, "GET", "/v2/models/tom?x=1", {"X-Request-Id": "mine"})[0] == 200
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    (entry,) = [line for line in lines if line["logger"] == "onecard.access"]
    assert (entry["path"], entry["status"], entry["model"], entry["request_id"]) == (
        "/v2/models/tom",
        200,
        "tom",
        "mine",
    )


def test_models_follow_a_folder(tmp_path, golden):
    shutil.copytree(GOLDEN, tmp_path / "first.onecard")
    with serving("--model-repository", str(tmp_path), "--watch") as (port, server):
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        assert states(client) == {"first": "READY"}
        shutil.copytree(GOLDEN, tmp_path / ".second.tmp")
        (tmp_path / ".second.tmp").rename(tmp_path / "second.onecard")
        wait_for(lambda: client.is_model_ready("second"), server)
        assert client.infer("second", [image(golden)]).as_numpy("output").shape == (1, 10)
        shutil.rmtree(tmp_path / "second.onecard")
        wait_for(lambda: states(client).get("second") == "UNAVAILABLE", server)
        assert client.is_model_ready("first")


def wait_for(true, server, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, server.output
        time.sleep(0.1)
