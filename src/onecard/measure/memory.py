"""Peak memory of this process: what the device's allocator and the operating system saw."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


class MemoryWatch:
    """Start before a variant is loaded; read the peaks after it ran.

    Memory that an engine takes from the driver behind PyTorch's back is seen in the driver's free memory and
    added to the allocator's peak.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._outside_before = 0
        if device != "cpu":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._outside_before = self._outside()

    def peak_device_bytes(self) -> int:
        """The most device memory that was in use at once, without the CUDA context; 0 on a CPU."""
        if self.device == "cpu":
            return 0
        torch.cuda.synchronize(self.device)
        outside = max(0, self._outside() - self._outside_before)
        return int(torch.cuda.max_memory_allocated(self.device)) + outside

    def peak_process_bytes(self) -> int:
        """The highest resident set of this process since its program started."""
        with contextlib.suppress(OSError, StopIteration):  # getrusage keeps the peak of the process that forked it
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)

    def _outside(self) -> int:
        """Used device memory that is not PyTorch's: contexts, libraries, other engines and processes."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free - torch.cuda.memory_reserved(self.device))
