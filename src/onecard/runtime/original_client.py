"""A bundle's original in a process of its own, as whoever asks it has it: started when first asked, ended at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from onecard.errors import BundleError, EngineClosedError, EngineError
from onecard.runtime.original import Comparison, pack_question
from onecard.runtime.slots import Array

_ANSWER_S = 6 * 3600.0  # beside busy engines it gets next to no processor time; what takes longer hangs
_DEATHS = 3
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class OriginalClient:
    """Asks the original, from one thread.

    Args:
        folder: of the bundle.
        digest: of its manifest, as it was when it was opened to serve.
        device: where the original is to run: ``cpu`` or ``cuda:N``.
    """

    def __init__(self, folder: Path, digest: str, device: str) -> None:
        self._arguments = (str(folder), digest, device)
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Connection | None = None
        self._deaths = 0
        self._closed = False
        self._lock = threading.Lock()  # a process is not started behind the back of close()

    def compare(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], variants: Sequence[str]) -> Comparison:
        """See :meth:`onecard.runtime.original.Original.compare`; ``busy_s`` includes loading it.

        Raises:
            BundleError: it cannot be loaded, or its process died several times in a row: it is of no use to ask again.
            EngineClosedError: this was closed meanwhile.
            EngineError: the original has no answer to this request.
        """
        question = pack_question(inputs, outputs, variants)
        loaded = Comparison() if self._link is not None else self._start()
        told = self._exchange(question)
        self._deaths = 0
        if told.failure:
            raise EngineError(f"the original has no answer to this request: {told.failure}.")
        return msgspec.structs.replace(told, busy_s=told.busy_s + loaded.busy_s)

    def close(self) -> None:
        """End the process, whatever it is at; for any thread."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def release(self) -> None:
        """Wait for the end of a process that was killed; on the thread that asks."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._link is not None:
            self._link.close()
        self._process = self._link = None

    def _start(self) -> Comparison:
        ours, theirs = multiprocessing.Pipe()
        with contextlib.closing(theirs), self._lock:
            if self._closed:
                ours.close()
                raise EngineClosedError("the original is not asked any more.")
            number = theirs.fileno()
            command = [sys.executable, "-W", "ignore", "-m", "onecard.runtime.original_process", str(number)]
            self._link = ours
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(number,),
                env={**os.environ, **_ONE_THREAD},
            )
        told = self._exchange(None)
        if told.failure:
            self.release()
            raise BundleError(told.failure)
        return told

    def _exchange(self, question: bytes | None) -> Comparison:
        """Send a question, if there is one, and wait for what is told."""
        link = self._link
        if link is None:
            raise EngineClosedError("the original is not asked any more.")
        try:
            if question is not None:
                link.send_bytes(question)
            if not link.poll(_ANSWER_S):
                raise TimeoutError(f"it said nothing for {_ANSWER_S:.0f} s")
            return msgspec.msgpack.decode(link.recv_bytes(), type=Comparison)
        except (EOFError, OSError) as error:
            raise self._died(error) from error

    def _died(self, error: Exception) -> BundleError | EngineError:
        process = self._process
        self.release()
        if self._closed:
            return EngineClosedError("the original is not asked any more.")
        self._deaths += 1
        how = str(error) if isinstance(error, TimeoutError) else f"it ended with {process.returncode if process else 0}"
        if self._deaths < _DEATHS:
            return EngineError(f"the original's process gave no answer: {how}.")
        return BundleError(f"the original's process gave no answer {_DEATHS} times in a row: {how}.")
