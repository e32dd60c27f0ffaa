"""What is wrong with this machine before anything is run on it: facts in, findings with their cures out.

Each ``check_`` function gets its facts as arguments; :func:`diagnose` gathers them from this machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from onecard import environment, host, nvml
from onecard.errors import UsageError
from onecard.evidence import CardState
from onecard.measure import card

Level = Literal["ok", "note", "warning", "error"]

PYTHON_MINIMUM = (3, 10)
TORCH_MINIMUM = (2, 11)
SHARED_MEMORY_MINIMUM = 256 * 2**20
DISK_MINIMUM = 2 * 2**30
DISK_COMFORTABLE = 10 * 2**30
EXTRAS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("torch_tensorrt",),
    "vision": ("torchvision", "timm"),
    "hf": ("transformers",),
}
"""Extras of onecard, each with the packages (of :data:`onecard.environment.PACKAGES`) that may stand for it."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at: ``what`` was found, and the ``cure`` if it is not well."""

    area: str
    level: Level
    what: str
    cure: str = ""


class DriverNeed(msgspec.Struct, frozen=True):
    """The oldest Linux driver that starts a CUDA release at all, and the oldest that does all of it."""

    minimum: str
    full: str


class Compatibility(msgspec.Struct, frozen=True):
    """The table in ``data/compatibility.json``, with the addresses of the pages it is taken from."""

    source: str
    minor_version_source: str
    linux_drivers: dict[str, DriverNeed]


@cache
def compatibility() -> Compatibility:
    """The drivers that CUDA releases need."""
    return msgspec.json.decode((files("onecard") / "data/compatibility.json").read_bytes(), type=Compatibility)


