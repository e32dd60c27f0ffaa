"""The guard against real engine processes that die, hang, stop, or cannot open their models."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from onecard.errors import BundleError, EngineClosedError, EngineError
from onecard.ipc import packets
from onecard.ipc.models import ModelOptions
from onecard.server.engine_child import EngineChild, describe_exit
from onecard.server.engine_client import ClientOptions, EngineClient
from onecard.server.engine_folders import sweep
from onecard.server.engine_guard import EngineGuard, GuardOptions
from tests.unit.server.http_peers import LOOPS, new_loop
from tests.unit.server.scripted_engine import Journal

pytestmark = pytest.mark.timeout(180)
SMALL = ClientOptions(request_bytes=1 << 20, answer_bytes=1 << 20, welcome_s=60.0)
QUICK = GuardOptions(ping_s=0.05, hang_s=60.0, hang_loading_s=60.0, hang_batch_s=60.0, first_backoff_s=0.1,
                     most_backoff_s=0.4, end_s=10.0, lost_s=10.0)  # fmt: skip
X = np.arange(8, dtype=np.float32).reshape(2, 4)
ENGINE = [sys.executable, "-m", "tests.unit.server.scripted_engine", "--journal"]


class Seen:
    """What a guard told."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.ends: list[str] = []
        self.recoveries: list[float] = []
        self.started = self.pids.append
        self.ended = self.ends.append
        self.recovered = self.recoveries.append


class Guarded:
    def __init__(self, folder: Path, client: EngineClient, models: dict[str, str], more: tuple) -> None:
        options, arguments = more
        self.client = client
        self.journal = Journal(folder / "journal")
        self.seen = Seen()
        desired = {name: (Path(path), ModelOptions(device="cpu")) for name, path in models.items()}
        command = [*ENGINE, str(self.journal.path), *arguments]
        self.guard = EngineGuard(command, client, desired, options, self.seen)

    @contextlib.contextmanager
    def hasty(self, **limits: float) -> Iterator[None]:
        """Short limits for a while, and at most for one engine: a busy machine keeps the next one waiting, too."""
        guard, ended = self.guard, self.seen.ended
        before = guard._options

        def put_back(how: str) -> None:
            guard._options, self.seen.ended = before, ended
            ended(how)

        guard._options, self.seen.ended = dataclasses.replace(before, **limits), put_back
        try:
            yield
        finally:
            guard._options, self.seen.ended = before, ended

    def infer(self, client: str = "", x: np.ndarray = X, model: str = "m", **more) -> asyncio.Future:
        return self.client.infer(model, {"x": x}, {}, client=client, **more)

    async def answered(self, *arguments, **more) -> str:
        """An answer's version, which is the engine's life."""
        return await self.version(self.infer(*arguments, **more))

    async def version(self, asked: asyncio.Future) -> str:
        answer = await asyncio.wait_for(asked, 60)
        np.testing.assert_array_equal(answer.outputs["y"], X * 3 + 7)
        return answer.version

    def loads(self, life: int) -> list[tuple[str, str, str]]:
        loads = [line for line in self.journal.read("load") if line["life"] == life]
        return [(line["name"], line["path"], line["version"]) for line in loads]


@contextlib.asynccontextmanager
async def guarded(
    folder: Path, models: dict[str, str], options: GuardOptions = QUICK, arguments: tuple[str, ...] = ()
) -> AsyncIterator[Guarded]:
    client = EngineClient(SMALL)
    peer = Guarded(folder, client, models, (options, arguments))
    try:
        yield peer
    finally:
        await peer.guard.stop(0.0)
        await client.close()
    for pid in peer.seen.pids:
        assert not Path(f"/proc/{pid}").exists(), "ended, and reaped"


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
    def runner(what, models=None, *, start: bool = True, options=QUICK, arguments=()) -> None:
        async def whole() -> None:
            async with guarded(tmp_path, models or {"m": "/fine"}, options, arguments) as peer:
                if start:
                    await peer.guard.start()
                await what(peer)

        run(kind, whole)

    return runner


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        await asyncio.sleep(0.01)


