"""The official clients, unchanged, against the gRPC front: every call that they have."""

import asyncio
import queue
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from onecard.errors import DeadlineError, EngineError, QueueFullError, UsageError
from onecard.server.grpc_limits import GrpcListen
from onecard.server.http_types import HttpError
from onecard.spec import Range, Spec, TensorSpec
from tests.unit.server.grpc_faces import Memory, NumpyFace, echo_face, serving

client = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient and grpcio")
aio = pytest.importorskip("tritonclient.grpc.aio")
pytestmark = pytest.mark.timeout(180)
Refused = client.InferenceServerException


def an_input(values, datatype="FP32", name="x"):
    array = np.asarray(values, np.float32)
    return client.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


X = [[1, 2, 3]]
NEVER = [[-1, 0, 0]]


@pytest.fixture
def face():
    return echo_face()


@pytest.fixture
def running(face):
    with serving(face) as running:
        yield running
        assert running.is_idle()
        assert running.server._calls.held_bytes == 0
        assert face.unreleased == 0


@pytest.fixture
def triton(running):
    with client.InferenceServerClient(running.url) as triton:
        yield triton


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_health_and_metadata(triton, face):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("echo")
    assert triton.is_model_ready("echo", "1")
    assert not triton.is_model_ready("other")
    assert not triton.is_model_ready("echo", "2")
    told = triton.get_server_metadata()
    assert (told.name, told.version, list(told.extensions)) == ("onecard", "0.1", ["binary_tensor_data", "statistics"])
    told = triton.get_model_metadata("echo")
    assert (told.name, list(told.versions)) == ("echo", ["1"])
    assert (told.inputs[0].name, told.inputs[0].datatype, list(told.inputs[0].shape)) == ("x", "FP32", [-1, 3])
    config = triton.get_model_config("echo").config
    assert (config.name, config.max_batch_size, config.dynamic_batching.priority_levels) == ("echo", 8, 3)
    assert (config.input[0].data_type, list(config.input[0].dims)) == (client.model_config_pb2.TYPE_FP32, [3])
    face.is_ready = False
    assert not triton.is_server_ready()
    assert not triton.is_model_ready("echo")
    with pytest.raises(Refused, match="there is no model 'other'") as refused:
        triton.get_model_metadata("other")
    assert refused.value.status() == "StatusCode.NOT_FOUND"


def test_statistics(triton):
    triton.infer("echo", [an_input(X)])
    (told,) = triton.get_inference_statistics("echo").model_stats
    assert (told.name, told.version, told.last_inference, told.inference_stats.success.count) == ("echo", "1", 5, 1)
    assert triton.get_inference_statistics(as_json=True)["model_stats"][0]["name"] == "echo"


def test_the_repository(triton, face):
    index = triton.get_model_repository_index()
    assert [(each.name, each.state, each.reason) for each in index.models] == [
        ("echo", "READY", ""),
        ("broken", "UNAVAILABLE", "why"),
    ]
    triton.load_model("echo")
    triton.unload_model("echo")
    assert face.changes == [("load", "echo"), ("unload", "echo")]
    with pytest.raises(Refused, match="'config' of the model repository is not supported"):
        triton.load_model("echo", config="{}")
    with pytest.raises(Refused, match="there is no model 'other'"):
        triton.load_model("other")


def test_inference(triton, face):
    result = triton.infer("echo", [an_input(X)], request_id="é7", priority=2, timeout=1500, model_version="1")
    assert result.as_numpy("y").tolist() == [[2, 4, 6]]
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("echo", "1", "é7")
    (asked, address), *_ = face.asked
    assert (asked.id, asked.priority, asked.timeout_us, address) == ("é7", 2, 1500, "127.0.0.1")
    result = triton.infer("echo", [an_input(X)], outputs=[client.InferRequestedOutput("y", class_count=1)])
    assert result.as_numpy("y").tolist() == [[b"6.000000:2"]]
    result = triton.infer("echo", [an_input(X * 3)], outputs=[client.InferRequestedOutput("y")])
    assert result.as_numpy("y").shape == (3, 3)


