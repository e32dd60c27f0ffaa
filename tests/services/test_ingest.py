"""``onecard serve --ingest``: official clients send pictures as bytes, as floats, and in forms that there are not."""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

grpc = pytest.importorskip("grpc")
import tritonclient.grpc as triton_grpc  # noqa: E402
import tritonclient.http as triton_http  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402
from tritonclient.utils import shared_memory as shm  # noqa: E402

from onecard.server.grpc_messages import inference_messages  # noqa: E402
from tests.services.running_server import GOLDEN, Server, golden_of_here, serving  # noqa: E402

pytestmark = pytest.mark.timeout(400)
PREFIX = f"onecard-ingest-{os.getpid()}"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
FORM = "image=uint8 NHWC mean=0.485,0.456,0.406 std=0.229,0.224,0.225 scale=1/255"
BOTH = r"FP32\[B,3,16,16\] or UINT8\[B,16,16,3\]"
CLIENTS = [triton_http, triton_grpc]


@pytest.fixture(scope="module")
def server():
    words = (f"m={GOLDEN}", f"plain={GOLDEN}", "--ingest", f"m:{FORM}", "--shared-memory-prefix", PREFIX)
    with serving(*words, "--max-delay", "20ms") as (port, running):
        found = re.search(r"gRPC on port (\d+)", running.output)
        assert found is not None, running.output
        yield {triton_http: f"127.0.0.1:{port}", triton_grpc: f"127.0.0.1:{found[1]}"}, running


@pytest.fixture(params=CLIENTS, ids=["http", "grpc"])
def module(request):
    return request.param


@pytest.fixture
def client(module, server):
    with module.InferenceServerClient(server[0][module]) as client:
        yield client


def pictures(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 16, 16, 3), np.uint8)


