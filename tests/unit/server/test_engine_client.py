"""The client in the front against engines in processes of their own that do what they are told, good or bad."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from onecard.errors import (
    BundleError,
    DeadlineError,
    EngineClosedError,
    EngineError,
    QueueFullError,
    UsageError,
)
from onecard.ipc.models import ModelOptions
from onecard.ipc.tensors import Target, Tensor
from onecard.server.device_regions import DeviceRegion
from onecard.server.engine_child import EngineChild
from onecard.server.engine_client import ClientOptions, EngineClient
from onecard.server.engine_memory import OnDevice
from onecard.server.http_types import HttpError
from tests.unit.server.http_peers import LOOPS, new_loop
from tests.unit.server.scripted_engine import Journal

pytestmark = pytest.mark.timeout(180)
SMALL = ClientOptions(request_bytes=1 << 20, answer_bytes=1 << 20, welcome_s=60.0)
X = np.arange(8, dtype=np.float32).reshape(2, 4)
ENGINE = [sys.executable, "-m", "tests.unit.server.scripted_engine"]


class Engines:
    """A client and its scripted engines, one after the other."""

    def __init__(self, folder: Path, client: EngineClient) -> None:
        self.folder = folder
        self.client = client
        self.journal = Journal(folder / "journal")
        self.child: EngineChild | None = None
        self.lives = 0
        self.lost: list[str] = []
        client.on_lost = self.lost.append

    async def start(self, *options: str, load: bool = True) -> None:
        self.lives += 1
        path = self.folder / f"{self.lives}.sock"
        self.child = EngineChild([*ENGINE, "--socket", str(path), "--journal", str(self.journal.path), *options])
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionError):
                await self.client.connect(path)
                break
            await asyncio.sleep(0.01)
        if load:
            await self.load()

    async def load(self, path: str = "/fine", name: str = "m") -> None:
        await asyncio.wait_for(self.client.load(name, Path(path), ModelOptions()), 30)

    async def end(self) -> str:
        """Wait for the engine's death, and tell the client."""
        how = await asyncio.wait_for(self.child.ended, 30)
        self.client.disconnect()
        return how

    async def kill(self) -> None:
        self.child.kill("by the test")
        await self.end()

    def infer(self, client: str = "", x: np.ndarray = X, **more) -> asyncio.Future:
        return self.client.infer("m", {"x": x}, {"x": "float32"}, client=client, **more)


@contextlib.asynccontextmanager
async def engines(folder: Path, options: ClientOptions = SMALL) -> AsyncIterator[Engines]:
    client = EngineClient(options)
    peer = Engines(folder, client)
    try:
        yield peer
    finally:
        await client.close()
        if peer.child is not None:
            peer.child.kill("the test is over")
            await peer.child.ended


def run(kind: str, what: Callable[[], Awaitable[None]]) -> None:
    loop = new_loop(kind)
    try:
        loop.run_until_complete(what())
    finally:
        loop.close()


@pytest.fixture(params=LOOPS)
def kind(request):
    return request.param


@pytest.fixture
def on_loop(kind, tmp_path):
    """Runs an async function of :class:`Engines`, with an engine that has a model unless told otherwise."""

    def runner(what, *, start: bool = True, options: ClientOptions = SMALL) -> None:
        async def whole() -> None:
            async with engines(tmp_path, options) as peer:
                if start:
                    await peer.start()
                await what(peer)

        run(kind, whole)

    return runner


def within(future: Awaitable, seconds: float = 30.0) -> Awaitable:
    return asyncio.wait_for(future, seconds)


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        await asyncio.sleep(0.01)


