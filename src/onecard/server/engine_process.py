"""The process that owns the device: it hosts all models and answers every front that connects.

It is started and watched by the server's main process: ``python -m onecard.server.engine_process --socket PATH``. When
the device is lost it ends at once, without an answer: what was in flight is asked of the next process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from onecard.errors import OnecardError
from onecard.ipc import packets
from onecard.server.cuda_regions import OpenMemory
from onecard.server.engine_child import die_with_parent
from onecard.server.engine_fronts import Front
from onecard.server.engine_gate import Gate
from onecard.server.engine_models import EngineModels, OpenModel, open_bundle
from onecard.server.logs import FORMS, LEVELS, setup_logs

EXIT_LOST = 70
"""Exit status of a process whose device can do nothing more for it."""

LONELY_S = 10.0
"""A process that no front is connected to for so long ends: who started it was killed."""

DRAIN_S = 30.0
"""For what waits, when the process is told to end by a signal."""

_TICK_S = 0.1
_DRAIN_TICK_S = 0.005
_RELEASE_S = 10.0  # for a model that does not come back, and for the last messages
_LOGGER = logging.getLogger("onecard.server.engine_process")  # run as a program, the module has another name


def run_engine(
    path: Path,
    open_model: OpenModel = open_bundle,
    lonely_s: float = LONELY_S,
    open_memory: OpenMemory | None = None,
) -> None:
    """Answer fronts until one of them, or SIGTERM, says that it is enough, or none is left.

    Args:
        path: of the socket to listen on; it is removed at the end.
        open_model: opens a model.
        lonely_s: see :data:`LONELY_S`.
        open_memory: opens memory of the device that clients share; None for CUDA's.

    Raises:
        UsageError: the path is too long or taken, or this is not Linux.
        StorageError: the socket cannot be made.
    """
    EngineProcess(path, open_model, lonely_s, open_memory).run()


class EngineProcess:
    """Accepts fronts, and ends in good order.

    Args:
        path: of the socket.
        open_model: opens a model.
        lonely_s: see :data:`LONELY_S`.
        open_memory: opens memory of the device that clients share; None for CUDA's.
    """

    def __init__(
        self, path: Path, open_model: OpenModel, lonely_s: float, open_memory: OpenMemory | None = None
    ) -> None:
        self._path = path
        self._lonely_s = lonely_s
        self._open_memory = open_memory
        self._gate = Gate()
        self._models = EngineModels(open_model, _give_up)
        self._fronts: set[Front] = set()
        self._fronts_lock = threading.Lock()
        self._quit_by: float | None = None

    def run(self) -> None:
        """Live."""
        with contextlib.closing(packets.listen(self._path)) as listener:
            listener.setblocking(False)
            with _signals(lambda: self._quit(DRAIN_S)):
                self._accept(listener)
        self._gate.close()
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._drain()

    def _accept(self, listener: socket.socket) -> None:
        seen = time.monotonic()
        while self._quit_by is None:
            readable, _, _ = select.select([listener], [], [], _TICK_S)
            now = time.monotonic()
            if readable:
                self._welcome(listener)
            if self._fronts:
                seen = now
            elif now - seen > self._lonely_s:
                _LOGGER.warning("no front has been connected for %g s: the engine ends", self._lonely_s)
                self._quit(0.0)
            self._gate.expire(now)

    def _welcome(self, listener: socket.socket) -> None:
        try:
            sock = packets.accept(listener)
        except OSError as error:  # it went at once, or there are no more descriptors
            _LOGGER.warning("a front could not be accepted: %s", error)
            time.sleep(_TICK_S)
            return
        if not packets.same_user(sock):
            _LOGGER.error("another user's process was refused")
            sock.close()
            return
        front = Front(sock, self._models, self._gate, self._quit, self._gone, self._open_memory)
        with self._fronts_lock:
            self._fronts.add(front)
        front.start()

    def _gone(self, front: Front) -> None:
        with self._fronts_lock:
            self._fronts.discard(front)

    def _quit(self, drain_s: float) -> None:
        self._quit_by = time.monotonic() + max(0.0, drain_s)

    def _drain(self) -> None:
        """Answer what was asked, as far as there is time, and let go of everything."""
        while time.monotonic() < (self._quit_by or 0.0) and not self._is_idle():
            time.sleep(_DRAIN_TICK_S)
            self._gate.expire(time.monotonic())
        closing = threading.Thread(target=self._models.close, args=(0.0,), name="onecard-close", daemon=True)
        closing.start()
        closing.join(_RELEASE_S)
        if closing.is_alive():
            _LOGGER.error("a model does not come back: the engine ends without it")
        self._flush()

    def _flush(self) -> None:
        with self._fronts_lock:
            fronts = list(self._fronts)
        end = time.monotonic() + _RELEASE_S
        while time.monotonic() < end and not all(front.outbox.is_empty for front in fronts):
            time.sleep(_DRAIN_TICK_S)
        for front in fronts:
            front.close()

    def _is_idle(self) -> bool:
        with self._fronts_lock:
            fronts = list(self._fronts)
        return all(front.is_idle for front in fronts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the process by its command line; does not return."""
    parser = argparse.ArgumentParser(prog="onecard.server.engine_process", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", type=Path, required=True, help="where to listen")
    parser.add_argument("--log-format", default="human", choices=FORMS)
    parser.add_argument("--log-level", default="info", choices=LEVELS)
    parser.add_argument("--die-with-parent", action="store_true", help="be killed when the starting thread ends")
    options = parser.parse_args(arguments)
    setup_logs(options.log_format, options.log_level, process="engine")
    if options.die_with_parent:
        die_with_parent()
    status = 0
    try:
        run_engine(options.socket)
    except OnecardError as error:
        _LOGGER.critical("%s", error)
        status = error.exit_code
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)  # threads that are within native libraries make an orderly end of the interpreter crash


@contextlib.contextmanager
def _signals(quit_soon: Callable[[], None]) -> Iterator[None]:
    """SIGTERM ends the process; SIGINT does not: a terminal sends it to all, and the front decides what it means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def told(number: int, frame: FrameType | None) -> None:
        quit_soon()

    before = signal.signal(signal.SIGTERM, told), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def _give_up(reason: str) -> None:
    """End at once: only a new process has a device that works."""
    _LOGGER.critical("%s: this process ends, to be started again", reason)
    os._exit(EXIT_LOST)


if __name__ == "__main__":
    main()