def test_start_and_stop(on_loop):
    async def what(peer):
        folder = peer.guard._folder
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert os.getsid(peer.guard.pid) != os.getsid(0), "the terminal's Ctrl-C is not for it"
        assert peer.loads(1) == [("m", "/fine", ""), ("n", "/finer", "")]
        assert peer.journal.read("load")[0]["device"] == "cpu"
        assert await peer.answered() == "1"
        await peer.guard.stop(2.5)
        assert peer.journal.read("quit") == [{"event": "quit", "life": 1, "drain_s": 2.5}]
        assert not folder.exists()
        assert peer.guard.pid is None
        assert (peer.guard.restarts, peer.guard.last_recovery_s, peer.seen.ends) == (0, None, [])

    on_loop(what, {"m": "/fine", "n": "/finer"})


def test_death_loses_nothing(on_loop, caplog):
    async def what(peer):
        waiting = [peer.infer("wait 1") for _ in range(3)]
        killer = peer.infer("die-running 1")
        answers = await asyncio.wait_for(asyncio.gather(*waiting, killer), 60)
        assert {answer.version for answer in answers} == {"2"}
        assert peer.loads(2) == [("m", "/fine", "1")]
        assert peer.seen.ends == ["killed by SIGKILL (signal 9)"]
        assert peer.guard.restarts == 1
        await until(lambda: peer.seen.recoveries)
        assert peer.seen.recoveries == [peer.guard.last_recovery_s] == [peer.client.restart_s]
        assert peer.guard.last_recovery_s < 30
        assert len(set(peer.seen.pids)) == 2

    on_loop(what)
    assert "ended: killed by SIGKILL (signal 9); the next one is started" in caplog.text
    assert "was running when the engine died; it is run again, alone" in caplog.text


def test_an_exit_status_in_words(on_loop):
    async def what(peer):
        assert await peer.answered("exit 1") == "2"
        assert peer.seen.ends == ["exit status 7"]

    on_loop(what)


def test_poison_is_refused_and_the_others_are_answered(on_loop):
    async def what(peer):
        others = [peer.infer("wait 3") for _ in range(4)]
        with pytest.raises(EngineError, match="each of the 3 times"):
            await asyncio.wait_for(peer.infer("die-running 99"), 60)
        await asyncio.wait_for(asyncio.gather(*others), 60)
        assert peer.guard.restarts == 3
        poison = [line["alone"] for line in peer.journal.read("infer") if line["client"] == "die-running 99"]
        assert poison == [False, True, True]

    on_loop(what)


def test_a_stopped_engine_is_killed(on_loop):
    async def what(peer):
        await peer.answered()
        began, stopped = time.monotonic(), peer.infer("stop-itself 1")
        await until(lambda: len(peer.journal.read("infer")) == 2)
        with peer.hasty(hang_s=1.0):
            assert await peer.version(stopped) == "2"
        assert time.monotonic() - began > 0.8  # its last sign of life may be a little older
        assert peer.seen.ends[0].startswith("killed, it did not answer for 1")

    on_loop(what)


def test_an_engine_that_hangs_is_killed_and_the_hanging_request_is_run_alone(on_loop):
    async def what(peer):
        hanging = peer.infer("hang-running 1")
        await until(lambda: peer.journal.read("infer"))
        with peer.hasty(hang_s=1.0):
            assert await peer.version(hanging) == "2"
        assert peer.journal.read("infer")[-1]["alone"]

    on_loop(what)


def test_a_batch_that_does_not_end(on_loop):
    async def what(peer):
        assert await peer.answered("run-on 1") == "2"
        assert peer.seen.ends == ["killed, one batch ran for 1000.0 s"]

    on_loop(what)


