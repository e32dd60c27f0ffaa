"""The engine process as its fronts see it: a real process with models that do nothing, or something bad."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from onecard.ipc import packets
from onecard.ipc.messages import (
    VERSION,
    Ask,
    Cancel,
    CloseRegion,
    Hello,
    Infer,
    Models,
    OpenRegion,
    Ping,
    Pong,
    Quit,
    Sent,
    Told,
    encode,
    packet,
)
from onecard.ipc.models import ModelOptions
from onecard.ipc.segment import Segment
from onecard.ipc.tensors import INLINE_BYTES, Target, Tensor
from onecard.server.engine_process import EXIT_LOST
from tests.unit.server.engine_peers import PATIENCE_S, Peer, engine_process
from tests.unit.server.null_engine import WIDTH

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="shared memory and packets between processes need Linux"),
]


def rows(count: int, tag: float = 1.0) -> np.ndarray:
    return (np.arange(count * WIDTH, dtype=np.float32).reshape(count, WIDTH) + tag).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The socket of an engine process that the tests of this file share, as far as they leave it alive."""
    path = tmp_path_factory.mktemp("engine") / "s"
    with engine_process(path, "60") as process:
        yield path
        assert process.poll() is None, "a test's mistake ended the engine"


@pytest.fixture
def connect(place):
    """Connects fronts, and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def to(path=place, **more) -> Peer:
            return stack.enter_context(contextlib.closing(Peer(path, **more)))

        yield to


@pytest.fixture
def peer(connect):
    return connect()


@pytest.fixture
def gate(tmp_path):
    """A bundle whose model waits until it is let on."""
    folder = tmp_path / "gate"
    folder.mkdir()
    yield folder
    (folder / "open").touch()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 30])
def test_answers_are_their_requests_own_in_the_message_and_in_the_segment(peer, count):
    peer.load("m", "add-7", version="5")
    sent = {peer.infer("m", rows(count, tag)): tag for tag in (1.0, 2.0, 3.0)}
    for request, tag in sent.items():
        answer = peer.answer(request)
        (output,) = answer.outputs
        assert (output.offset < 0) == (count * WIDTH * 4 <= INLINE_BYTES)
        assert (output.name, output.dtype, output.shape, answer.version) == ("y", "float32", (count, WIDTH), "5")
        assert 0 <= answer.queue_s <= answer.total_s < 30 and 0 < answer.rows <= 64
        np.testing.assert_array_equal(peer.array(output), rows(count, tag) + 7)
        assert peer.mark(request) == 1
        if output.offset >= 0:
            peer.send(Sent((output.offset,)))


def test_bfloat16_travels_as_it_is(peer):
    peer.load("half", "bfloat16")
    carrier = np.arange(2 * WIDTH, dtype=np.int16).reshape(2, WIDTH)
    (output,) = peer.answer(peer.infer("half", carrier, "bfloat16")).outputs
    assert output.dtype == "bfloat16"
    np.testing.assert_array_equal(peer.array(output), carrier)


def test_answers_wait_for_room_and_none_is_lost(connect):
    peer = connect(answer_bytes=256 << 10)  # two answers of 30 rows
    peer.load("room", "add-0")
    requests = [peer.infer("room", rows(30, tag)) for tag in range(6)]
    small = peer.infer("room", rows(1))
    assert peer.answer(small).outputs[0].offset == -1, "what needs no room does not wait for it"
    for tag, request in enumerate(requests):
        (output,) = peer.answer(request).outputs
        np.testing.assert_array_equal(peer.array(output), rows(30, tag))
        peer.send(Sent((output.offset,)))


def test_an_answer_that_never_fits_is_refused_and_names_the_option(connect):
    peer = connect(answer_bytes=64 << 10)
    peer.load("large", "add-0")
    refused = peer.refused(peer.infer("large", rows(30)))
    assert refused.kind == "EngineError" and "--answer-memory" in refused.cure
    peer.answer(peer.infer("large", rows(1)))


def test_a_mark_says_whether_a_request_runs(peer, gate):
    peer.load("marked", gate)
    running = peer.infer("marked", rows(1))
    wait_for(lambda: peer.mark(running) == 1)
    waiting = peer.infer("marked", rows(1))
    peer.send(Ping(1))
    pong = peer.find(lambda m: isinstance(m, Pong))
    assert peer.mark(waiting) == 0 and pong.running_s > 0 and not pong.loading
    (gate / "open").touch()
    peer.answer(running), peer.answer(waiting)
    assert peer.mark(waiting) == 1
    wait_for(lambda: running_s(peer) == 0)


def test_cancelling_ends_what_waits_now_and_what_runs_later(peer, gate):
    peer.load("cancelled", gate)
    running = peer.infer("cancelled", rows(1))
    wait_for(lambda: peer.mark(running) == 1)
    waiting, kept = peer.infer("cancelled", rows(1)), peer.infer("cancelled", rows(1))
    for request in (running, 12345, waiting):
        peer.send(Cancel(request))
    assert "cancelled" in peer.refused(waiting).message
    (gate / "open").touch()
    peer.refused(running)
    peer.answer(kept)
    assert peer.mark(waiting) == 0


def test_deadlines_and_full_queues_come_back_as_they_are(peer, gate):
    peer.load("busy", gate, ModelOptions(policy={"queue_items": 1}))
    running = peer.infer("busy", rows(1))
    wait_for(lambda: peer.mark(running) == 1)
    waiting = peer.infer("busy", rows(1))
    full = peer.refused(peer.infer("busy", rows(1)))
    assert full.kind == "QueueFullError" and full.retry_after_s >= 0
    peer.send(Cancel(waiting))
    peer.refused(waiting)
    late = peer.infer("busy", rows(1), deadline=time.monotonic() + 0.2)
    time.sleep(0.3)
    (gate / "open").touch()
    assert peer.refused(late).kind == "DeadlineError"
    peer.answer(running)


def test_outputs_are_written_to_a_clients_device_memory_and_inputs_read_there(peer):
    peer.load("m", "add-7")
    nbytes = 2 * WIDTH * 4
    for name, handle in (("a", b"h" * 64), ("b", b"h" * 64), ("none", bytes(64))):
        call = next(peer.calls)
        peer.send(OpenRegion(call, name, handle, 0, 2 * nbytes))
        assert peer.done(call).kind == ("UsageError" if name == "none" else "")
    first = peer.infer("m", rows(2), targets=(Target("y", "a", nbytes, nbytes),))
    (written,) = peer.answer(first).outputs
    assert (written.region, written.offset, written.dtype, written.shape) == ("a", nbytes, "float32", (2, WIDTH))
    there = Tensor("x", "float32", (2, WIDTH), nbytes, b"", "a")
    request = next(peer.ids)
    peer.send(Infer(request, "m", 0, (there,)))
    np.testing.assert_array_equal(peer.array(peer.answer(request).outputs[0]), rows(2) + 14)
    beyond, small = Target("y", "a", nbytes + 4, nbytes), Target("y", "a", 0, 8)
    for wrong in (beyond, small, Target("y", "c", 0, nbytes), Target("z", "a", 0, nbytes)):
        assert peer.refused(peer.infer("m", rows(2), targets=(wrong,))).kind == "UsageError"
    call = next(peer.calls)
    peer.send(CloseRegion(call, "a"))
    assert peer.done(call).kind == ""
    request = next(peer.ids)
    peer.send(Infer(request, "m", 0, (there,)))
    assert "not registered" in peer.refused(request).message


def test_a_request_that_runs_alone_shares_the_process_with_nobody(connect, peer):
    other = connect()
    peer.load("one", "crowd-0.3")
    peer.load("two", "crowd-0.3")
    pair, single = (np.full((1, WIDTH), count, np.float32) for count in (2, 1))
    together = [peer.infer("one", pair), other.infer("two", pair)]
    wait_for(lambda: peer.mark(together[0]) == 1 and other.mark(together[1]) == 1)
    alone = [peer.infer("one", single, alone=True), other.infer("two", single, alone=True)]
    for front in (peer, other):  # what comes now comes behind both
        running_s(front)
    behind = [peer.infer("one", pair), other.infer("two", pair)]
    crowds = [crowd_of(p, request) for p, request in zip((peer, other) * 3, together + alone + behind, strict=True)]
    assert crowds == [2, 2, 1, 1, 2, 2]


def test_held_back_requests_can_be_cancelled_and_expire(peer, gate):
    peer.load("holding", gate)
    peer.load("free", "add-1")
    running = peer.infer("holding", rows(1))
    wait_for(lambda: peer.mark(running) == 1)
    alone = peer.infer("free", rows(1), alone=True)
    late = peer.infer("free", rows(1), deadline=time.monotonic() + 0.2)
    gone, kept = peer.infer("free", rows(1)), peer.infer("free", rows(1))
    peer.send(Cancel(gone))
    assert "cancelled" in peer.refused(gone).message
    assert peer.refused(late).kind == "DeadlineError"
    peer.send(Ask(1))
    assert peer.find(lambda m: isinstance(m, Told)).queued == 2
    peer.send(Cancel(alone))
    peer.refused(alone)
    peer.answer(kept)  # beside the one that runs
    (gate / "open").touch()
    peer.answer(running)


def test_the_death_of_a_front_takes_its_requests_and_no_others(connect, peer, gate):
    peer.load("shared", gate)
    doomed = connect()
    lost = doomed.infer("shared", rows(1))
    wait_for(lambda: doomed.mark(lost) == 1)
    waiting = [doomed.infer("shared", rows(1)) for _ in range(3)]
    mine = peer.infer("shared", rows(1))
    wait_for(lambda: ask(peer).queued == 4)
    doomed.close()
    wait_for(lambda: ask(peer).queued == 1)
    (gate / "open").touch()
    peer.answer(mine)
    assert [doomed.mark(request) for request in waiting] == [0, 0, 0]


def test_a_front_that_does_not_read_holds_nobody_up(connect, peer):
    peer.load("flood", "add-0")
    deaf = connect()
    deaf.requests.array[:] = 0
    offset = deaf.place(rows(4))[1]
    for request in range(2000):  # 32 MB of answers, of which a socket holds less than one
        deaf.send(Infer(10_000 + request, "flood", 0, (Tensor("x", "float32", (4, WIDTH), offset),)))
        if request % 20 == 0:
            peer.answer(peer.infer("flood", rows(1)))
    for request in range(2000):
        deaf.answer(10_000 + request)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("x", "float32", (1, WIDTH), -64),
        Tensor("x", "float32", (1, WIDTH), 1 << 40),
        Tensor("x", "float32", (1, WIDTH), (64 << 20) - 64),
        Tensor("x", "float32", (1, WIDTH), 66),
        Tensor("x", "float32", (-1, WIDTH), 64),
        Tensor("x", "float32", (1 << 62, 1 << 62), 64),
        Tensor("x", "float32", (1,) * 70, 64),
        Tensor("x", "object", (1, WIDTH), 64),
        Tensor("x", "float64", (1, WIDTH), 64),
        Tensor("x", "float32", (65, WIDTH), 64),
        Tensor("z", "float32", (1, WIDTH), 64),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(peer, tensor):
    peer.load("strict", "add-0")
    peer.send(Infer(1000, "strict", 0, (tensor,)))
    assert peer.refused(1000).kind in ("UsageError", "SpecError")
    peer.send(Infer(1001, "strict", 2, (Tensor("x", "float32", (1, WIDTH), 64),)))
    assert "mark" in peer.refused(1001).message
    assert "strict" in peer.refused(peer.infer("nobody", rows(1))).message
    peer.answer(peer.infer("strict", rows(1)))


@pytest.mark.parametrize(
    "bad",
    [
        b"\xc1",
        b"not msgpack at all",
        packet([encode(Hello(VERSION, 1, 4096, 4096))]),
        packet([encode(Sent((4096,)))]),
        packet([encode(Models(()))]),
    ],
    ids=["no-type", "garbage", "hello-twice", "never-sent", "wrong-way"],
)
def test_a_front_that_breaks_the_protocol_is_dropped_and_no_other(connect, peer, bad):
    rude = connect()
    packets.send(rude.sock, bad)
    with pytest.raises((EOFError, ConnectionError)):
        while True:
            rude.receive()
    peer.load("calm", "add-0")
    peer.answer(peer.infer("calm", rows(1)))


@pytest.mark.parametrize("kind", ["version", "no-segments", "one-segment", "wrong-size", "not-hello", "small"])
def test_who_does_not_say_hello_rightly_is_not_let_in(place, peer, kind):
    sock = packets.connect(place)
    sock.settimeout(PATIENCE_S)
    segments = [Segment.create("test", 8192), Segment.create("test", 100 if kind == "small" else 8192)]
    version = VERSION + (kind == "version")
    sizes = (8192, 4096) if kind == "wrong-size" else (8192, segments[1].nbytes)
    message = Ping(1) if kind == "not-hello" else Hello(version, 1, *sizes)
    descriptors = [s.fd for s in segments][: {"no-segments": 0, "one-segment": 1, "not-hello": 0}.get(kind, 2)]
    packets.send(sock, packet([encode(message)]), descriptors)
    assert packets.receive(sock) == (b"", [])
    sock.close()
    peer.load("calm", "add-0")
    peer.answer(peer.infer("calm", rows(1)))


def test_statistics_tell_what_became_of_requests(peer):
    peer.load("counted", "add-0")
    peer.load("failing", "fail")
    for _ in range(3):
        peer.answer(peer.infer("counted", rows(2)))
    failed = peer.refused(peer.infer("failing", rows(1)))
    assert failed.kind == "EngineError" and "not this one" in failed.message
    models = {m["name"]: m for m in json.loads(ask(peer).statistics)["model_stats"]}
    assert models["counted"]["inference_count"] == 6
    assert models["counted"]["inference_stats"]["success"]["count"] == 3
    assert models["failing"]["inference_stats"]["fail"]["count"] == 1
    assert ask(peer).memory["counted"].keys() >= {"allocated_bytes", "queued_bytes"}


def test_a_lost_device_ends_the_process_and_nobody_hears_of_an_error(connect, tmp_path):
    with engine_process(tmp_path / "s") as process:
        peer = connect(tmp_path / "s")
        peer.load("m", "lost")
        request = peer.infer("m", rows(1))
        with pytest.raises((EOFError, ConnectionError)):
            peer.ended(request)
        assert process.wait(PATIENCE_S) == EXIT_LOST
        assert peer.mark(request) == 1
        assert "can answer nothing more" in process.stderr.read()


@pytest.mark.parametrize("how", ["SIGTERM", "quit"])
def test_told_to_end_it_answers_what_it_has_and_takes_no_more(connect, tmp_path, how):
    folder = tmp_path / "gate"
    folder.mkdir()
    with engine_process(tmp_path / "s") as process:
        peer = connect(tmp_path / "s")
        peer.load("m", folder)
        requests = [peer.infer("m", rows(1))]
        wait_for(lambda: peer.mark(requests[0]) == 1)
        requests += [peer.infer("m", rows(8, tag)) for tag in range(3)]
        requests.append(peer.infer("m", rows(1), alone=True))
        peer.send(Ping(1))
        peer.find(lambda m: isinstance(m, Pong))  # it has them all
        process.send_signal(signal.SIGINT)  # the front's business
        process.send_signal(signal.SIGTERM) if how == "SIGTERM" else peer.send(Quit(100.0))
        wait_for(lambda: not (tmp_path / "s").exists())
        refused = peer.refused(peer.infer("m", rows(1)))
        assert refused.kind == "EngineClosedError"
        (folder / "open").touch()
        for request in requests:
            peer.answer(request)
        assert process.wait(PATIENCE_S) == 0


def test_it_ends_when_the_time_is_over(connect, tmp_path, gate):
    with engine_process(tmp_path / "s") as process:
        peer = connect(tmp_path / "s")
        peer.load("m", gate)
        requests = [peer.infer("m", rows(60, tag)) for tag in range(5)]
        wait_for(lambda: peer.mark(requests[0]) == 1)
        peer.send(Quit(0.1))
        assert [peer.refused(request).kind for request in requests[1:]] == ["EngineClosedError"] * 4
        (gate / "open").touch()
        peer.answer(requests[0])
        assert process.wait(PATIENCE_S) == 0


def test_without_a_front_it_ends_by_itself(connect, tmp_path):
    with engine_process(tmp_path / "s", "4") as process, engine_process(tmp_path / "t", "1") as lonely:
        peer = connect(tmp_path / "s")
        time.sleep(4.5)
        assert process.poll() is None
        peer.close()
        assert process.wait(PATIENCE_S) == 0
        assert lonely.wait(PATIENCE_S) == 0


def test_the_command_serves_and_dies_with_who_started_it(connect, tmp_path):
    path = tmp_path / "s"
    command = [sys.executable, "-m", "onecard.server.engine_process", "--socket", str(path), "--die-with-parent"]
    script = f"import subprocess, sys; subprocess.Popen({command!r}); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        peer = connect(path)
        assert peer.load("m", tmp_path / "nothing").kind == "BundleError"
        parent.kill()
        with pytest.raises((EOFError, ConnectionError)):
            while True:
                peer.receive()
    wait_for(lambda: not alive(peer.pid))


def test_a_second_process_does_not_take_the_socket_over(place, peer):
    with engine_process(place) as second:
        assert second.wait(PATIENCE_S) != 0
        assert "There is a file" in second.stderr.read()
    peer.send(Ping(1))
    peer.find(lambda m: isinstance(m, Pong))


def crowd_of(peer: Peer, request: int) -> int:
    return int(peer.array(peer.answer(request).outputs[0]).max())


def ask(peer: Peer) -> Told:
    call = next(peer.calls)
    peer.send(Ask(call))
    return peer.find(lambda m: isinstance(m, Told) and m.call == call)


def running_s(peer: Peer) -> float:
    """How long the oldest batch has been running; all that the front had sent before is there by then."""
    call = next(peer.calls)
    peer.send(Ping(call))
    return peer.find(lambda m: isinstance(m, Pong) and m.call == call).running_s


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
