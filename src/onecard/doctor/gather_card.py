"""Finding out the facts of NVIDIA's driver and its cards, through NVML and the kernel's own files.

CUDA is not started, but where only CUDA knows which card ``cuda:N`` is: cards of several kinds, ordered by speed.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from onecard import host, nvml
from onecard.doctor.facts import Card, Driver
from onecard.measure.card import read_gpu

_NVIDIA = "0x10de"
_DISPLAY = "0x03"  # PCI class: VGA (0x0300) and 3D controllers (0x0302)
_MODULE = re.compile(r"Module\s+(?:for \S+\s+)?(\d+\.\d+(?:\.\d+)?)")
_UNCORRECTED, _SINCE_START = 1, 0  # NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC


def read_driver(device: str, usable: bool, root: Path = host.ROOT) -> Driver:
    """What the driver says.

    Args:
        device: the card that is meant, ``cuda:N``, or ``cpu``.
        usable: whether torch can use a card, so that it may be asked which one it is.
        root: of the file system with /proc and /sys.
    """
    lib = nvml.library()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if lib is None:
        return Driver(None, module_version(root), start_error(), cards_on_bus(root), (), visible)
    return Driver(
        version=nvml.driver_version(),
        module=module_version(root),
        on_bus=cards_on_bus(root),
        cards=read_cards(lib),
        visible=visible,
        chosen=_chosen(lib, device, usable),
    )


def start_error() -> int | None:
    """The number of the error that NVML starts with, or None if it starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from an old distribution named pynvml
        import pynvml
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return int(error.value)
    return None


def module_version(root: Path) -> str | None:
    """The version of the loaded kernel module, or None if there is none."""
    try:
        found = _MODULE.search((root / "proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def cards_on_bus(root: Path) -> int:
    """NVIDIA display controllers on the PCI bus; a container sees those of its host too."""
    found = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        found += vendor == _NVIDIA and kind.startswith(_DISPLAY)
    return found


def read_cards(lib: Any) -> tuple[Card, ...]:
    """Every card that the driver shows.

    Args:
        lib: the started pynvml module.
    """
    handles = [_ask(lib, "nvmlDeviceGetHandleByIndex", index) for index in range(_ask(lib, "nvmlDeviceGetCount") or 0)]
    return tuple(_card(lib, index, handle) for index, handle in enumerate(handles) if handle is not None)


def _card(lib: Any, index: int, handle: nvml.Handle) -> Card:
    capability = _ask(lib, "nvmlDeviceGetCudaComputeCapability", handle)
    memory = _ask(lib, "nvmlDeviceGetMemoryInfo", handle)
    mig = _ask(lib, "nvmlDeviceGetMigMode", handle)
    persistence = _ask(lib, "nvmlDeviceGetPersistenceMode", handle)
    ecc = _ask(lib, "nvmlDeviceGetEccMode", handle)
    _, _, pending, failed = _ask(lib, "nvmlDeviceGetRemappedRows", handle) or (0, 0, 0, 0)
    return Card(
        index=index,
        name=_word(_ask(lib, "nvmlDeviceGetName", handle)) or "unknown",
        uuid=_word(_ask(lib, "nvmlDeviceGetUUID", handle)),
        compute_capability="{}.{}".format(*capability) if capability else "",
        memory_bytes=int(memory.total) if memory else 0,
        mig=bool(mig[0]) if mig else None,
        partitions=_partitions(lib, handle) if mig and mig[0] else (),
        persistence=None if persistence is None else bool(persistence),
        compute_mode=int(_ask(lib, "nvmlDeviceGetComputeMode", handle) or 0),
        ecc=bool(ecc[0]) if ecc else None,
        uncorrected=_ask(lib, "nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _SINCE_START),
        remap_failed=bool(failed),
        remap_pending=bool(pending),
        power_limit_w=_watts(_ask(lib, "nvmlDeviceGetEnforcedPowerLimit", handle)),
        power_default_w=_watts(_ask(lib, "nvmlDeviceGetPowerManagementDefaultLimit", handle)),
        clock_limit_mhz=_ask(lib, "nvmlDeviceGetApplicationsClock", handle, lib.NVML_CLOCK_SM),
        clock_default_mhz=_ask(lib, "nvmlDeviceGetDefaultApplicationsClock", handle, lib.NVML_CLOCK_SM),
        state=read_gpu(lib, handle),
    )


def _partitions(lib: Any, handle: nvml.Handle) -> tuple[str, ...]:
    most = _ask(lib, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    parts = [_ask(lib, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(most)]
    return tuple(_word(_ask(lib, "nvmlDeviceGetUUID", part)) for part in parts if part is not None)


def _chosen(lib: Any, device: str, usable: bool) -> int | None:
    """Which of the driver's cards ``cuda:N`` is."""
    number = device.partition(":")[2]
    if not device.startswith("cuda") or not (number.isdigit() or not number):
        return None
    index = int(number or 0)
    handle = nvml.handle_by_order(index)
    if handle is None and usable:
        import torch

        uuid = str(torch.cuda.get_device_properties(index).uuid)
        handle = nvml.handle_by_uuid(uuid)
    return None if handle is None else _ask(lib, "nvmlDeviceGetIndex", handle)


def _ask(lib: Any, function: str, *arguments: Any) -> Any | None:
    return nvml.ask(getattr(lib, function), *arguments)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _word(value: Any) -> str:
    """NVML's strings, which old bindings give as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value or "")