def test_a_model_that_opens_slowly_is_no_hang(on_loop, tmp_path):
    gate = tmp_path / "waits"
    gate.mkdir()

    async def wait_long(peer, opening, loads):
        await until(lambda: len(peer.journal.read("load")) == loads)
        with peer.hasty(hang_s=0.2):
            await asyncio.sleep(0.5)
        assert peer.seen.ends == [] and not opening.done()
        (gate / "open").touch()
        await opening

    async def what(peer):
        await wait_long(peer, asyncio.ensure_future(peer.guard.start()), 1)
        (gate / "open").unlink()
        await wait_long(peer, asyncio.ensure_future(peer.client.load("m", gate, ModelOptions())), 2)
        assert await peer.answered() == "1"

    on_loop(what, {"m": str(gate)}, start=False)


def test_a_load_that_hangs_is_killed_in_the_end(on_loop):
    async def what(peer):
        opening = asyncio.ensure_future(peer.client.load("m", Path("/hangs"), ModelOptions()))
        await until(lambda: len(peer.journal.read("load")) == 2)
        with peer.hasty(hang_loading_s=1.0), pytest.raises(EngineError, match="the engine is gone"):
            await asyncio.wait_for(opening, 30)
        assert await peer.answered() == "2"
        assert peer.loads(2) == [("m", "/fine", "1")]

    on_loop(what)


@pytest.mark.parametrize("word", ["garbage", "bad-offset"])
def test_garbage_costs_the_engine_its_life(on_loop, word):
    async def what(peer):
        assert await peer.answered(f"{word} 1") == "2"
        assert peer.guard.restarts == 1

    on_loop(what)


def test_a_pause_of_our_own_is_not_the_engines_silence(on_loop):
    async def what(peer):
        await peer.answered()
        os.kill(peer.guard.pid, signal.SIGSTOP)
        with peer.hasty(hang_s=1.0):
            await asyncio.sleep(0.2)
            time.sleep(2.5)  # the loop stands still
            await asyncio.sleep(0.06)
        os.kill(peer.guard.pid, signal.SIGCONT)
        assert (await peer.answered(), peer.guard.restarts) == ("1", 0)

    on_loop(what)


def test_versions_and_paths_that_served_last_are_opened_again(on_loop):
    async def what(peer):
        await peer.client.load("m", Path("/finer"), ModelOptions(device="cuda:7"))
        await peer.client.load("extra", Path("/extra"), ModelOptions())
        await peer.client.unload("n")
        with pytest.raises(BundleError):
            await peer.client.load("m", Path("/broken"), ModelOptions())
        assert await peer.answered("die-running 1") == "2"
        assert await peer.answered(model="extra") == "2"
        assert peer.loads(2) == [("m", "/finer", "2"), ("extra", "/extra", "1")]
        assert [line["device"] for line in peer.journal.read("load") if line["life"] == 2] == ["cuda:7", "auto"]
        assert peer.client.models["m"].version == "2"

    on_loop(what, {"m": "/fine", "n": "/fine"})


@pytest.mark.parametrize("word", ["kills", "serves-and-kills"])
def test_a_new_version_that_kills_the_engine_leaves_the_old_one(on_loop, word):
    async def what(peer):
        waiting = peer.infer("wait 1")
        with pytest.raises(EngineError, match="the engine is gone"):
            await peer.client.load("m", Path(f"/{word}"), ModelOptions())
        assert (await asyncio.wait_for(waiting, 60)).version == "2"
        assert peer.loads(2) == [("m", "/fine", "1")]
        assert peer.client.models["m"].path == "/fine"

    on_loop(what)


def test_a_model_that_cannot_be_opened_again(on_loop):
    async def what(peer):
        lost, kept = peer.infer("wait 1"), peer.infer("wait 1", model="n")
        await until(lambda: len(peer.journal.read("infer")) == 2)
        os.kill(peer.guard.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="it is broken"):
            await asyncio.wait_for(lost, 60)
        assert (await asyncio.wait_for(kept, 60)).version == "2"
        assert peer.client.models["m"].state == "UNAVAILABLE"
        await peer.client.load("m", Path("/fine"), ModelOptions())
        await peer.answered()

    on_loop(what, {"m": "/broken 2", "n": "/fine"})


