"""A real ``onecard serve`` in a process of its own, for tests."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onecard.bundle.manifest import MANIFEST, encode_manifest, read_manifest
from onecard.environment import detect

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle-v1"
"""A bundle from another machine. Servers are given :func:`golden_of_here` in its place."""
_PORT = re.compile(r"listening on 127\.0\.0\.1 port (\d+)")


@functools.cache
def golden_of_here() -> Path:
    """A copy of the golden bundle that says that it was made here, with what is installed.

    A bundle from elsewhere is opened only after each engine was tried in a process of its own, for some seconds; that
    has tests of its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="onecard-golden-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    bundle = folder / GOLDEN.name
    shutil.copytree(GOLDEN, bundle)
    manifest = read_manifest(bundle)
    here = msgspec.structs.replace(manifest, environment=detect("cpu"))
    (bundle / MANIFEST).write_bytes(encode_manifest(here))
    return bundle


class Server:
    """A server that is being started; its output is collected all the time.

    Args:
        words: the command line behind ``onecard serve``.
        environment: variables beside those of this process.
    """

    def __init__(self, *words: str, environment: dict[str, str] | None = None) -> None:
        named = [word.replace(str(GOLDEN), str(golden_of_here())) for word in words]
        command = [sys.executable, "-W", "ignore", "-m", "onecard", "serve", *named]
        here = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=here, start_new_session=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self, limit_s: float = 150.0) -> int:
        """The port, once it is ready."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if (found := _PORT.search(self.output)) and "ready " in self.output:
                return int(found[1])
            assert self.process.poll() is None, f"the server ended:\n{self.output}"
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready within {limit_s} s:\n{self.output}")

    def end(self, number: int = signal.SIGTERM, limit_s: float = 120.0) -> int:
        """Tell it to end, and give its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(limit_s)
        self.reader.join(30)
        return code


@contextlib.contextmanager
def serving(*words: str, environment: dict[str, str] | None = None) -> Iterator[tuple[int, Server]]:
    """A server that is ready: its port, and itself. Nothing of it is left afterwards."""
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    server = Server(*words, *ports, environment=environment)
    try:
        yield server.wait_until_ready(), server
    finally:
        if server.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(30)
        server.reader.join(30)
