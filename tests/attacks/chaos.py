"""Harm done to a server under steady load: ``python -m tests.attacks.chaos kill_engine --times 10``.

Each action is one kind of harm. While it is done, and done again, tagged requests come in at a steady rate; printed is
what became of them, and for how long nothing was answered at each blow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.attacks.attacked import Attacked, attacked
from tests.attacks.loops import run
from tests.attacks.null_server import NullBundle, write_null
from tests.attacks.open_load import OpenLoad, Sample, outcomes, percentile
from tests.attacks.wire import HANG, KILL, WIDTH, AnswerReader, poisoned

MODEL = "tag"
_CALL_S = 300.0
_SHARED = Path("/dev/shm")
_IN_SMALL = "unshare -Urm sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec python -m tests.attacks.chaos ...'"
_REGION_BYTES = 4096
_PREFIX = f"onecard-chaos-{os.getpid()}"


@dataclass(frozen=True)
class Setting:
    """How an action is done.

    Args:
        times: how often.
        every_s: from one recovery to the next blow.
        rate_s: requests a second.
        recover_s: within which an answer must come again.
        delay_ms: how long a batch takes.
        shared_bytes: how much of ``/dev/shm`` is filled at most.
        hang_s: when the server takes an engine for one that hangs.
        gone_s: within which no process may be left.
    """

    times: int = 10
    every_s: float = 2.0
    rate_s: float = 200.0
    recover_s: float = 60.0
    delay_ms: float = 5.0
    shared_bytes: int = 1 << 30
    hang_s: float = 3.0
    gone_s: float = 5.0


@dataclass(frozen=True)
class Blow:
    """One harm that was done.

    Args:
        at_s: when, by ``time.monotonic``.
        said: what came of it: a status, a process number.
        recovery_s: the longest time without a right answer, from the last one before the blow to the first one to a
            request that was sent when it was over; None if there was none of these.
    """

    at_s: float
    said: str
    recovery_s: float | None


@dataclass(frozen=True)
class Damage:
    """What came of an action.

    Args:
        counts: of the outcomes of the requests.
        blows: in order.
        longest_gap_s: without any right answer, while requests were sent.
        p99_ms: of the answered.
        exit_code: of the server, after SIGTERM.
        left: processes of it that are still there then.
        log: the server's.
    """

    counts: dict[str, int]
    blows: tuple[Blow, ...]
    longest_gap_s: float
    p99_ms: float
    exit_code: int
    left: int
    log: str

    def __str__(self) -> str:
        recovery = [f"{b.recovery_s:.2f}" if b.recovery_s is not None else "never" for b in self.blows]
        return (
            f"{sum(self.counts.values())} requests: {self.counts}\n"
            f"recovery times in s: {', '.join(recovery)}\nlongest time without an answer: {self.longest_gap_s:.2f} s, "
            f"p99 {self.p99_ms:.0f} ms, exit code {self.exit_code}, {self.left} processes left\n"
            f"blows: {[b.said for b in self.blows]}"
        )


Action = Callable[[Attacked, Setting], str]


def kill_engine(server: Attacked, setting: Setting) -> str:
    """SIGKILL to the process that runs the models."""
    return _signal_engine(server, signal.SIGKILL)


def stop_engine(server: Attacked, setting: Setting) -> str:
    """SIGSTOP to it: it lives, and does nothing."""
    return _signal_engine(server, signal.SIGSTOP)


def crash_engine(server: Attacked, setting: Setting) -> str:
    """A request that kills whoever computes it. It alone may fail."""
    return f"status {_send_poison(server.port, KILL)}"


def hang_engine(server: Attacked, setting: Setting) -> str:
    """A request that never comes to an end."""
    return f"status {_send_poison(server.port, HANG)}"


def reload_model(server: Attacked, setting: Setting) -> str:
    """The same version again, by the repository's call."""
    return f"status {_load(server.port)}"


def load_broken(server: Attacked, setting: Setting) -> str:
    """A new version that cannot be opened; the old one must go on."""
    return _load_with_fault(server, "raise")


def load_killing(server: Attacked, setting: Setting) -> str:
    """A new version that kills the process that opens it."""
    return _load_with_fault(server, "kill")


def fill_shared_memory(server: Attacked, setting: Setting) -> str:
    """``/dev/shm`` is full, or as full as the limit allows, while a model is loaded."""
    with _filled(_SHARED, setting.shared_bytes) as (taken, full):
        status = _load(server.port)
        time.sleep(1.0)
    return f"{taken >> 20} MiB taken, {'all there was' if full else 'not all there was'}, load: status {status}"