def test_a_model_that_kills_each_engine_is_left_out(on_loop, caplog):
    async def what(peer):
        lost, kept = peer.infer("wait 1"), peer.infer("wait 9", model="n")
        await until(lambda: len(peer.journal.read("infer")) == 2)
        os.kill(peer.guard.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="2 engines in a row died while they opened it"):
            await asyncio.wait_for(lost, 60)
        await until(lambda: peer.journal.read("infer")[-1]["life"] == 4)
        kept.cancel()
        assert peer.guard.restarts == 3

    options = GuardOptions(ping_s=0.05, first_backoff_s=0.01, max_load_deaths=2)
    on_loop(what, {"m": "/kills 2", "n": "/fine"}, options=options)
    assert "model 'm' cannot be opened again" in caplog.text


def test_backoff(on_loop):
    async def what(peer):
        told, took = [], []
        backoff_s = peer.guard._backoff_s

        def tell() -> float:
            told.append(backoff_s())
            return told[-1]

        peer.guard._backoff_s = tell
        for life in range(2, 7):
            os.kill(peer.guard.pid, signal.SIGKILL)
            began = time.monotonic()
            await until(lambda life=life: len(peer.seen.pids) == life)
            took.append(time.monotonic() - began)
            await until(lambda life=life: peer.client.connected and peer.guard.restarts == life - 1)
        assert told == [0.0, 0.3, 0.6, 0.8, 0.8]
        assert all(took_s >= told_s for took_s, told_s in zip(took, told, strict=True))
        assert await peer.answered() == "6"
        os.kill(peer.guard.pid, signal.SIGKILL)
        await until(lambda: len(peer.seen.pids) == 7)
        assert told[5:] == [0.0], "one that answered starts the count anew"

    on_loop(what, options=GuardOptions(first_backoff_s=0.3, most_backoff_s=0.8))


def test_the_first_start_fails_with_its_model(on_loop):
    async def what(peer):
        with pytest.raises(BundleError, match="it is broken"):
            await peer.guard.start()
        assert peer.guard.pid is None
        assert not peer.guard._folder.exists()

    on_loop(what, {"n": "/fine", "m": "/broken"}, start=False)


def test_the_first_start_fails_with_the_process(on_loop):
    async def what(peer):
        with pytest.raises(EngineError, match=r"ended before all models were open: killed by SIGKILL"):
            await peer.guard.start()
        assert len(peer.seen.pids) == 1

    on_loop(what, {"m": "/kills"}, start=False)


def test_a_process_that_ends_before_it_listens(on_loop):
    async def what(peer):
        with pytest.raises(EngineError, match="exit status 3"):
            await peer.guard.start()

    on_loop(what, start=False, arguments=("--never-starts",))


def test_a_program_that_is_not_there(kind, tmp_path):
    async def whole():
        client = EngineClient(SMALL)
        guard = EngineGuard([str(tmp_path / "nothing")], client, {}, QUICK)
        with pytest.raises(EngineError, match="cannot be started"):
            await guard.start()
        await guard.stop(1.0)
        await client.close()

    run(kind, whole)


def test_stop_kills_what_does_not_end(on_loop):
    async def what(peer):
        began = time.monotonic()
        await peer.guard.stop(0.1)
        assert 1.5 < time.monotonic() - began < 30  # by itself it ends after 60 s
        assert peer.guard.pid is None

    on_loop(what, arguments=("--deaf-to-quit",), options=GuardOptions(end_s=0.8))


def test_stop_while_the_next_engine_is_awaited(on_loop):
    async def what(peer):
        for life in (2, 3):
            os.kill(peer.guard.pid, signal.SIGKILL)
            await until(lambda life=life: len(peer.seen.ends) == life - 1)
            if life == 2:
                await until(lambda: peer.client.connected)
        future = peer.infer()
        await peer.guard.stop(5.0)
        assert len(peer.seen.pids) == 2
        await peer.client.close()
        with pytest.raises(EngineClosedError):
            await future

    on_loop(what, options=GuardOptions(first_backoff_s=30.0))


