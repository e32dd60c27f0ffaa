"""Peak memory of this process: what the device's allocator and the operating system saw."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_NO_GRAPH = (0, 0)  # the pool of everything else


class MemoryWatch:
    """Start before a variant is loaded, tell it when that is done, read the peaks after the variant ran.

    Memory that an engine takes from the driver behind PyTorch's back is seen in the driver's free memory and
    added to the allocator's peak. So is what a CUDA graph keeps for its intermediate tensors: a replay uses it,
    but the allocator counts it as free from the end of the capture on.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._outside_before = self._allocated = self._reserved = 0
        if device != "cpu":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._outside_before = self._outside()

    def loaded(self) -> None:
        """Note the peaks of loading, graphs being captured included, and begin with those of running."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
            self._allocated = int(torch.cuda.max_memory_allocated(self.device))
            self._reserved = int(torch.cuda.max_memory_reserved(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_device_bytes(self) -> int:
        """The most device memory that was in use at once, without the CUDA context; 0 on a CPU."""
        return self.peak_allocated_bytes() + self.outside_bytes()

    def peak_allocated_bytes(self) -> int:
        """The most that PyTorch's allocator held for tensors, or keeps for graphs that it captured; 0 on a CPU."""
        if self.device == "cpu":
            return 0
        torch.cuda.synchronize(self.device)
        running = int(torch.cuda.max_memory_allocated(self.device)) + _idle_graph_bytes(self.device)
        return max(self._allocated, running)

    def peak_reserved_bytes(self) -> int:
        """The most that PyTorch's allocator had taken from the driver; 0 on a CPU."""
        return 0 if self.device == "cpu" else max(self._reserved, int(torch.cuda.max_memory_reserved(self.device)))

    def outside_bytes(self) -> int:
        """What others than PyTorch's allocator took from the driver since the start; 0 on a CPU."""
        return 0 if self.device == "cpu" else max(0, self._outside() - self._outside_before)

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


def _idle_graph_bytes(device: str) -> int:
    """What the memory pools of CUDA graphs hold beside the tensors that are alive in them."""
    index = torch.device(device).index or 0
    segments = [s for s in torch.cuda.memory_snapshot() if s["device"] == index and s["segment_pool_id"] != _NO_GRAPH]  # type: ignore[no-untyped-call]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)