def test_a_hundred_thousand_bytes_both_ways_and_compressed():
    spec = Spec((TensorSpec("x", "uint8", ("B", 150_528)),), (TensorSpec("y", "uint8", ("B", 150_528)),),
                {"B": Range(1, 8)})  # fmt: skip
    face = NumpyFace({"m": spec}, lambda inputs: {"y": inputs["x"] ^ 255})
    array = np.random.default_rng(0).integers(0, 256, (2, 150_528), np.uint8)
    item = client.InferInput("x", [2, 150_528], "UINT8").set_data_from_numpy(array)
    with serving(face) as running, client.InferenceServerClient(running.url) as triton:
        for algorithm in (None, "gzip", "deflate"):
            found = triton.infer("m", [item], compression_algorithm=algorithm).as_numpy("y")
            assert np.array_equal(found, array ^ 255)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HttpError(400, "no"), "INVALID_ARGUMENT"),
        (HttpError(401, "no"), "UNAUTHENTICATED"),
        (HttpError(403, "no"), "PERMISSION_DENIED"),
        (HttpError(422, "no"), "INVALID_ARGUMENT"),
        (QueueFullError("no", retry_after_s=0.5), "RESOURCE_EXHAUSTED"),
        (HttpError(501, "no"), "UNIMPLEMENTED"),
        (HttpError(503, "no", [(b"Retry-After", b"2")]), "UNAVAILABLE"),
        (DeadlineError("no"), "DEADLINE_EXCEEDED"),
        (EngineError("no"), "INTERNAL"),
        (HttpError(507, "no"), "RESOURCE_EXHAUSTED"),
    ],
)
def test_errors_have_their_status(triton, face, error, code):
    face.refusal = error
    with pytest.raises(Refused, match="no") as refused:
        triton.infer("echo", [an_input(X)])
    assert refused.value.status() == f"StatusCode.{code}"
    face.refusal = None
    face.unreleased = 0


def test_a_fault_of_the_server_tells_nothing_but_its_number(triton, face, caplog):
    face.refusal = RuntimeError("secret")
    with pytest.raises(Refused, match=r"the server's log tells more of request [0-9a-f]{16}") as refused:
        triton.infer("echo", [an_input(X)])
    assert refused.value.status() == "StatusCode.INTERNAL"
    assert "secret" not in str(refused.value)
    assert "secret" in caplog.text


def test_what_does_not_fit_is_an_invalid_argument(triton):
    for wrong in ([an_input(X, name="q")], [an_input([[1, 2]])], [an_input(X * 9)], []):
        with pytest.raises(Refused) as refused:
            triton.infer("echo", wrong)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert triton.infer("echo", [an_input(X)]).as_numpy("y").tolist() == [[2, 4, 6]]


def test_a_refusal_for_the_time_being_says_when_to_come_back(running, face):
    import grpc

    face.refusal = QueueFullError("full", retry_after_s=0.25)
    with grpc.insecure_channel(running.url) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        request = client.service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(12)])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
        with pytest.raises(grpc.RpcError) as refused:
            call(request.SerializeToString())
    assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "250"


def test_what_is_not_handed_on_is_told_to_be_counted(triton, face):
    with pytest.raises(Refused):
        triton.infer("nobody", [an_input(X)])
    with pytest.raises(Refused):
        triton.infer("echo", [an_input(X, name="nothing")])
    triton.infer("echo", [an_input(X)])
    assert [(model, type(error).__name__) for model, error in face.refusals] == [
        ("nobody", "HttpError"),
        ("echo", "ProtocolError"),
    ]


def test_the_deadline_is_the_request_s_timeout_and_a_client_that_leaves_cancels_it(triton, face):
    assert triton.is_server_live()  # the connection is there now
    for patience_s in (0.3, 10.0):  # on a machine that stands still, it may pass before the server hears of it
        with pytest.raises(Refused) as refused:
            triton.infer("echo", [an_input(NEVER)], client_timeout=patience_s)
        assert refused.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        if face.asked:
            break
    assert 0 < face.asked[-1][0].timeout_us <= patience_s * 1e6 + 10_000  # gRPC rounds it up
    wait_for(lambda: face.cancelled == len(face.asked))
    before = len(face.asked)
    done = queue.Queue()
    call = triton.async_infer("echo", [an_input(NEVER)], lambda result, error: done.put(error))
    wait_for(lambda: len(face.asked) == before + 1)
    call.cancel()
    assert done.get(timeout=30).status() == "StatusCode.CANCELLED"
    wait_for(lambda: face.cancelled == before + 1)