@pytest.mark.parametrize("path", ["/broken", "/kills", "/fine"])
def test_an_end_is_told_once(on_loop, caplog, path):
    caplog.set_level(logging.INFO, "onecard")
    pids: list[int] = []

    async def what(peer):
        with contextlib.suppress(BundleError, EngineError):
            await peer.guard.start()
        if path == "/fine":  # it dies before it is told to end
            os.kill(peer.guard.pid, signal.SIGKILL)
            await until(lambda: peer.seen.ends)
        await peer.guard.stop(0.0)  # and once more when the test's server is closed
        pids.extend(peer.seen.pids)

    on_loop(what, {"m": path}, start=False, options=GuardOptions(first_backoff_s=30.0, end_s=1.0, lost_s=0.2))
    for pid in pids:
        assert caplog.text.count(f"the engine's process {pid} ended") == 1


def test_steady_load_over_several_deaths(on_loop):
    async def what(peer):
        answered = 0
        alive = True

        async def ask(number):
            nonlocal answered
            while alive:
                x = np.full((1, 4), number, np.float32)
                answer = await asyncio.wait_for(peer.client.infer("m", {"x": x}, {}, timeout_s=60.0), 60)
                assert (answer.outputs["y"] == number * 3 + 7).all()
                answered += 1

        tasks = [asyncio.ensure_future(ask(number)) for number in range(16)]
        for life in range(2, 5):
            before = answered
            await until(lambda before=before: answered > before + 200)
            os.kill(peer.guard.pid, signal.SIGKILL)
            await until(lambda life=life: len(peer.seen.recoveries) == life - 1)
        alive = False
        await asyncio.gather(*tasks)
        assert (peer.client.used_bytes, peer.client.sent, peer.client.waiting) == (0, 0, 0)

    on_loop(what)


def test_how_a_process_ended_in_words():
    assert describe_exit(0) == "exit status 0"
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV (signal 11)"
    assert describe_exit(-63) == "killed by signal 63"


def test_a_child_that_died_of_itself_was_not_killed_by_us(kind):
    async def whole():
        child = EngineChild([sys.executable, "-c", "import os; os.write(1, b'said'); raise SystemExit(5)"])
        assert await asyncio.wait_for(child.ended, 60) == "exit status 5"
        child.kill("too late")
        child.terminate()
        stopped = EngineChild(["sleep", "60"])
        os.kill(stopped.pid, signal.SIGSTOP)
        stopped.kill("it stands still")
        stopped.kill("twice")
        assert await asyncio.wait_for(stopped.ended, 40) == "killed, it stands still"

    run(kind, whole)


def test_what_the_engine_prints_goes_to_stderr():
    code = """
import asyncio
from onecard.server.engine_child import EngineChild

async def main():
    await EngineChild(["sh", "-c", "echo on stdout; echo on stderr >&2"]).ended

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, sorted(done.stderr.split("\n"))) == ("", ["", "on stderr", "on stdout"])


@pytest.fixture(autouse=True)
def _all_is_logged(caplog):
    caplog.set_level(logging.INFO, "onecard.server")


def test_what_killed_servers_left_is_removed_and_nothing_else(tmp_path):
    def folder(name: str, hours: float) -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "0.sock").touch()
        os.utime(made, (time.time() - hours * 3600,) * 2)
        return made

    left, young, other = folder("onecard-engine-a", 2), folder("onecard-engine-b", 0.5), folder("else", 2)
    used = tmp_path / "onecard-engine-c"
    used.mkdir()
    with contextlib.closing(packets.listen(used / "1.sock")):
        os.utime(used, (time.time() - 7200,) * 2)
        (tmp_path / "onecard-engine-link").symlink_to(other)
        sweep(tmp_path)
        assert not left.exists()
        assert young.exists() and other.exists() and used.exists()
