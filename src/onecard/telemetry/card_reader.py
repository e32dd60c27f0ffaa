"""Which reader a device has: NVIDIA's through NVML, or the processor's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from onecard import nvml
from onecard.errors import UsageError
from onecard.host import ROOT
from onecard.telemetry.card_nvidia import AbsentCard, NvidiaReader
from onecard.telemetry.card_sample import CardSample
from onecard.telemetry.cpu_processes import ProcessTree
from onecard.telemetry.cpu_reader import CpuReader

_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")


class Reader(Protocol):
    """Reads a card's sensors."""

    def read(self) -> CardSample:
        """The state at this moment. It may take some 50 ms and is for one thread at a time."""
        ...

    def close(self) -> None:
        """Let go of what it holds of the driver."""
        ...


def read_card(
    device: str, *, uuid: str | None = None, tree: ProcessTree | None = None, root: Path = ROOT
) -> NvidiaReader | AbsentCard | CpuReader:
    """The reader of a device's sensors. It starts no CUDA; starting NVML may take a second where no other program has.

    Args:
        device: ``cpu`` or ``cuda:N`` as CUDA counts, among the cards that ``CUDA_VISIBLE_DEVICES`` names.
        uuid: of the card or partition as torch tells it, where CUDA runs in this process anyway. Without it, on a
            machine with cards of several kinds, CUDA's order is not known, and no sensor is read.
        tree: our processes; this one and its children if None.
        root: where ``proc`` and ``sys`` are.

    Raises:
        UsageError: the device is neither.
    """
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise UsageError(f"there are no sensors of the device {device!r}.", "Name 'cpu' or 'cuda:N'.")
    tree = tree or ProcessTree()
    if device == "cpu":
        return CpuReader(tree, root)
    lib, index = nvml.library(), int(found[1] or 0)
    if lib is None:
        return AbsentCard(device, "there is no NVIDIA driver")
    card = nvml.handle_by_uuid(uuid) if uuid else nvml.handle_by_order(index)
    if card is None:
        return AbsentCard(device, None if nvml.count() else "the NVIDIA driver sees no card")
    partition = nvml.partition_by_uuid(uuid) if uuid else nvml.partition_by_order(index)
    return NvidiaReader(lib, card, partition, tree.pids)