def diagnose(device: str = "auto") -> list[Finding]:
    """Look at this machine with the eyes of a search that is about to start.

    Args:
        device: as :func:`onecard.environment.resolve_device` takes it. A card that is not there is a finding.

    Returns:
        The findings, in the order in which a fault would spoil the next.
    """
    import torch

    try:
        concrete, findings = environment.resolve_device(device), []
    except UsageError as error:
        concrete, findings = device, [Finding("device", "error", error.message, error.cure)]
    found = environment.versions()
    driver = nvml.driver_version()
    gpu = concrete.startswith("cuda")
    findings += [
        check_python(sys.version_info[:2]),
        check_torch(found["torch"], found.get("cuda"), nvml.count(), device),
    ]
    if nvml.count() and found.get("cuda"):
        findings.append(check_driver(found["cuda"], driver, sys.platform))
    if gpu and torch.cuda.is_available() and concrete.split(":")[-1].isdigit():
        findings += _diagnose_card(concrete)
    findings += [
        check_triton(found.get("triton"), gpu),
        check_compiler(_compiler()),
        check_python_headers(Path(sysconfig.get_paths()["include"]), gpu),
        *check_extras(found),
        check_shared_memory(_size_of(Path("/dev/shm"))),
        check_threads(host.usable_cores(), torch.get_num_threads(), host.cpu_quota()),
        check_disk(host.cache_folder(), _free_at(host.cache_folder())),
    ]
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if any finding is an error, else 0."""
    return int(any(finding.level == "error" for finding in findings))


def check_python(version: tuple[int, ...]) -> Finding:
    """Is Python new enough?"""
    text = ".".join(map(str, version))
    if tuple(version) < PYTHON_MINIMUM:
        return Finding("python", "error", f"Python {text} is too old.", f"Install Python {_dotted(PYTHON_MINIMUM)}+.")
    return Finding("python", "ok", f"Python {text}")


def check_torch(version: str, cuda: str | None, cards: int, wanted: str = "auto") -> Finding:
    """Is torch new enough, and built for the card that is there?

    Args:
        version: as torch gives it, ``2.13.0+cpu``.
        cuda: the CUDA that torch is built with, or None.
        cards: NVIDIA cards that the driver sees.
        wanted: the device that the user named.
    """
    if _version(version)[:2] < TORCH_MINIMUM:
        needed = _dotted(TORCH_MINIMUM)
        return Finding("torch", "error", f"torch {version} is too old.", f"pip install 'torch>={needed}'")
    if cards and cuda is None and wanted != "cpu":
        what = f"torch {version} is built without CUDA, so the NVIDIA card is not used."
        cure = "Install a CUDA build: https://pytorch.org/get-started/locally/"
        return Finding("torch", "error" if wanted.startswith("cuda") else "warning", what, cure)
    return Finding("torch", "ok", f"torch {version}" + (f" (CUDA {cuda})" if cuda else ""))


def check_driver(cuda: str, driver: str | None, platform: str = "linux") -> Finding:
    """Is the NVIDIA driver new enough for torch's CUDA?

    Args:
        cuda: ``torch.version.cuda``, ``13.0``.
        driver: ``580.65.06``, or None if it could not be read.
        platform: ``sys.platform``; the table knows Linux only.
    """
    need = compatibility().linux_drivers.get(cuda)
    if driver is None:
        return Finding("driver", "warning", "the NVIDIA driver's version cannot be read.", "Try nvidia-smi.")
    if need is None or platform != "linux":
        what = f"driver {driver}; the oldest driver for CUDA {cuda} on {platform} is not in onecard's table."
        return Finding("driver", "note", what, f"See {compatibility().source}.")
    if _version(driver) < _version(need.minimum):
        what = f"driver {driver} is too old for CUDA {cuda}, which needs {need.minimum}."
        return Finding("driver", "error", what, f"Install driver {need.full}+, or a torch for an older CUDA.")
    if _version(driver) < _version(need.full):
        what = f"driver {driver} runs CUDA {cuda} with limits (no PTX, newest features absent)."
        return Finding("driver", "warning", what, f"Install driver {need.full}+; see {compatibility().source}.")
    return Finding("driver", "ok", f"driver {driver} for CUDA {cuda}")


def check_architecture(capability: str, architectures: Sequence[str]) -> Finding:
    """Has torch kernels for this card?

    Args:
        capability: of the card, ``9.0``.
        architectures: ``torch.cuda.get_arch_list()``: ``sm_90`` (binary), ``compute_90`` (PTX).
    """
    major, minor = map(int, capability.split("."))
    for name in architectures:
        kind, _, digits = name.partition("_")
        if not digits.isdigit():  # sm_90a and its like are additions to a plain sm_90
            continue
        built = divmod(int(digits), 10)
        # A binary runs on the same major capability from its minor upward; PTX on all that are newer.
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (
            kind == "compute" and built <= (major, minor)
        ):
            return Finding("architecture", "ok", f"compute capability {capability} is served by {name}")
    what = f"this torch has no kernels for compute capability {capability} (it has {', '.join(architectures)})."
    return Finding("architecture", "error", what, "Install a torch built for this card: https://pytorch.org")


def check_triton(version: str | None, gpu: bool) -> Finding:
    """Is Triton there, which torch.compile needs on a GPU?"""
    if version:
        return Finding("triton", "ok", f"triton {version}")
    if gpu:
        what = "triton is not installed: torch.compile and onecard's kernels cannot run on the GPU."
        return Finding("triton", "warning", what, "pip install triton")
    return Finding("triton", "ok", "triton is not needed on a CPU")


def check_compiler(path: str | None) -> Finding:
    """Is a C++ compiler there, which torch.compile on a CPU, AOTInductor and Triton's launcher need?"""
    if path:
        return Finding("compiler", "ok", f"C++ compiler {path}")
    what = "there is no C++ compiler: torch.compile on a CPU and AOTInductor cannot build."
    return Finding("compiler", "warning", what, "apt-get install g++ (or set CXX).")


def check_python_headers(include: Path, gpu: bool) -> Finding:
    """Are Python's C headers there, which Triton's launcher and inductor's C++ wrapper include?"""
    if (include / "Python.h").is_file():
        return Finding("headers", "ok", f"Python headers in {include}")
    what = f"Python.h is not in {include}: torch.compile cannot build {'its launchers' if gpu else 'its wrapper'}."
    return Finding("headers", "warning", what, "apt-get install python3-dev (for the Python that runs onecard).")


def check_extras(found: Mapping[str, str]) -> list[Finding]:
    """Which optional engines are there?

    Args:
        found: package to version, of :func:`onecard.environment.versions`.
    """
    result = []
    for extra, packages in EXTRAS.items():
        present = [f"{name} {found[name]}" for name in packages if name in found]
        if present:
            result.append(Finding(extra, "ok", ", ".join(present)))
        else:
            what = f"{' and '.join(packages[:1] if extra == 'onnxruntime' else packages)}: not installed."
            result.append(Finding(extra, "note", what, f"pip install 'onecard[{extra}]'"))
    return result