def test_many_at_once_are_not_mixed_up(running, face):
    face.delay_s = 0.002

    async def ask(triton, number):
        values = [[number, number + 0.5, 1000 - number]]
        result = await triton.infer("echo", [an_input(values)], request_id=str(number))
        assert result.as_numpy("y").tolist() == [[2 * value for value in values[0]]]
        assert result.get_response().id == str(number)

    async def ask_all():
        async with aio.InferenceServerClient(running.url) as triton:
            assert await triton.is_server_ready()
            for start in range(0, 1000, 200):
                await asyncio.gather(*(ask(triton, start + i) for i in range(200)))

    asyncio.run(ask_all())


def test_a_stream_is_answered_in_order_and_outlives_an_error(triton, face):
    answers = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(50):
        values = X if number != 20 else [[1, 2]]
        triton.async_stream_infer("echo", [an_input(values)], request_id=str(number))
    for number in range(50):
        result, error = answers.get(timeout=30)
        if number == 20:
            assert "x" in str(error)
        else:
            assert error is None
            response = result.get_response()
            assert (response.id, result.as_numpy("y").tolist()) == (str(number), [[2, 4, 6]])
            assert response.parameters["triton_final_response"].bool_param
    triton.stop_stream()


def test_a_stream_that_the_client_leaves_cancels_what_it_asked(triton, face):
    triton.start_stream(lambda result, error: None)
    triton.async_stream_infer("echo", [an_input(NEVER)])
    wait_for(lambda: len(face.asked) == 1)
    triton.stop_stream(cancel_requests=True)
    wait_for(lambda: face.cancelled == 1)


def test_a_stream_with_asyncio(running):
    async def ask():
        async def requests():
            for number in range(5):
                yield {"model_name": "echo", "inputs": [an_input([[number, 0, 0]])]}

        async with aio.InferenceServerClient(running.url) as triton:
            return [result.as_numpy("y")[0, 0] async for result, _ in triton.stream_infer(requests())]

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8]


def test_system_shared_memory(triton, face):
    with pytest.raises(Refused, match="not enabled") as refused:
        triton.register_system_shared_memory("r", "/r", 64)
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
    face.system_regions = memory = Memory()
    triton.register_system_shared_memory("r", "/key", 64, offset=8)
    told = triton.get_system_shared_memory_status().regions["r"]
    assert (told.name, told.key, told.offset, told.byte_size) == ("r", "/key", 8, 64)
    memory.areas["r"][16:28] = np.array([1, 2, 3], np.float32).tobytes()
    item = client.InferInput("x", [1, 3], "FP32")
    item.set_shared_memory("r", 12, offset=16)
    wanted = client.InferRequestedOutput("y")
    wanted.set_shared_memory("r", 20, offset=32)
    result = triton.infer("echo", [item], outputs=[wanted])
    assert np.frombuffer(memory.areas["r"][32:44], np.float32).tolist() == [2, 4, 6]
    place = result.get_output("y").parameters
    assert (place["shared_memory_region"].string_param, place["shared_memory_byte_size"].int64_param) == ("r", 12)
    assert place["shared_memory_offset"].int64_param == 32
    assert list(result.get_response().raw_output_contents) == [b""]
    wanted.set_shared_memory("r", 8)
    with pytest.raises(Refused, match="'shared_memory_byte_size' is 8"):
        triton.infer("echo", [item], outputs=[wanted])
    item.set_shared_memory("r", 16)
    with pytest.raises(Refused, match="'shared_memory_byte_size' of 16, expected 12"):
        triton.infer("echo", [item])
    triton.unregister_system_shared_memory("r")
    assert not triton.get_system_shared_memory_status().regions
    face.unreleased = 0


def test_cuda_shared_memory_and_what_is_not_there(triton, face):
    with pytest.raises(Refused, match="CUDA shared memory is not enabled"):
        triton.get_cuda_shared_memory_status()
    face.cuda_regions = memory = Memory()
    triton.register_cuda_shared_memory("c", b"aGFuZGxl", 1, 256)
    told = triton.get_cuda_shared_memory_status("c").regions["c"]
    assert (told.device_id, told.byte_size, memory.handles) == (1, 256, [b"handle"])
    triton.unregister_cuda_shared_memory()
    assert not memory.entries
    for call in (triton.get_trace_settings, triton.get_log_settings):
        with pytest.raises(Refused, match=r"traced|log's settings") as refused:
            call()
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


