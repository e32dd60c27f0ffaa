"""How much memory of a device may be used: reading the limit, and making it real.

On a GPU the limit is held by PyTorch's allocator, so that an allocation beyond it fails as on a smaller card. The
CUDA context (a few hundred MiB for each process) and what other libraries take from the driver are outside of it.
A CPU process cannot be held to a limit from within; whoever starts it watches it.
"""

from __future__ import annotations

from onecard import host, nvml
from onecard.errors import UsageError
from onecard.units import parse_size

_LEAST_BYTES = 1 << 20
_GIB = float(1 << 30)


def parse_device_memory(text: str) -> int:
    """Bytes from ``8GiB`` or ``500MB``.

    Raises:
        UsageError: not a size, or under 1 MiB (most likely a number without its unit).
    """
    nbytes = parse_size(text)
    if nbytes < _LEAST_BYTES:
        raise UsageError(f"a device memory of {text.strip()} is less than 1 MiB.", "Write the unit: 8GiB.")
    return nbytes


def device_memory(device: str) -> int:
    """Bytes that a device has altogether; of a CPU those that this process may use. Starts no CUDA if it can.

    Args:
        device: ``cpu`` or ``cuda:N``, as :func:`onecard.environment.resolve_device` gives it.
    """
    if device == "cpu":
        return host.usable_memory()
    known = nvml.facts(int(device.rpartition(":")[2]))
    if known is not None:
        return known.memory_bytes
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def check_device_memory(nbytes: int, device: str) -> None:
    """Refuse a limit that the device cannot give.

    Raises:
        UsageError: it has less.
    """
    total = device_memory(device)
    if nbytes > total:
        raise UsageError(
            f"a device memory of {nbytes / _GIB:.2f} GiB is more than {device} has ({total / _GIB:.2f} GiB).",
            "Give less; to plan for another machine, only predict (--no-measure).",
        )


def limit_device_memory(device: str, nbytes: int) -> None:
    """Hold PyTorch's allocator to a limit in this process, from now on.

    On a CPU nothing is done, since nothing could be.

    Args:
        device: ``cpu`` or ``cuda:N``.
        nbytes: what the allocator may take from the driver. More than the card has is the whole card.

    Raises:
        UsageError: not a positive number.
    """
    if nbytes <= 0:
        raise UsageError(f"a device memory of {nbytes} bytes leaves nothing to use.", "Write for example 8GiB.")
    if device == "cpu":
        return
    import torch

    total = int(torch.cuda.get_device_properties(device).total_memory)
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
