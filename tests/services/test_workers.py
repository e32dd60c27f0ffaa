"""Several front processes on one port: any of them answers alike, and none of them is missed when it dies."""

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
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.attacks.attacked import Attacked, attacked
from tests.attacks.loops import run
from tests.attacks.null_server import NullBundle, write_null
from tests.attacks.open_load import OpenLoad, outcomes
from tests.attacks.wire import FACTOR, OFFSET, WIDTH, AnswerReader, fault_of, infer
from tests.services.running_server import GOLDEN, serving

pytestmark = pytest.mark.timeout(400)
FRONTS = 3
PREFIX = f"onecard-workers-{os.getpid()}"
MODELS = {"tag": NullBundle(delay_ms=1), "other": NullBundle()}
MANY = 30
"""Connections: enough that each front has some of them."""


@pytest.fixture(scope="module")
def server() -> Iterator[Attacked]:
    words = ("--workers", str(FRONTS), "--grpc-port", "0", "--shared-memory-prefix", PREFIX)
    with attacked(MODELS, *words) as server:
        yield server


def ask(server: Attacked, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Over a connection of its own, which any front may have."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body).encode())
        response = connection.getresponse()
        return response.status, response.read()


def state(server: Attacked) -> dict:
    time.sleep(0.25)  # what was told a fifth of a second ago is told again
    status, body = ask(server, "GET", "/v2/onecard/state")
    assert status == 200, body
    return json.loads(body)


def counted(server: Attacked, name: str = "tag") -> int:
    """Requests that were answered, of all versions and fronts."""
    return sum(model["requests"] for model in state(server)["models"] if model["name"] == name)


def fronts(server: Attacked) -> list[psutil.Process]:
    """The processes with sockets, the main one first."""
    main, *others = server.processes()
    return [main, *(process for process in others if "onecard.server.worker" in process.cmdline())]


@contextlib.contextmanager
def connections(server: Attacked, count: int = MANY) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(socket.create_connection(("127.0.0.1", server.port), 60)) for _ in range(count)]


def tagged(peer: socket.socket, tag: int) -> str:
    """What is wrong with the answer to a request; empty if nothing is."""
    peer.sendall(infer(tag))
    reader = AnswerReader()
    while data := peer.recv(65536):
        if answers := reader.feed(data):
            return fault_of(answers[0], tag, 1) if answers[0].status == 200 else f"status {answers[0].status}"
    return "the connection ended"


def index(server: Attacked) -> dict[str, tuple[str, str]]:
    status, body = ask(server, "POST", "/v2/repository/index", {})
    assert status == 200
    return {each["name"]: (each["state"], each["version"]) for each in json.loads(body)}


def until(true: Callable[[], bool], server: Attacked) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end, server.output
        time.sleep(0.05)


def wait_for_fronts(server: Attacked) -> None:
    until(lambda: state(server)["server"]["fronts"] == FRONTS, server)


def counted_at_least(server: Attacked, count: int) -> int:
    """The count once it is so much: a front that is slow to tell its own is counted with what it told before."""
    until(lambda: counted(server) >= count, server)
    return counted(server)


def test_every_front_answers_and_all_are_counted_together(server):
    before = counted(server)
    with connections(server) as peers:
        assert [tagged(peer, tag) for tag, peer in enumerate(peers)] == [""] * MANY
        used = [len(process.net_connections("tcp")) for process in fronts(server)]
        assert len(used) == FRONTS and min(used) > 3, used  # more than the sockets that it listens on
        assert state(server)["server"]["open_connections"] >= MANY
    assert counted_at_least(server, before + MANY) == before + MANY
    told = state(server)
    assert {process["role"] for process in told["processes"]} == {"front-0", "front-1", "front-2", "engine"}
    assert (told["server"]["fronts"], told["server"]["ready"]) == (FRONTS, True)


def test_metrics_are_the_same_whoever_is_asked(server):
    with connections(server) as peers:
        assert not any(tagged(peer, tag) for tag, peer in enumerate(peers))
    total = counted_at_least(server, MANY)
    named = "onecard_requests_answered_total{"
    pages: list[str] = []

    def told() -> set[float]:
        pages[:] = [ask(server, "GET", "/metrics")[1].decode() for _ in range(10)]
        lines = [line for page in pages for line in page.splitlines() if line.startswith(named) and '"tag"' in line]
        return {float(line.split()[1]) for line in lines}

    until(lambda: told() == {total}, server)
    assert all(f"onecard_server_fronts {FRONTS}" in page for page in pages)


