"""``python -m onecard.runtime.original_process FD FOLDER DIGEST DEVICE``: a bundle's original, asked over a socket.

A process of its own, since fp32 on a card and the number of threads are switches of a whole process; and since this one
may be of the lowest priority: a thread that holds Python's lock and is given no time would hold up all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from onecard.runtime.original import Comparison

_PR_SET_PDEATHSIG = 1  # prctl(2)
_NICEST = 19
_FIRST_TO_GO = "1000"  # proc(5), oom_score_adj


def main() -> None:
    """Tell whether the original could be loaded, then answer questions until nobody is left to ask."""
    asked = Connection(int(sys.argv[1]))
    folder, digest, device = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    _step_back()
    with contextlib.suppress(EOFError, OSError):  # whoever asked is gone
        _answer(asked, folder, digest, device)


def _answer(asked: Connection, folder: Path, digest: str, device: str) -> None:
    import torch

    from onecard.models.wording import first_line
    from onecard.runtime.original import Comparison, Original, unpack_question

    torch.set_num_threads(1)
    try:
        _leave_room(device)
        original = Original(folder, digest, device)
    except Exception as error:  # of any kind: it is somebody's code
        _tell(asked, Comparison(failure=str(error) or type(error).__name__))
        return
    _tell(asked, Comparison(busy_s=_processor_s()))
    while True:
        inputs, outputs, variants = unpack_question(asked.recv_bytes())
        try:
            told = original.compare(inputs, outputs, variants)
        except Exception as error:
            told = Comparison(failure=first_line(error))
        _tell(asked, told)
        del inputs, outputs
        if device != "cpu":
            torch.cuda.empty_cache()


def _tell(asked: Connection, told: Comparison) -> None:
    asked.send_bytes(msgspec.msgpack.encode(told))


def _step_back() -> None:
    """Run when nothing else wants to; be the first to go where memory is short; end with whoever asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; who asks decides what it means
    if sys.platform != "linux":
        os.nice(_NICEST)
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)


def _leave_room(device: str) -> None:
    """Take at most half of the memory that is free on a card now: the models that serve may yet want the rest."""
    if device == "cpu":
        return
    import torch

    from onecard.device_memory import limit_device_memory

    free_bytes, _ = torch.cuda.mem_get_info(device)
    limit_device_memory(device, free_bytes // 2)


def _processor_s() -> float:
    used = os.times()
    return used.user + used.system


if __name__ == "__main__":
    main()
