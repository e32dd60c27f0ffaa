"""Descriptors: the server may open as many as its connections need, and outlasts a time without any."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecard.errors import EngineError, StorageError
from onecard.server.open_files import lacks_files
from tests.unit.server.test_engine_guard import QUICK, guarded, run, until

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[3]
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
"""
ALLOW = """
import logging, sys
from onecard.server.open_files import allow_open_files
logging.basicConfig(format="%(message)s")
allow_open_files(700)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
SERVE = """
import logging, sys
from pathlib import Path
from onecard.ipc.models import ModelOptions
from onecard.server.engine_client import ClientOptions
from onecard.server.grpc_limits import GrpcListen
from onecard.server.http_server import Listen
from onecard.server.http_types import HttpLimits
from onecard.server.repository import Source
from onecard.server.serve import ServeOptions, run_server

class Say:
    def listening(self, server): print("port", server.port, flush=True)
    def listening_grpc(self, port): pass
    def listening_metrics(self, port): pass
    def ready(self, serving): print("ready", flush=True)

logging.basicConfig(level="INFO", format="%(message)s")
engine = [sys.executable, "-m", "tests.unit.server.scripted_engine", "--journal", sys.argv[1]]
run_server(
    ServeOptions(
        {{"m": Source(Path("/fine"), ModelOptions())}}, Listen(port=0), HttpLimits(max_connections=400), engine=engine,
        client=ClientOptions(1 << 20, 1 << 20), grpc=GrpcListen(port=0) if {grpc} else None, drain_s=5.0,
    ),
    Say(),
)
"""


@pytest.mark.parametrize(
    ("limits", "left", "said"),
    [
        ((256, 5000), "700 5000", ""),
        ((800, 5000), "800 5000", ""),
        ((256, 600), "600 600", "--max-connections needs up to 700 open files in each process, but 600 are allowed"),
    ],
)
def test_the_limit_is_raised_as_far_as_it_goes(limits, left, said):
    code = LIMITED.format(soft=limits[0], hard=limits[1]) + ALLOW
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == left
    assert done.stderr.startswith(said) and bool(done.stderr) == bool(said)


@pytest.mark.parametrize("grpc", [False, True])
def test_a_server_may_open_what_its_connections_need_and_says_that_it_drains(tmp_path, grpc):
    if grpc:
        pytest.importorskip("grpc", reason="grpcio is not installed")
    code = LIMITED.format(soft=300, hard=4096) + SERVE.format(grpc=grpc)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "journal")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            port = int(next(lines).split()[1])
            assert next(lines) == "ready\n"
            found = re.search(r"Max open files +(\d+) +4096", Path(f"/proc/{process.pid}/limits").read_text())
            assert found is not None and int(found[1]) >= (2 if grpc else 1) * 400 + 64 + 256
            with socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
                # Once that is answered, nothing of the start is left to be done.
                peer.sendall(b"GET /v2/onecard/state HTTP/1.1\r\nHost: test\r\n\r\n")
                assert peer.recv(100).startswith(b"HTTP/1.1 200")
                process.send_signal(signal.SIGTERM)
                _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert re.search(r"^draining: [1-9]\d* connections$", log, re.MULTILINE), log


@contextlib.contextmanager
def no_more_files() -> Iterator[contextlib.ExitStack]:
    """This process can open no file until what is given is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as taken:
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        yield taken


def test_a_server_that_starts_without_descriptors_waits_for_them(tmp_path, caplog):
    async def what() -> None:
        async with guarded(tmp_path, {"m": "/fine"}) as peer:
            with no_more_files() as taken:
                starting = asyncio.create_task(peer.guard.start())
                await until(lambda: "Too many open files" in caplog.text)
                assert not starting.done()
                taken.close()
                await asyncio.wait_for(starting, 60)
            assert await peer.answered() is not None

    run("asyncio", what)


def test_an_engine_that_cannot_be_reached_for_want_of_descriptors_has_a_successor(tmp_path):
    async def what() -> None:
        options = dataclasses.replace(QUICK, lost_s=0.2)  # it lives, and has to be killed
        async with guarded(tmp_path, {"m": "/fine"}, options) as peer, contextlib.AsyncExitStack() as short:
            started, ended = peer.seen.started, peer.seen.ended

            def take_all(pid: int) -> None:
                started(pid)
                if len(peer.seen.pids) == 1:
                    short.taken = short.enter_context(no_more_files())

            def give_back(how: str) -> None:
                short.taken.close()
                ended(how)

            peer.seen.started, peer.seen.ended = take_all, give_back
            await asyncio.wait_for(peer.guard.start(), 60)
            assert len(peer.seen.pids) == 2
            assert "Too many open files" in peer.seen.ends[0]
            assert await peer.answered() is not None

    run("asyncio", what)


def test_what_is_a_want_of_descriptors():
    short = OSError(errno.EMFILE, "Too many open files")
    assert lacks_files(short) and lacks_files(OSError(errno.ENFILE, ""))
    failed = EngineError("no connection")
    failed.__cause__ = FileNotFoundError(errno.ENOENT, "")
    assert not lacks_files(failed)
    failed.__cause__ = StorageError("no segment")
    failed.__cause__.__cause__ = short
    assert lacks_files(failed)