def exhaust_shared_memory(server: Attacked, setting: Setting) -> str:
    """``/dev/shm`` is full to the last byte, while clients have tensors there, and a model is loaded."""
    if fault := _too_large(setting.shared_bytes):
        raise RuntimeError(fault)
    with _shared_object("in"), _shared_object("out"):
        before = {name: _register(server.port, name) for name in ("in", "out", "none")}
        with _filled(_SHARED, setting.shared_bytes) as (_, full):
            found = (
                f"in {_infer_in(server.port, 'in', None)}, out {_infer_in(server.port, None, 'out')}, "
                f"load: status {_load(server.port)}"
            )
        after = f"then in {_infer_in(server.port, 'in', None)}, out {_infer_in(server.port, None, 'out')}"
        for name in ("in", "out"):
            _post(server.port, f"/v2/systemsharedmemory/region/{name}/unregister", {})
    return f"registered {before}; {'full' if full else 'not full'}: {found}; {after}"


def _too_large(shared_bytes: int) -> str:
    """Why ``/dev/shm`` cannot be filled within a limit; empty if it can."""
    free = shutil.disk_usage(_SHARED).free
    return f"{_SHARED} has {free} bytes, too many to fill; in a small one: {_IN_SMALL}" if free > shared_bytes else ""


def terminate(server: Attacked, setting: Setting) -> str:
    """SIGTERM to the server: what came in is answered, and then it ends."""
    server.process.send_signal(signal.SIGTERM)
    return "told to end"


ACTIONS: dict[str, Action] = {
    action.__name__: action
    for action in (
        *(kill_engine, stop_engine, crash_engine, hang_engine, reload_model, load_broken, load_killing),
        *(fill_shared_memory, exhaust_shared_memory, terminate),
    )
}


def _signal_engine(server: Attacked, number: signal.Signals) -> str:
    engine = server.engine()
    if engine is None:
        return "no engine process"
    engine.send_signal(number)
    return f"{number.name} to {engine.pid}"


def _send_poison(port: int, poison: float) -> int:
    """The status of its answer; 0 if the connection ended instead."""
    reader = AnswerReader()
    with socket.create_connection(("127.0.0.1", port), timeout=_CALL_S) as peer:
        peer.sendall(poisoned(poison))
        while data := peer.recv(65536):
            if answers := reader.feed(data):
                return answers[0].status
    return 0


def _load(port: int) -> int:
    return _post(port, f"/v2/repository/models/{MODEL}/load", {})[0]


def _post(port: int, path: str, body: dict[str, object]) -> tuple[int, str]:
    """The status and the error, or what came instead."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_CALL_S)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body).encode())
        response = connection.getresponse()
        text = response.read().decode("utf-8", "replace")
        return response.status, text


@contextlib.contextmanager
def _shared_object(name: str) -> Iterator[None]:
    """A client's shared-memory object, of which no page is there yet."""
    path = _SHARED / f"{_PREFIX}-{name}"
    path.touch()
    os.truncate(path, _REGION_BYTES)
    try:
        yield
    finally:
        path.unlink()


def _register(port: int, name: str) -> int:
    body: dict[str, object] = {"key": f"/{_PREFIX}-{name}", "offset": 0, "byte_size": _REGION_BYTES}
    return _post(port, f"/v2/systemsharedmemory/region/{name}/register", body)[0]


def _infer_in(port: int, given: str | None, wanted: str | None) -> str:
    """The status of a request of one row with its input, or its output, in shared memory, and why it is that."""
    size = {"shared_memory_byte_size": 4 * WIDTH}
    tensor: dict[str, object] = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH]}
    if given is None:
        tensor["data"] = [1.0] * WIDTH
    else:
        tensor["parameters"] = {"shared_memory_region": given, **size}
    body: dict[str, object] = {"inputs": [tensor]}
    if wanted is not None:
        body["outputs"] = [{"name": "x_out", "parameters": {"shared_memory_region": wanted, **size}}]
    status, text = _post(port, f"/v2/models/{MODEL}/infer", body)
    return f"{status} ({os.strerror(errno.ENOSPC)})" if os.strerror(errno.ENOSPC) in text else str(status)


def _load_with_fault(server: Attacked, fault: str) -> str:
    folder = server.folders[MODEL]
    right = (folder / "null.json").read_bytes()
    write_null(folder, NullBundle(fault=fault))
    try:
        return f"status {_load(server.port)}"
    finally:
        (folder / "null.json").write_bytes(right)