def check_shared_memory(size_bytes: int | None) -> Finding:
    """Is /dev/shm large enough for a server's request slots? Containers get 64 MiB unless told otherwise."""
    if size_bytes is None:
        return Finding("shared memory", "note", "there is no /dev/shm here; serving uses files instead.")
    if size_bytes < SHARED_MEMORY_MINIMUM:
        what = f"/dev/shm is {_mib(size_bytes)}; serving wants {_mib(SHARED_MEMORY_MINIMUM)} or more."
        return Finding(
            "shared memory", "warning", what, "docker run --shm-size=1g (Kubernetes: an emptyDir in Memory)."
        )
    return Finding("shared memory", "ok", f"/dev/shm is {_mib(size_bytes)}")


def check_threads(cores: int, threads: int, quota: float | None) -> Finding:
    """Does torch use as many threads as it has cores?

    Args:
        cores: that the process may use.
        threads: torch's intra-op threads.
        quota: cores' worth of time that the control group grants, or None.
    """
    limit = f" (the control group grants {quota:g})" if quota is not None else ""
    if threads > cores:
        what = f"torch uses {threads} threads on {cores} usable cores{limit}: they wait for each other."
        return Finding("threads", "warning", what, f"export OMP_NUM_THREADS={cores}")
    return Finding("threads", "ok", f"{threads} threads on {cores} usable cores{limit}")


def check_disk(folder: Path, free_bytes: int | None) -> Finding:
    """Is there room for compile caches and bundles?"""
    cure = "Free some, or set ONECARD_CACHE to a folder on another disk."
    if free_bytes is None:
        return Finding("disk", "error", f"{folder} cannot be written.", "Set ONECARD_CACHE to a folder that can.")
    free = f"{free_bytes / 2**30:.1f} GiB free for {folder}"
    if free_bytes < DISK_MINIMUM:
        return Finding("disk", "error", f"only {free}.", cure)
    if free_bytes < DISK_COMFORTABLE:
        return Finding("disk", "warning", f"only {free}: a search with large models may fill it.", cure)
    return Finding("disk", "ok", free)


def check_card(readable: bool, state: CardState) -> Finding:
    """Can the card's sensors be read, and does it run freely now?

    Args:
        readable: whether NVML answers for this card.
        state: one reading.
    """
    if not readable:
        what = "NVML cannot be read: heat and throttling will not be seen in the measurements."
        return Finding("card", "warning", what, "In a container, pass NVIDIA_DRIVER_CAPABILITIES=compute,utility.")
    clock = "unknown" if state.sm_clock_mhz is None else f"{state.sm_clock_mhz:.0f} MHz"
    heat = "unknown" if state.temperature_c is None else f"{state.temperature_c:.0f} °C"
    reading = f"SM clock {clock}, temperature {heat}"
    if card.is_throttled(state):
        what = f"the card is throttled now by {', '.join(state.throttle)} ({reading})."
        return Finding("card", "warning", what, "Let it cool, check fans and power supply, stop other work on it.")
    return Finding("card", "ok", reading)


def _diagnose_card(device: str) -> list[Finding]:
    """The findings about one GPU; NVML answers without CUDA being started, wherever it is sure of the card."""
    import torch

    index = int(device.rpartition(":")[2])
    known = nvml.facts(index)
    capability = known.compute_capability if known else "{}.{}".format(*torch.cuda.get_device_capability(index))
    lib, handle = nvml.library(), nvml.handle_by_order(index)
    if lib is None or handle is None:
        sampler = card.CardSampler(device)
        readable, state = sampler.readable, sampler.read()
    else:
        readable, state = True, card.read_gpu(lib, handle)
    return [check_architecture(capability, torch.cuda.get_arch_list()), check_card(readable, state)]


def _compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)


def _size_of(folder: Path) -> int | None:
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def _free_at(folder: Path) -> int | None:
    """Bytes free where a folder is, or will be made; None if it cannot be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free if folder.is_dir() and os.access(folder, os.W_OK) else None


def _version(text: str) -> tuple[int, ...]:
    """The numbers of a version before any suffix: ``2.13.0+cpu`` is (2, 13, 0)."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