def test_who_may_not_call_is_refused_before_the_request_is_read(running, face):
    seen = []

    def guard(right, caller):
        seen.append((right, caller.address, caller.headers.get(b"authorization")))
        if right != "health" and caller.headers.get(b"authorization") != b"Bearer right":
            raise HttpError(401, "this needs a token.")

    face.guard = guard
    with client.InferenceServerClient(running.url) as triton:
        assert triton.is_server_live()
        with pytest.raises(Refused, match="needs a token") as refused:
            triton.infer("echo", [an_input(X)])
        assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
        triton.infer("echo", [an_input(X)], headers={"authorization": "Bearer right"})
        with pytest.raises(Refused, match="needs a token"):
            triton.load_model("echo")
        triton.start_stream(lambda result, error: None)
        triton.stop_stream()
    assert ("health", "127.0.0.1", None) in seen
    assert ("control", "127.0.0.1", None) in seen
    assert len(face.asked) == 1


def test_unix_sockets(tmp_path, face):
    seen = []
    face.guard = lambda right, caller: seen.append(caller.address)
    path = tmp_path / "s"
    with serving(face, GrpcListen(host=None, uds=path)) as running:
        assert running.server.port is None
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UsageError, match="another process listens"), serving(face, GrpcListen(host=None, uds=path)):
            pass
        with client.InferenceServerClient(f"unix:{path}") as triton:
            assert triton.infer("echo", [an_input(X)]).as_numpy("y").tolist() == [[2, 4, 6]]
    assert seen == ["unix"]
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(UsageError, match="is no socket"), serving(face, GrpcListen(host=None, uds=path)):
        pass
    assert path.read_text() == "a file"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match="is no socket"), serving(face, GrpcListen(port=port, uds=path)):
        pass
    with serving(face, GrpcListen(port=port)):  # what was bound before the other failed is free again
        pass


def test_an_address_that_is_taken(running, face):
    with pytest.raises(UsageError, match="is taken"), serving(face, GrpcListen(port=running.server.port)):
        pass
    with pytest.raises(UsageError, match="neither a host"), serving(face, GrpcListen(host=None)):
        pass


def test_draining_answers_what_was_asked_and_takes_no_more(face):
    face.delay_s = 0.3
    with serving(face) as running, client.InferenceServerClient(running.url) as triton:
        answers = queue.Queue()
        triton.async_infer("echo", [an_input(X)], lambda result, error: answers.put((result, error)))
        triton.start_stream(lambda result, error: answers.put((result, error)))
        triton.async_stream_infer("echo", [an_input(X)])
        wait_for(lambda: len(face.asked) == 2)
        began = time.monotonic()
        running.close(drain_s=60)
        assert time.monotonic() - began < 30
        found = [answers.get(timeout=30) for _ in range(3)]
        assert [result.as_numpy("y").tolist() for result, error in found if error is None] == [[[2, 4, 6]]] * 2
        (ended,) = [error for _, error in found if error is not None]
        assert "going down" in str(ended)
        with pytest.raises(Refused):
            triton.is_server_live()


def test_an_end_without_patience_cuts_what_is_open(face):
    with serving(face) as running, client.InferenceServerClient(running.url) as triton:
        answers = queue.Queue()
        triton.async_infer("echo", [an_input(NEVER)], lambda result, error: answers.put(error))
        wait_for(lambda: len(face.asked) == 1)
        running.close(drain_s=0.1)
        assert answers.get(timeout=30) is not None
        assert face.cancelled == 1
        running.close()  # again: nothing happens


def test_health_s_own_service(running, face):
    import grpc

    with grpc.insecure_channel(running.url) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        assert check(b"") == b"\x08\x01"
        assert check(b"\x0a\x1e" + b"inference.GRPCInferenceService"[:30]) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as refused:
            check(b"\x0a\x01x")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        unknown = watch(b"\x0a\x01x")
        assert next(unknown) == b"\x08\x03"
        unknown.cancel()
        states = watch(b"")
        assert next(states) == b"\x08\x01"
        face.is_ready = False
        assert next(states) == b"\x08\x02"
        assert check(b"") == b"\x08\x02"
        face.is_ready = True
        assert next(states) == b"\x08\x01"
        closing = threading.Thread(target=running.close, args=(20,))
        closing.start()
        assert next(states) == b"\x08\x02"
        assert list(states) == []
        closing.join(20)
        assert not closing.is_alive()


def test_processes_that_are_started_meanwhile_cause_no_complaints():
    code = """
import asyncio, sys
from tests.unit.server.grpc_faces import GrpcListen, echo_face, serve_grpc

async def main():
    server = await serve_grpc(echo_face(), GrpcListen(port=0))
    import grpc
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\\x08\\x01"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
        assert await process.wait() == 0
    await server.close()

try:
    import uvloop
    uvloop.install()
except ImportError:
    pass
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