@contextlib.contextmanager
def _filled(folder: Path, limit_bytes: int) -> Iterator[tuple[int, bool]]:
    """Take space in a file system: how much, and whether that was all."""
    path = folder / f"onecard-attack-{os.getpid()}"
    try:
        with path.open("wb") as file:
            taken = 0
            while (more := min(shutil.disk_usage(folder).free, limit_bytes - taken)) > 0:
                os.posix_fallocate(file.fileno(), taken, more)
                taken += more
            yield taken, shutil.disk_usage(folder).free == 0
    finally:
        path.unlink()


def harm(action: Action, setting: Setting, models: NullBundle | None = None) -> Damage:
    """Do an action to a server of its own, under load."""
    bundle = models or NullBundle(delay_ms=setting.delay_ms)
    words = ("--shared-memory-prefix", _PREFIX, "--hang-s", str(setting.hang_s))
    with attacked({MODEL: bundle}, *words) as server:
        load = OpenLoad(server.port, setting.rate_s, most=3000)
        processes = server.processes()
        blows = run(_strike_under_load(server, load, action, setting))
        processes += server.processes()
        code = server.process.poll()
        code = server.end() if code is None else code
        return Damage(
            outcomes(load.samples),
            tuple(blows),
            longest_gap_s(load.samples),
            percentile([s.latency_s * 1e3 for s in load.samples if s.outcome == "answered"], 0.99),
            code,
            len(psutil.wait_procs(processes, setting.gone_s)[1]),
            server.output,
        )


async def _strike_under_load(server: Attacked, load: OpenLoad, action: Action, setting: Setting) -> list[Blow]:
    blows: list[Blow] = []
    ended = asyncio.Event()

    async def strike() -> None:
        try:
            for _ in range(setting.times):
                await asyncio.sleep(setting.every_s)
                blows.append(await _strike(server, load, action, setting))
            if action is terminate:  # so that what comes then finds nobody
                await asyncio.to_thread(server.process.wait, setting.recover_s)
            await asyncio.sleep(setting.every_s)
        finally:
            ended.set()

    striking = asyncio.ensure_future(strike())
    while not ended.is_set():
        await load.run(0.2)
    await striking
    await load.settle(setting.recover_s)
    return blows


async def _strike(server: Attacked, load: OpenLoad, action: Action, setting: Setting) -> Blow:
    """One blow, and what it did to the answers."""
    at_s = time.monotonic()
    last_s = max((s.ended_s for s in load.samples if s.outcome == "answered"), default=at_s)
    said = await asyncio.to_thread(action, server, setting)
    over_s, sent = time.monotonic(), len(load.samples)
    while time.monotonic() < over_s + setting.recover_s:
        await asyncio.sleep(0.01)
        if any(s.outcome == "answered" for s in load.samples[sent:]):
            return Blow(at_s, said, longest_gap_s([s for s in load.samples if s.ended_s >= last_s]))
        if action is terminate and server.process.poll() is not None:
            break
    return Blow(at_s, said, None)


def longest_gap_s(samples: list[Sample]) -> float:
    """The longest time between two right answers."""
    ends = sorted(s.ended_s for s in samples if s.outcome == "answered")
    return max((b - a for a, b in itertools.pairwise(ends)), default=0.0)


def main() -> int:
    """Harm a server of its own, and print the counts."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("action", choices=[*ACTIONS, "all"])
    words.add_argument("--times", type=int, default=10)
    words.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    words.add_argument("--rate", type=float, default=200.0, help="requests a second")
    words.add_argument("--recover", type=float, default=60.0, metavar="SECONDS")
    words.add_argument("--shared-bytes", type=int, default=1 << 30)
    words.add_argument("--hang", type=float, default=3.0, metavar="SECONDS", help="when an engine counts as hanging")
    given = words.parse_args()
    bad = 0
    fault = _too_large(given.shared_bytes)
    if fault and given.action == exhaust_shared_memory.__name__:
        words.error(fault)
    for name in ACTIONS if given.action == "all" else [given.action]:
        if fault and name == exhaust_shared_memory.__name__:
            print(f"== {name}: left out, for {fault}")
            continue
        times = 1 if name == "terminate" else given.times
        setting = Setting(
            times, given.every, given.rate, given.recover, shared_bytes=given.shared_bytes, hang_s=given.hang
        )
        damage = harm(ACTIONS[name], setting)
        print(f"== {name}\n{damage}", flush=True)
        fine = {"answered", "unreachable"} if name == "terminate" else {"answered"}
        bad += damage.left + sum(count for outcome, count in damage.counts.items() if outcome not in fine)
    return 0 if bad == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
