"""The server under attack, in a process of its own: its port, what it holds, and its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from tests.attacks.null_server import NullBundle, write_null

_PORT = re.compile(r"listening on 127\.0\.0\.1 port (\d+)")
_GRPC_PORT = re.compile(r"gRPC on port (\d+)")
_Value = TypeVar("_Value")


class Attacked:
    """A server that is being started.

    Args:
        folder: for the models' folders and the log.
        models: by name.
        words: further words of :mod:`tests.attacks.null_server`.

    Attributes:
        port: for HTTP.
        grpc_port: for gRPC; 0 without it.
    """

    def __init__(self, folder: Path, models: dict[str, NullBundle], words: tuple[str, ...]) -> None:
        self.folders = {name: write_null(folder / name, bundle) for name, bundle in models.items()}
        named = [f"{name}={path}" for name, path in self.folders.items()]
        command = [sys.executable, "-W", "ignore", "-m", "tests.attacks.null_server", *named, *words]
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
        self.port = self.grpc_port = 0

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self, limit_s: float = 150.0) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or takes too long.
        """
        end = time.monotonic() + limit_s
        while time.monotonic() < end and self.process.poll() is None:
            found = _PORT.search(self.output)
            if found and "\nready" in self.output:
                self.port = int(found[1])
                grpc = _GRPC_PORT.search(self.output)
                self.grpc_port = int(grpc[1]) if grpc else 0
                return
            time.sleep(0.05)
        raise RuntimeError(f"the server ended, or was not ready within {limit_s} s:\n{self.output}")

    def processes(self) -> list[psutil.Process]:
        """The server, and those that it has started."""
        if self.process.poll() is not None:
            return []
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def engine(self) -> psutil.Process | None:
        """The process that runs the models; None while there is none, or where the server itself runs them."""
        for process in self.processes()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "--socket" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def resident_bytes(self) -> int:
        """Of all its processes."""
        return self._sum(lambda process: process.memory_info().rss)

    def descriptors(self) -> int:
        """Open files and sockets of all its processes."""
        return self._sum(lambda process: process.num_fds())

    def _sum(self, of: Callable[[psutil.Process], int]) -> int:
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += of(process)
        return total

    def end(self, limit_s: float = 60.0) -> int:
        """Send SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)

    def kill(self) -> None:
        """Leave nothing of it."""
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)
        psutil.wait_procs(left[1:], 60)


@contextlib.contextmanager
def attacked(models: dict[str, NullBundle], *words: str) -> Iterator[Attacked]:
    """A server that is ready; its process lives in the ``with`` block only."""
    with tempfile.TemporaryDirectory(prefix="onecard-attack-") as folder:
        server = Attacked(Path(folder), models, words)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.kill()


def settled(read: Callable[[], _Value], enough: Callable[[_Value], bool], limit_s: float) -> _Value:
    """Read a figure until it is as wanted or the time is over; the last one read."""
    end = time.monotonic() + limit_s
    while not enough(value := read()) and time.monotonic() < end:
        time.sleep(0.1)
    return value
