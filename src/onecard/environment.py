"""What a variant was made and measured on: the card, the processor and the versions that matter."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform

import msgspec

from onecard import __version__, host, nvml
from onecard.errors import UsageError

PACKAGES = {
    "triton": ("triton", "pytorch-triton", "triton-windows"),
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "openvino": ("openvino",),
    "torch_tensorrt": ("torch-tensorrt",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "transformers": ("transformers",),
    "torchvision": ("torchvision",),
    "timm": ("timm",),
}
"""The packages whose versions matter, each with the distributions that may carry it."""

GPU_ONLY = frozenset({"cuda", "cudnn", "triton", "torch_tensorrt", "tensorrt", "onnxruntime-gpu"})
"""Versions that change nothing on a CPU."""


class Card(msgspec.Struct, frozen=True):
    """One GPU: name, compute capability as ``9.0``, memory in bytes, driver version."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


class Environment(msgspec.Struct, frozen=True):
    """The machine and the software; two equal environments give comparable figures.

    Args:
        device: ``cpu`` or ``cuda:0`` ...
        card: the GPU, or None on a CPU.
        cpu: the processor's model name.
        cpu_flags: the instruction sets that decide which kernels are used (avx2, avx512_vnni, amx_bf16 ...).
        cores: cores that this process may use (affinity and cgroup limit).
        threads: intra-op threads that were used.
        memory_bytes: main memory that this process may use.
        versions: package name to version, for those installed (python, torch, triton, onnxruntime ...).
    """

    device: str
    card: Card | None
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    versions: dict[str, str]


def detect(device: str) -> Environment:
    """Find out what this machine is, for a device.

    A GPU is asked through NVML, so that the asking process need not start CUDA; only where NVML cannot tell
    (no permission, a partition of a card, cards of several kinds) is torch asked, which starts it.

    Args:
        device: ``cpu`` or ``cuda:N``, as :func:`resolve_device` gives it.

    Raises:
        UsageError: there is no such card.
    """
    import torch

    return Environment(
        device=device,
        card=_card(device) if device.startswith("cuda") else None,
        cpu=host.cpu_model(),
        cpu_flags=host.cpu_flags(),
        cores=host.usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=host.usable_memory(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """The versions of what is installed here and matters; none of it is imported but torch."""
    import torch

    found = {"python": platform.python_version(), "onecard": __version__, "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        cudnn = _cudnn_version()
        if cudnn:
            found["cudnn"] = str(cudnn)
    for name, distributions in PACKAGES.items():
        version = next(filter(None, map(installed_version, distributions)), None)
        if version:
            found[name] = version
    return found


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve_device(text: str) -> str:
    """The concrete device that a user's word means: ``cpu`` or ``cuda:N``.

    Args:
        text: ``auto`` (the first GPU, or else the CPU), ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.

    Raises:
        UsageError: no such device; the message names those that exist.
    """
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = ["cpu", *(f"cuda:{index}" for index in range(cards))]
    wanted = text.strip().lower()
    if wanted == "auto":
        return devices[1] if cards else "cpu"
    if wanted == "cuda":
        wanted = "cuda:0"
    if wanted in devices:
        return wanted
    cure = "Pass 'auto' or one of these."
    if wanted.startswith("cuda") and not cards:
        built = "has no CUDA" if torch.version.cuda is None else "finds no usable GPU"
        cure = f"The installed torch {torch.__version__} {built}; 'onecard doctor' says why."
    raise UsageError(f"there is no device '{text}' here: the devices are {', '.join(devices)}.", cure)


def fingerprint(environment: Environment) -> str:
    """A digest of what changes speed or answers, for cache keys.

    Left out are the card's number and the sizes of memories (they decide whether a variant runs, not how),
    and, on a CPU, the versions that only a GPU uses.

    Returns:
        A SHA-256 in 64 hexadecimal digits.
    """
    gpu = environment.card is not None
    card = environment.card
    facts = {
        "device": environment.device.partition(":")[0],
        "card": [card.name, card.compute_capability, card.driver] if card else None,
        "cpu": [environment.cpu, sorted(environment.cpu_flags), environment.cores, environment.threads],
        "versions": {k: v for k, v in environment.versions.items() if gpu or k not in GPU_ONLY},
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


def differences(a: Environment, b: Environment) -> list[str]:
    """What differs between two environments, one line each for people: ``torch 2.11.0 → 2.13.0``.

    The number of the card does not count, nor memory that differs by less than 0.1 GiB.

    Args:
        a: the one that something was made on.
        b: the one that it is looked at from.

    Returns:
        No line at all if the two give comparable figures.
    """
    before, after = _readable(a), _readable(b)
    names = [*before, *(name for name in after if name not in before)]
    pairs = [(name, before.get(name, "absent"), after.get(name, "absent")) for name in names]
    return [f"{name} {old} → {new}" for name, old, new in pairs if old != new]


def _cudnn_version() -> int | None:
    """The version of the loaded cuDNN as one number, 91900 for 9.19.0.

    ``torch.backends.cudnn.version()`` asks every card for its capability and so starts CUDA; this does not.
    """
    try:
        from torch._C import _cudnn

        return int(_cudnn.getVersionInt())
    except (ImportError, AttributeError, RuntimeError):  # a torch without cuDNN
        return None


def _readable(environment: Environment) -> dict[str, str]:
    card = environment.card
    facts = {"device": environment.device.partition(":")[0]}
    if card:
        facts |= {
            "card": card.name,
            "compute capability": card.compute_capability,
            "card memory": _gib(card.memory_bytes),
            "driver": card.driver,
        }
    return {
        **facts,
        "processor": environment.cpu,
        "instruction sets": " ".join(sorted(environment.cpu_flags)) or "none known",
        "cores": str(environment.cores),
        "threads": str(environment.threads),
        "memory": _gib(environment.memory_bytes),
        **environment.versions,
    }


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _card(device: str) -> Card:
    import torch

    index = torch.device(device).index or 0
    known = nvml.facts(index)
    if known:
        return Card(*known)
    try:
        properties = torch.cuda.get_device_properties(index)
    except (AssertionError, RuntimeError, ValueError) as error:  # torch's ways to say that there is no such card
        raise UsageError(f"there is no device '{device}' here: {error}.") from error
    return Card(
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        driver=nvml.driver_version() or "unknown",
    )