def normalised(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(((raw / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))


def tensor(module, array: np.ndarray, datatype: str = "", **how: bool):
    datatype = datatype or {"uint8": "UINT8", "float32": "FP32"}[str(array.dtype)]
    made = module.InferInput("image", list(array.shape), datatype)
    made.set_data_from_numpy(array, **how)
    return made


def answer(client, made, model: str = "m") -> np.ndarray:
    return client.infer(model, [made]).as_numpy("output")


@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_get_the_answers_of_normalised_floats(client, module, rows):
    raw = pictures(rows, seed=rows)
    wanted = answer(client, tensor(module, normalised(raw)), "plain")
    for _ in range(3):  # the first of a head is read, the others are known
        np.testing.assert_allclose(answer(client, tensor(module, raw)), wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(answer(client, tensor(module, normalised(raw))), wanted, rtol=1e-3, atol=1e-4)
    assert not np.allclose(answer(client, tensor(module, 255 - raw)), wanted, rtol=1e-3, atol=1e-4)


def test_bytes_in_json(server):
    raw = pictures(2)
    with triton_http.InferenceServerClient(server[0][triton_http]) as client:
        wanted = answer(client, tensor(triton_http, normalised(raw)))
        found = answer(client, tensor(triton_http, raw, binary_data=False))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        item = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": [256] * 768}
        status, text = post(server[0][triton_http], {"inputs": [item]})
        assert status == 400 and "UINT8" in text and "255" in text


def test_bytes_in_typed_contents(server):
    raw = pictures(2)
    messages = inference_messages()
    asked = messages["ModelInferRequest"](model_name="m")
    item = asked.inputs.add(name="image", datatype="UINT8", shape=raw.shape)
    item.contents.uint_contents.extend(raw.ravel().tolist())
    with grpc.insecure_channel(server[0][triton_grpc]) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            messages["ModelInferRequest"].SerializeToString,
            messages["ModelInferResponse"].FromString,
        )
        told = call(asked, timeout=60)
    found = np.frombuffer(told.raw_output_contents[0], np.float32).reshape(2, 10)
    with triton_grpc.InferenceServerClient(server[0][triton_grpc]) as client:
        wanted = answer(client, tensor(triton_grpc, normalised(raw)))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_bytes_in_shared_memory(client, module):
    raw, key = pictures(2), f"/{PREFIX}-{module.__name__}"
    handle = shm.create_shared_memory_region("pictures", key, raw.nbytes)
    try:
        shm.set_shared_memory_region(handle, [raw])
        client.register_system_shared_memory("pictures", key, raw.nbytes)
        made = module.InferInput("image", list(raw.shape), "UINT8")
        made.set_shared_memory("pictures", raw.nbytes)
        wanted = answer(client, tensor(module, normalised(raw)))
        np.testing.assert_allclose(answer(client, made), wanted, rtol=1e-3, atol=1e-4)
        client.unregister_system_shared_memory("pictures")
    finally:
        shm.destroy_shared_memory_region(handle)


def test_both_forms_at_once_share_batches(server):
    """Twelve at once, by turns in either form: each gets its own answer, and fewer batches than requests are run.

    On a busy machine they may come one by one, each later than a batch waits for the next: then they are sent again.
    """
    address = server[0][triton_http]
    with triton_http.InferenceServerClient(address) as client:
        raw = [pictures(1, seed) for seed in range(12)]
        wanted = [answer(client, tensor(triton_http, normalised(each)), "plain") for each in raw]
        for _ in range(10):
            before = counts(client)
            found = ask_at_once(address, [each if n % 2 else normalised(each) for n, each in enumerate(raw)])
            for number, each in enumerate(wanted):
                np.testing.assert_allclose(found[number], each, rtol=1e-3, atol=1e-4)
            after = counts(client)
            assert after[0] - before[0] == len(raw)
            if after[1] - before[1] < len(raw):
                return
    raise AssertionError("each had a batch of its own, ten times")


def ask_at_once(address: str, given: list[np.ndarray]) -> dict[int, np.ndarray]:
    """The answers to all of them, each asked for by a client of its own."""
    found: dict[int, np.ndarray] = {}
    gate = threading.Barrier(len(given))

    def ask(number: int) -> None:
        with triton_http.InferenceServerClient(address) as mine:
            gate.wait()
            found[number] = answer(mine, tensor(triton_http, given[number]))

    callers = [threading.Thread(target=ask, args=(number,)) for number in range(len(given))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return found


def counts(client) -> tuple[int, int]:
    """Rows answered and batches run."""
    (told,) = client.get_inference_statistics("m")["model_stats"]
    return told["inference_count"], told["execution_count"]


@pytest.mark.parametrize(
    ("array", "datatype", "words"),
    [
        (np.zeros((1, 16, 16, 3), np.int8), "INT8", f"'INT8', expected {BOTH}"),
        (np.zeros((1, 3, 16, 16), np.uint8), "UINT8", f"size 3 in dimension 1, expected 16 .*{BOTH}"),
        (np.zeros((1, 16, 16, 3), np.float32), "FP32", f"size 16 in dimension 1, expected 3 .*{BOTH}"),
        (np.zeros((16, 16, 3), np.uint8), "UINT8", f"3 dimensions.*{BOTH}"),
        (np.zeros((5, 16, 16, 3), np.uint8), "UINT8", "B=5 is outside the range B=1..4"),
    ],
)
def test_what_is_in_neither_form_is_refused_with_both(client, module, array, datatype, words):
    with pytest.raises(InferenceServerException, match=words):
        answer(client, tensor(module, array, datatype))


def test_the_form_is_the_named_models_alone(client, module):
    with pytest.raises(InferenceServerException, match="'UINT8', expected FP32"):
        answer(client, tensor(module, pictures(1)), "plain")


def test_the_server_tells_of_both(server):
    addresses, running = server
    assert "ready m: image: float32[B,3,16,16], B=1..4, also image: uint8[B,16,16,3] in 0..255 on" in running.output
    with triton_http.InferenceServerClient(addresses[triton_http]) as client:
        told = client.get_model_metadata("m")
        assert told["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
        assert told["parameters"] == {"ingest.image": "UINT8[-1,16,16,3]"}
        assert "parameters" not in client.get_model_metadata("plain")
        config = client.get_model_config("m")["parameters"]
        assert config == {"ingest.image": {"string_value": "UINT8[-1,16,16,3]"}}
    with triton_grpc.InferenceServerClient(addresses[triton_grpc]) as client:
        assert client.get_model_metadata("m").inputs[0].datatype == "FP32"
        assert client.get_model_config("m").config.parameters["ingest.image"].string_value == "UINT8[-1,16,16,3]"


def post(address: str, body: object) -> tuple[int, str]:
    asked = urllib.request.Request(f"http://{address}/v2/models/m/infer", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(asked, timeout=60) as told:
            return told.status, told.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_forms_of_the_environment_and_of_the_configuration_file(tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text(f'[models.own]\npath = "{golden_of_here()}"\ningest = ["image=int8"]\n')
    with serving("--config", str(config), "--no-grpc") as (_, running):
        assert "ready own: image: float32[B,3,16,16], B=1..4, also image: int8[B,3,16,16] on" in running.output
    with serving(f"m={GOLDEN}", "--no-grpc", environment={"ONECARD_INGEST": FORM}) as (_, running):
        assert "also image: uint8[B,16,16,3]" in running.output


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("image=uint8 HWC", "'HWC' is neither NHWC, NCHW"),
        ("gone:image=uint8 NHWC", "there is no model 'gone'"),
        ("picture=uint8 NHWC", "the model has no input 'picture': it has image"),
        ("image=float64", "cannot be made from float64 without loss"),
    ],
)
def test_mistakes_end_the_server_with_one_message(form, words):
    ports = ("--http-port", "0", "--no-grpc", "--metrics-port", "-1")
    server = Server(f"m={GOLDEN}", *ports, "--ingest", form)
    try:
        assert server.process.wait(150) == 2
    finally:
        server.process.kill()
        server.process.wait(30)
        server.reader.join(30)
    assert words in " ".join(server.output.split())
    assert "Traceback" not in server.output