def test_a_model_is_loaded_and_unloaded_through_any_front_and_all_know_it_at_once(server):
    for _ in range(6):
        assert ask(server, "POST", "/v2/repository/models/other/load", {}) == (200, b"{}")
        found = [index(server)["other"] for _ in range(8)]
        assert found == [("READY", found[0][1])] * 8
        assert [ask(server, "GET", "/v2/models/other/ready")[0] for _ in range(8)] == [200] * 8
        assert ask(server, "POST", "/v2/repository/models/other/unload", {}) == (200, b"{}")
        assert [index(server)["other"][0] for _ in range(8)] == ["UNAVAILABLE"] * 8
        assert [ask(server, "GET", "/v2/health/ready")[0] for _ in range(8)] == [200] * 8
    answers = [ask(server, "POST", "/v2/repository/models/none/load", {}) for _ in range(8)]
    assert {status for status, _ in answers} == {404}
    assert len({body for _, body in answers}) == 1 and b"no model 'none' to load" in answers[0][1]
    write_null(server.folders["other"], NullBundle(fault="raise"))
    broken = {ask(server, "POST", "/v2/repository/models/other/load", {}) for _ in range(8)}
    assert len(broken) == 1 and next(iter(broken))[0] == 500 and b"It was made so." in next(iter(broken))[1]
    write_null(server.folders["other"])


def test_shared_memory_is_registered_once_for_all(server):
    path = Path("/dev/shm") / f"{PREFIX}-a"
    values = np.arange(2 * WIDTH, dtype=np.float32)
    path.write_bytes(values.tobytes() + bytes(values.nbytes))
    size = {"shared_memory_region": "r", "shared_memory_byte_size": values.nbytes}
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, WIDTH], "parameters": size}],
        "outputs": [{"name": "x_out", "parameters": {**size, "shared_memory_offset": values.nbytes}}],
    }
    try:
        for _ in range(4):
            registered = {"key": f"/{path.name}", "byte_size": 2 * values.nbytes}
            place = "/v2/systemsharedmemory/region/r"
            assert ask(server, "POST", f"{place}/register", registered)[0] == 200
            assert ask(server, "POST", f"{place}/register", registered)[0] == 400  # whichever front it is asked of
            assert [ask(server, "POST", "/v2/models/tag/infer", body)[0] for _ in range(12)] == [200] * 12
            written = np.frombuffer(path.read_bytes(), np.float32)[values.size :]
            np.testing.assert_array_equal(written, values * FACTOR + OFFSET)
            assert len(json.loads(ask(server, "GET", "/v2/systemsharedmemory/status")[1])) == 1
            assert ask(server, "POST", f"{place}/unregister", {})[0] == 200
            assert [ask(server, "POST", "/v2/models/tag/infer", body)[0] for _ in range(6)] == [400] * 6
    finally:
        path.unlink()


def test_a_front_that_is_killed_comes_back_and_knows_what_the_others_know(server):
    path = Path("/dev/shm") / f"{PREFIX}-b"
    path.write_bytes(bytes(4 * WIDTH))
    registered = {"key": f"/{path.name}", "byte_size": 4 * WIDTH}
    assert ask(server, "POST", "/v2/systemsharedmemory/region/kept/register", registered)[0] == 200
    path.unlink()  # it is known by its descriptor from now on
    with connections(server) as peers:
        assert not any(tagged(peer, tag) for tag, peer in enumerate(peers))
        time.sleep(1.2)  # what a front had counted is asked of it every second
        before = counted(server)
        victim = fronts(server)[1]
        victim.kill()
        psutil.wait_procs([victim], 60)
    assert counted_at_least(server, before) >= before
    wait_for_fronts(server)
    assert victim.pid not in [process.pid for process in fronts(server)]
    with connections(server) as peers:
        assert [tagged(peer, tag) for tag, peer in enumerate(peers)] == [""] * MANY
        assert min(len(process.net_connections("tcp")) for process in fronts(server)) > 3
    counted_at_least(server, before + MANY)
    size = {"shared_memory_region": "kept", "shared_memory_byte_size": 4 * WIDTH}
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "parameters": size}]}
    assert [ask(server, "POST", "/v2/models/tag/infer", body)[0] for _ in range(12)] == [200] * 12
    assert ask(server, "POST", "/v2/systemsharedmemory/unregister", {})[0] == 200


def test_no_request_is_lost_when_the_engine_dies_whichever_front_has_it(server):
    engine = server.engine()
    assert engine is not None
    restarts = state(server)["server"]["engine_restarts"]

    async def attack() -> OpenLoad:
        load = OpenLoad(server.port, 150.0, most=60)
        await load.run(0.7)
        engine.kill()
        await load.run(1.3)
        await load.settle(150.0)
        return load

    load = run(attack())
    assert outcomes(load.samples) == {"answered": len(load.samples)}
    until(lambda: state(server)["server"]["engine_restarts"] == restarts + 1, server)
    until(lambda: [ask(server, "GET", "/v2/health/ready")[0] for _ in range(12)] == [200] * 12, server)