def state_of(pid: int) -> str:
    """One letter: R for a process that runs, S for one that sleeps, T for one that is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def in_body(peer: Engines, x: np.ndarray, lead: int = 0) -> np.ndarray:
    """An array in memory that a body was received into."""
    view = peer.client.allocate(x.nbytes + lead, -lead % 64)
    view[lead : lead + x.nbytes] = x.tobytes()
    return np.frombuffer(view[lead:], x.dtype).reshape(x.shape)


def test_an_answer(on_loop):
    async def what(peer):
        answer = await within(peer.infer())
        np.testing.assert_array_equal(answer.outputs["y"], X * 3 + 7)
        assert (answer.version, answer.rows, answer.queue_s, answer.total_s) == ("1", 2, 0.001, 0.002)
        answer.release()
        answer.release()
        model = peer.client.models["m"]
        assert (model.name, model.version, model.state, model.path, model.device) == ("m", "1", "READY", "/fine", "cpu")
        assert model.contract.batched
        assert peer.client.connected

    on_loop(what)


def test_many_at_once_each_get_their_own(on_loop):
    async def what(peer):
        arrays = [np.full((1, 4), number, np.float32) for number in range(200)]
        answers = await within(asyncio.gather(*[peer.infer(x=x) for x in arrays]))
        for x, answer in zip(arrays, answers, strict=True):
            np.testing.assert_array_equal(answer.outputs["y"], x * 3 + 7)
        assert (peer.client.used_bytes, peer.client.sent) == (0, 0)

    on_loop(what)


def test_answers_out_of_order(on_loop):
    async def what(peer):
        order: list[int] = []
        futures = [peer.infer("later", X + n) for n in range(3)] + [peer.infer("now", X + 3)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: order.append(number))
        answers = await within(asyncio.gather(*futures))
        for number, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.outputs["y"], (X + number) * 3 + 7)
        assert order == [3, 2, 1, 0]

    on_loop(what)


def test_a_body_in_the_segment_is_not_copied(on_loop):
    async def what(peer):
        x = in_body(peer, X, lead=37)
        used = peer.client.used_bytes
        future = peer.infer(x=x)
        assert peer.client.used_bytes == used == 4096
        del x
        assert peer.client.used_bytes == used, "it is kept until the answer"
        answer = await within(future)
        np.testing.assert_array_equal(answer.outputs["y"], X * 3 + 7)
        assert peer.client.used_bytes == 0

    on_loop(what)


def test_a_body_is_lent_until_its_last_view_is_gone(on_loop):
    async def what(peer):
        x = in_body(peer, X)
        part = np.ndarray((4,), np.float32, memoryview(x))[1:]
        del x
        gc.collect()
        assert peer.client.used_bytes == 4096
        thread = threading.Thread(target=part.sum)
        thread.start()
        thread.join()
        del part, thread
        assert peer.client.used_bytes == 0

    on_loop(what, start=False)


def test_an_array_over_the_lent_buffer_keeps_it_too(on_loop):
    async def what(peer):
        view = peer.client.allocate(64)
        x = np.ndarray((4,), np.float32, view)[1:]  # NumPy lets it hold what the buffer belongs to, not the buffer
        del view
        assert peer.client.used_bytes == 4096
        del x
        assert peer.client.used_bytes == 0

    on_loop(what, start=False)


def test_a_request_twice_over_one_body_has_two_marks(on_loop):
    async def what(peer):
        x = in_body(peer, X)
        await within(asyncio.gather(peer.infer(x=x), peer.infer(x=x)))
        first, second = peer.journal.read("infer")
        assert first["mark"] != second["mark"]
        assert first["marked"] == second["marked"] == 0
        await within(peer.infer(x=x))
        assert peer.journal.read("infer")[2]["mark"] == first["mark"]
        assert peer.journal.read("infer")[2]["marked"] == 0, "cleared again"

    on_loop(what)


def test_unaligned_strided_and_bfloat16_inputs(on_loop):
    async def what(peer):
        body = peer.client.allocate(X.nbytes + 4, 0)
        body[4:] = X.tobytes()
        unaligned = np.frombuffer(body[4:], np.float32).reshape(2, 4)
        strided = np.repeat(X, 2, axis=1)[:, ::2]
        for x in (unaligned, strided):
            answer = await within(peer.infer(x=x))
            np.testing.assert_array_equal(answer.outputs["y"], X * 3 + 7)
        carrier = np.arange(4, dtype=np.int16).reshape(1, 4)
        answer = await within(peer.client.infer("m", {"x": carrier}, {"x": "bfloat16"}))
        np.testing.assert_array_equal(answer.outputs["y"], carrier)
        assert answer.outputs["y"].dtype == np.int16

    on_loop(what)


def test_large_answers_use_the_segment_over_and_over(on_loop):
    async def what(peer):
        x = np.arange(1 << 15, dtype=np.float32).reshape(-1, 4)  # 128 KiB of 1 MiB
        for number in range(24):
            answer = await within(peer.infer(x=x + number))
            np.testing.assert_array_equal(answer.outputs["y"], (x + number) * 3 + 7)
            if number % 3 == 0:
                answer.release()
            elif number % 3 == 1:
                del answer
        await until(lambda: peer.journal.read("sent")[-1]["used"] <= 1 << 17)

    on_loop(what)


def test_an_answer_stays_while_something_refers_to_it(on_loop):
    async def what(peer):
        x = np.arange(1 << 15, dtype=np.float32).reshape(-1, 4)
        answer = await within(peer.infer(x=x))
        part = memoryview(answer.outputs["y"][1:])
        del answer
        for _ in range(20):
            await within(peer.infer(x=x * 0))
        np.testing.assert_array_equal(part, (x * 3 + 7)[1:])
        thread = threading.Thread(target=list.clear, args=([part],))  # the last reference goes in another thread
        del part
        thread.start()
        thread.join()
        del thread
        await until(lambda: peer.journal.read("sent")[-1]["used"] == 0)

    on_loop(what)


def test_answers_that_are_kept_fill_the_segment(on_loop):
    async def what(peer):
        x = np.arange(1 << 16, dtype=np.float32).reshape(-1, 4)  # 256 KiB of 1 MiB
        kept = [await within(peer.infer(x=x)) for _ in range(4)]
        with pytest.raises(EngineError, match="full"):
            await within(peer.infer(x=x))
        kept.pop().release()
        await until(lambda: peer.journal.read("sent"))
        await within(peer.infer(x=x))

    on_loop(what)


def test_an_old_connections_answer_stays_readable(on_loop):
    async def what(peer):
        x = np.arange(1 << 15, dtype=np.float32).reshape(-1, 4)
        old = await within(peer.infer(x=x))
        await peer.kill()
        await peer.start()
        new = await within(peer.infer(x=x * 0))
        np.testing.assert_array_equal(old.outputs["y"], x * 3 + 7)
        np.testing.assert_array_equal(new.outputs["y"], np.full_like(x, 7))
        assert (old.version, new.version) == ("1", "2")
        old.release()
        await within(peer.infer())
        assert peer.journal.read("sent") == []
        new.release()
        await until(lambda: peer.journal.read("sent"))

    on_loop(what)


def test_full_memory(on_loop):
    async def what(peer):
        view = peer.client.allocate(1 << 19)
        with pytest.raises(HttpError, match="come back later") as full:
            peer.client.allocate(1 << 19)
        assert (full.value.status, full.value.headers) == (503, ((b"Retry-After", b"1"),))
        with pytest.raises(HttpError, match="come back later"):
            peer.infer(x=np.zeros((1 << 15, 4), np.float32))
        with pytest.raises(HttpError, match="has 1,048,576 for all") as never:
            peer.client.allocate(1 << 20)
        assert never.value.status == 413
        await within(peer.infer())
        del view
        peer.client.allocate((1 << 20) - 64)
        assert peer.client.used_bytes == 0

    on_loop(what)


def test_errors_are_raised_in_their_own_class(on_loop):
    async def what(peer):
        with pytest.raises(QueueFullError, match="too many wait") as full:
            await within(peer.infer("refuse"))
        assert (full.value.retry_after_s, full.value.cure) == (3.0, "Come back.")
        with pytest.raises(EngineError, match="what is this") as strange:
            await within(peer.infer("refuse-strangely"))
        assert type(strange.value) is EngineError
        assert peer.client.used_bytes == 0

    on_loop(what)


def test_calls(on_loop):
    async def what(peer):
        told = await within(peer.client.ask())
        assert (told.statistics, told.queued) == (b"{}", 0)
        with pytest.raises(BundleError, match="broken") as broken:
            await peer.load("/broken")
        assert broken.value.cure == "Mend it."
        model = peer.client.models["m"]
        assert (model.state, model.path, model.reason) == ("READY", "/fine", "reload failed: it is broken.")
        assert peer.client.wanted["m"].path == Path("/fine")
        await peer.load("/finer")
        assert (peer.client.models["m"].version, peer.client.wanted["m"].version) == ("2", "2")
        assert peer.client.wanted["m"].path == Path("/finer")
        await within(peer.client.unload("m"))
        assert (peer.client.models["m"].contract, dict(peer.client.wanted)) == (None, {})
        with pytest.raises(UsageError, match="no such model"):
            await within(peer.client.unload("n"))

    on_loop(what)


def test_who_stops_waiting_for_a_load_changes_nothing(on_loop):
    async def what(peer):
        task = asyncio.ensure_future(peer.load("/slow"))
        await until(lambda: len(peer.journal.read("load")) == 2)
        task.cancel()
        await until(lambda: peer.client.wanted["m"].path == Path("/slow"))
        assert not peer.client.is_loading

    on_loop(what)


def test_the_contract_is_kept_while_the_spec_is_the_same(on_loop):
    async def what(peer):
        contract = peer.client.models["m"].contract
        await peer.load("/finer")
        assert peer.client.models["m"].contract is contract

    on_loop(what)


def test_on_models_is_told_and_may_fail(kind, tmp_path, caplog):
    async def whole():
        told = []

        def on_models():
            told.append(dict(client.models))
            raise ZeroDivisionError

        client = EngineClient(SMALL, on_models)
        peer = Engines(tmp_path, client)
        await peer.start()
        assert told[-1]["m"].state == "READY"
        await peer.kill()
        assert told[-1]["m"].state == "LOADING"
        assert told[-1]["m"].contract is not None
        await client.close()

    run(kind, whole)
    assert "what is told of the models failed" in caplog.text


def test_cancelling_tells_the_engine_and_keeps_the_memory_until_then(on_loop):
    async def what(peer):
        future = peer.infer("run")
        await until(lambda: peer.journal.read("infer"))
        future.cancel()
        assert peer.client.used_bytes == 4096
        await until(lambda: peer.client.used_bytes == 0)
        assert [line["id"] for line in peer.journal.read("cancel")] == [peer.journal.read("infer")[0]["id"]]
        assert future.cancelled()

    on_loop(what)


def test_a_timeout_of_the_caller_cancels(on_loop):
    async def what(peer):
        asked = peer.infer("run")
        await until(lambda: peer.journal.read("infer"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asked, 0.2)
        await until(lambda: peer.journal.read("cancel"))

    on_loop(what)


def test_what_cannot_be_sent_at_once_is_sent_later_and_what_is_of_no_use_never(on_loop):
    async def what(peer):
        os.kill(peer.child.pid, signal.SIGSTOP)
        await until(lambda: state_of(peer.child.pid) == "T")
        x = np.zeros((1, 4), np.float32)
        futures = [peer.infer(f"answer 99 {'-' * 4000}", x=x) for _ in range(900)]  # more than the socket takes
        await asyncio.sleep(0.05)
        unsent = [future for future in futures if not future.sent]
        assert 0 < len(unsent) < 900
        used = peer.client.used_bytes
        unsent[0].cancel()
        unsent[-1].cancel()
        assert peer.client.used_bytes == used - 2 * 4096
        with pytest.raises(DeadlineError):
            await within(peer.infer(timeout_s=0.05))
        assert peer.client.used_bytes == used - 2 * 4096
        os.kill(peer.child.pid, signal.SIGCONT)
        rest = [future for future in futures if not future.cancelled()]
        await within(asyncio.gather(*rest), 60)
        assert len(peer.journal.read("infer")) == 898
        assert peer.journal.read("cancel") == []

    on_loop(what, options=ClientOptions(request_bytes=4 << 20, answer_bytes=1 << 20))


def test_death_while_waiting(on_loop):
    async def what(peer):
        futures = [peer.infer("wait 1", X + n, timeout_s=300.0) for n in range(3)]
        killer = peer.infer("die-waiting 1")
        assert await peer.end() == "killed by SIGKILL (signal 9)"
        assert peer.lost == ["it closed the connection"]
        assert not peer.client.connected
        assert peer.client.waiting == 4
        await peer.start()
        answers = await within(asyncio.gather(*futures, killer))
        for number, answer in enumerate(answers[:3]):
            np.testing.assert_array_equal(answer.outputs["y"], (X + number) * 3 + 7)
        again = [line for line in peer.journal.read("infer") if line["life"] == 2]
        assert [line["alone"] for line in again] == [False] * 4
        assert [line["marked"] for line in again] == [0] * 4
        assert all(200 < line["deadline"] - time.monotonic() < 300 for line in again[:3])
        ids = [line["id"] for line in peer.journal.read("infer")]
        assert len(set(ids)) == len(ids) == 8

    on_loop(what)


def test_a_new_engine_opens_the_devices_memory_before_it_is_asked_again(on_loop):
    async def what(peer):
        for name in ("a", "b"):
            await within(peer.client.open_region(DeviceRegion(name, b"h" * 64, 0, 1024)))
        with pytest.raises(UsageError, match="it opens nothing"):
            await within(peer.client.open_region(DeviceRegion("none", bytes(64), 0, 1024)))
        await within(peer.client.close_region("b"))
        there = OnDevice((Tensor("z", "float32", (1, 4), 64, b"", "a"),), (Target("y", "a", 0, 64),))
        waiting = peer.infer("wait 1", device=there)
        killer = peer.infer("die-waiting 1")
        await peer.end()
        await peer.start()
        await within(asyncio.gather(waiting, killer))
        (opened,) = [line for line in peer.journal.read("open") if line["life"] == 2]
        first = [line["life"] for line in peer.journal.read("infer")].index(2)
        assert (opened["name"], opened["at"]) == ("a", first)
        asked = [line for line in peer.journal.read("infer") if line["client"] == "wait 1"]
        assert [(line["inputs"], line["targets"]) for line in asked] == [(2, [["y", "a", 0, 64]])] * 2

    on_loop(what)


def test_what_was_running_is_run_again_first_and_alone(on_loop):
    async def what(peer):
        waiting = peer.infer("wait 1")
        running = [peer.infer("run 1"), peer.infer("run 1")]
        killer = peer.infer("die-running 1")
        await peer.end()
        await peer.start()
        await within(asyncio.gather(waiting, *running, killer))
        again = [line for line in peer.journal.read("infer") if line["life"] == 2]
        assert [(line["client"], line["alone"]) for line in again] == [
            ("run 1", True), ("run 1", True), ("die-running 1", True), ("wait 1", False)
        ]  # fmt: skip
        assert [line["marked"] for line in again] == [0] * 4

    on_loop(what)


def test_what_was_running_at_each_of_three_deaths_is_refused(on_loop, caplog):
    async def what(peer):
        bystander = peer.infer("wait 3")
        killer = peer.infer("die-running 99")
        await peer.end()
        for _ in range(2):
            await peer.start(load=False)
            assert peer.client.waiting == 2, "held until their model serves"
            task = asyncio.ensure_future(peer.load())
            await peer.end()
            with contextlib.suppress(EngineError):
                await task
        with pytest.raises(EngineError, match="each of the 3 times that the engine died"):
            await within(killer)
        await peer.start()
        await within(bystander)
        runs = [(line["client"], line["life"]) for line in peer.journal.read("infer")]
        assert runs.count(("wait 3", 4)) == 1
        assert not [life for client, life in runs if client.startswith("die") and life == 4]

    with caplog.at_level(logging.ERROR, "onecard.server"):
        on_loop(what)
    assert "client 'die-running 99' for model 'm' (x: float32[2, 4]) was running each of the 3 times" in caplog.text


def test_max_runs_one_is_never_again(on_loop):
    async def what(peer):
        killer = peer.infer("die-running 99")
        await peer.end()
        with pytest.raises(EngineError, match="each of the 1 times"):
            await within(killer)

    on_loop(what, options=ClientOptions(1 << 20, 1 << 20, max_runs=1))


def test_new_requests_wait_through_an_outage_up_to_a_bound(on_loop):
    async def what(peer):
        await peer.kill()
        futures = [peer.infer(x=X + n) for n in range(3)]
        peer.client.restart_s = 2.5
        with pytest.raises(QueueFullError, match="3 requests wait") as full:
            peer.infer()
        assert full.value.retry_after_s == 3
        await peer.start()
        for number, answer in enumerate(await within(asyncio.gather(*futures))):
            np.testing.assert_array_equal(answer.outputs["y"], (X + number) * 3 + 7)

    on_loop(what, options=ClientOptions(1 << 20, 1 << 20, max_waiting=3))


def test_requests_of_a_model_wait_until_it_serves_again(on_loop):
    async def what(peer):
        await peer.load(name="other")
        await peer.kill()
        first, second = peer.infer(), peer.client.infer("other", {"x": X}, {})
        await peer.start(load=False)
        assert peer.client.recovering == {"m", "other"}
        assert {model.state for model in peer.client.models.values()} == {"LOADING"}
        await peer.load(name="other")
        await within(second)
        assert not first.done()
        assert peer.client.waiting == 1
        with pytest.raises(BundleError):
            await peer.load("/broken", "m")
        with pytest.raises(EngineError, match="could not be opened again: it is broken"):
            await within(first)
        assert peer.client.models["m"].state == "UNAVAILABLE"

    on_loop(what)


def test_a_model_that_is_given_up(on_loop):
    async def what(peer):
        await peer.kill()
        future = peer.infer()
        peer.client.give_up("m", BundleError("it is gone."))
        with pytest.raises(BundleError, match="it is gone"):
            await within(future)
        model = peer.client.models["m"]
        assert (model.state, model.contract, model.reason) == ("UNAVAILABLE", None, "it is gone.")

    on_loop(what)


def test_deadlines_pass_in_an_outage(on_loop):
    async def what(peer):
        before = peer.infer("wait 9", timeout_s=1.0)
        await until(lambda: peer.journal.read("infer"))
        await peer.kill()
        began = time.monotonic()
        after, none = peer.infer(timeout_s=0.3), peer.infer()
        with pytest.raises(DeadlineError, match="deadline"):
            await within(after)
        assert 0.25 < time.monotonic() - began < 10
        with pytest.raises(DeadlineError):
            await within(before)
        assert peer.client.waiting == 1
        await peer.start()
        await within(none)
        assert len(peer.journal.read("infer")) == 2
        assert peer.client.used_bytes == 0

    on_loop(what)


def test_a_deadline_passes_though_the_engine_hangs(on_loop):
    async def what(peer):
        hanging = peer.infer("stop-itself", timeout_s=0.2)
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            await within(hanging)
        assert time.monotonic() - began > 1.0
        assert peer.client.used_bytes == 4096, "the engine may still read it"
        await peer.kill()
        assert peer.client.used_bytes == 0

    on_loop(what)


def test_what_is_cancelled_in_an_outage_is_dropped(on_loop):
    async def what(peer):
        before = peer.infer("wait 9")
        await until(lambda: peer.journal.read("infer"))
        await peer.kill()
        after, kept = peer.infer(), peer.infer()
        before.cancel()
        after.cancel()
        assert peer.client.used_bytes == 4096
        await peer.start()
        await within(kept)
        assert len(peer.journal.read("infer")) == 2

    on_loop(what)


def test_what_is_cancelled_before_the_death_is_dropped(on_loop):
    async def what(peer):
        future = peer.infer("hang-running")
        await until(lambda: peer.journal.read("infer"))
        future.cancel()
        await peer.kill()
        assert (peer.client.waiting, peer.client.used_bytes) == (0, 0)

    on_loop(what)


@pytest.mark.parametrize("word", ["garbage", "bad-offset", "bad-dtype", "bad-size"])
def test_garbage_ends_the_connection_and_loses_nothing(on_loop, word):
    async def what(peer):
        futures = [peer.infer(f"{word} 1"), peer.infer("wait 1")]
        await until(lambda: peer.lost)
        assert "cannot be understood" in peer.lost[0]
        assert not peer.client.connected
        await peer.kill()
        await peer.start()
        await within(asyncio.gather(*futures))

    on_loop(what)


def test_an_answer_that_nobody_asked_for_is_let_go_of(on_loop, caplog):
    async def what(peer):
        x = np.zeros((1 << 13, 4), np.float32)
        answer = await within(peer.infer("answer-twice", x))
        await within(peer.client.ask())
        answer.release()
        await until(lambda: peer.journal.read("sent") and peer.journal.read("sent")[-1]["used"] == 0)

    on_loop(what)
    assert "which it does not have" in caplog.text


def test_calls_fail_with_the_engine(on_loop):
    async def what(peer):
        with pytest.raises(EngineError, match="the engine is gone"):
            await peer.load("/kills")
        assert peer.client.wanted["m"].path == Path("/fine")
        await peer.end()
        for call in (peer.load, peer.client.ask, lambda: peer.client.unload("m")):
            with pytest.raises(EngineClosedError, match="being started again"):
                await call()
        assert not peer.client.is_loading

    on_loop(what)


def test_another_version_of_the_messages(on_loop):
    async def what(peer):
        with pytest.raises(EngineError, match="version 99 of the messages, expected"):
            await peer.start("--version", "99")
        assert not peer.client.connected
        await peer.kill()
        await peer.start()
        await within(peer.infer())

    on_loop(what, start=False)


def test_an_engine_that_does_not_welcome(kind, tmp_path):
    async def whole():
        from onecard.ipc import packets

        async with engines(tmp_path, ClientOptions(1 << 20, 1 << 20, welcome_s=0.2)) as peer:
            path = tmp_path / "mute.sock"
            with contextlib.closing(packets.listen(path)) as listener:
                with pytest.raises(EngineError, match=r"did not answer within 0\.2 s"):
                    await peer.client.connect(path)
                with contextlib.closing(packets.accept(listener)):
                    pass
            with pytest.raises(ConnectionError):
                await peer.client.connect(path)
            peer.client._options = SMALL  # this one gets the time that it needs
            await peer.start()
            await within(peer.infer())

    run(kind, whole)


def test_connecting_twice_and_after_the_end(on_loop):
    async def what(peer):
        with pytest.raises(EngineError, match="there is a connection"):
            await peer.client.connect(peer.folder / "1.sock")
        await peer.client.close()
        with pytest.raises(EngineError, match="closed"):
            await peer.client.connect(peer.folder / "1.sock")

    on_loop(what)


def test_connecting_again_without_a_word_before(on_loop):
    async def what(peer):
        future = peer.infer("die-running 1")
        await peer.child.ended
        await until(lambda: not peer.client.connected)
        await peer.start()
        await within(future)
        assert peer.journal.read("infer")[-1]["alone"]

    on_loop(what)


def test_closing_ends_what_is_left(on_loop):
    async def what(peer):
        sent = peer.infer("run")
        call = asyncio.ensure_future(peer.load("/hangs"))
        await until(lambda: peer.journal.read("infer"))
        await peer.client.close()
        with pytest.raises(EngineClosedError):
            await within(sent)
        with pytest.raises(EngineError):
            await call
        with pytest.raises(EngineClosedError):
            peer.infer()
        await peer.client.close()

    on_loop(what)


def test_closing_in_an_outage(on_loop):
    async def what(peer):
        future = peer.infer()
        await peer.client.close()
        with pytest.raises(EngineClosedError):
            await within(future)

    on_loop(what, start=False)


def test_nothing_leaks_over_many_lives(on_loop):
    async def what(peer):
        def descriptors():
            return len(os.listdir("/proc/self/fd"))

        counts = []
        for _ in range(3):
            future = peer.infer("wait 3")
            await peer.kill()
            await peer.start()
            gc.collect()
            counts.append(descriptors())
        await within(future)
        assert len(set(counts)) == 1

    on_loop(what)


def test_the_front_needs_no_torch():
    code = "import sys, onecard.server.engine_guard; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