def test_a_front_that_hangs_does_not_hold_up_who_asks_for_the_state(server):
    victim = fronts(server)[-1]
    victim.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert state_of_any(server)["server"]["fronts"] == FRONTS
        assert time.monotonic() - began < 30  # half of the time after which it would be killed
    finally:
        victim.send_signal(signal.SIGCONT)
    wait_for_fronts(server)


def test_a_front_that_hangs_is_started_again():
    with attacked({"tag": NullBundle()}, "--workers", str(FRONTS), "--hang-s", "2") as server:
        wait_for_fronts(server)
        victim = fronts(server)[-1]
        victim.send_signal(signal.SIGSTOP)
        assert psutil.wait_procs([victim], 90)[1] == []
        wait_for_fronts(server)


def state_of_any(server: Attacked) -> dict:
    """The state over several connections at once, of which one that hangs has some."""

    async def first() -> bytes:
        async def one() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            try:
                writer.write(b"GET /v2/onecard/state HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return await reader.read()
            finally:
                writer.close()

        asked = [asyncio.ensure_future(one()) for _ in range(MANY)]
        done, late = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        for task in late:
            task.cancel()
        return done.pop().result()

    return json.loads(run(first()).partition(b"\r\n\r\n")[2])


def test_grpc_is_answered_by_all_fronts(server):
    triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    before = counted(server)
    for tag in range(12):
        alone = [("grpc.use_local_subchannel_pool", 1)]
        with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}", channel_args=alone) as client:
            x = np.full((1, WIDTH), tag, np.float32)
            tensor = triton.InferInput("x", [1, WIDTH], "FP32")
            tensor.set_data_from_numpy(x)
            np.testing.assert_array_equal(client.infer("tag", [tensor]).as_numpy("x_out"), x * FACTOR + OFFSET)
            assert client.is_server_ready()
    assert counted_at_least(server, before + 12) == before + 12


def test_another_server_on_the_same_port_is_refused(server):
    words = [f"a={server.folders['other']}", "--http-port", str(server.port), "--workers", "2"]
    command = [sys.executable, "-W", "ignore", "-m", "tests.attacks.null_server", *words]
    here = Path(__file__).parents[2]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=150, cwd=here)
    assert ended.returncode != 0
    assert f"Listening on 127.0.0.1:{server.port} is not possible" in ended.stderr


def test_sigterm_answers_what_came_in_at_every_front():
    with attacked({"tag": NullBundle(delay_ms=5)}, "--workers", str(FRONTS)) as server:
        processes = server.processes()

        async def attack() -> OpenLoad:
            load = OpenLoad(server.port, 150.0, most=40)
            await load.run(1.0)
            server.process.send_signal(signal.SIGTERM)
            await load.run(0.5)
            await load.settle(60.0)
            return load

        load = run(attack())
        assert set(outcomes(load.samples)) <= {"answered", "unreachable"}
        assert outcomes(load.samples)["answered"] > 100
        assert server.process.wait(90) == 0
        assert psutil.wait_procs(processes, 60)[1] == []


def test_nothing_is_left_when_the_main_process_is_killed():
    with attacked({"tag": NullBundle()}, "--workers", str(FRONTS)) as server:
        processes = server.processes()
        assert len(processes) == 1 + FRONTS
        server.process.kill()
        assert psutil.wait_procs(processes, 60)[1] == []


def test_the_command_with_a_unix_domain_socket_and_a_second_signal(tmp_path):
    path, golden = tmp_path / "s", load_file(GOLDEN / "golden.safetensors")
    image = golden["in.image"][:1]
    data = {"name": "image", "datatype": "FP32", "shape": list(image.shape), "data": image.ravel().tolist()}
    body = json.dumps({"inputs": [data]}).encode()
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(f"m={GOLDEN}", "--uds", str(path), environment={"ONECARD_WORKERS": "2"}) as (_, server):
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        with contextlib.ExitStack() as opened:
            peers = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(20)]
            for peer in peers:
                peer.connect(str(path))
                peer.sendall(head + body)
                answer = peer.recv(1 << 16)
                assert answer.startswith(b"HTTP/1.1 200"), answer
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(90) in (0, -signal.SIGTERM)
        assert psutil.wait_procs(processes, 60)[1] == []
        assert "Traceback" not in server.output
