"""Finding out the facts of this machine. torch is imported only if its facts are asked for, and no CUDA is started.

Where a part cannot be found out the visit goes on: what failed stands in :attr:`Facts.unknown`.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from onecard import environment, host
from onecard.doctor.compatibility import compatibility
from onecard.doctor.facts import Compilers, Driver, Facts, Memory, Processor, Software, Torch
from onecard.doctor.gather_card import read_driver
from onecard.errors import UsageError

T = TypeVar("T")

PACKAGES = {
    **environment.PACKAGES,
    "torchao": ("torchao",),
    "executorch": ("executorch",),
    "nncf": ("nncf",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "torch_pruning": ("torch-pruning",),
    "uvloop": ("uvloop",),
    "grpcio": ("grpcio",),
    "protobuf": ("protobuf",),
}
"""The packages that are looked at, each with the distributions that may carry it."""

_TRIAL = """#include <cmath>
#include <vector>
#include <omp.h>
extern "C" int trial(void) { return omp_get_max_threads() + (int)std::vector<double>{std::sqrt(2.0)}.size(); }
"""
_TRIAL_LIMIT_S = 30.0
_KIB = 1024


def gather(device: str = "auto", *, with_torch: bool = True, root: Path = host.ROOT) -> Facts:
    """Look at this machine.

    Args:
        device: as :func:`onecard.environment.resolve_device` takes it.
        with_torch: import torch and ask it. Without, ``auto`` is the CPU and any ``cuda:N`` is taken as it is.
        root: of the file system with /proc and /sys, so that another machine's files can be read too.
    """
    unknown: dict[str, str] = {}

    def part(name: str, look: Callable[[], T], otherwise: T) -> T:
        try:
            return look()
        except Exception as error:  # one thing that cannot be found out must not hide the others
            unknown[name] = f"{type(error).__name__}: {error}"
            return otherwise

    torch = part("torch", _torch, Torch()) if with_torch else None
    unresolved: tuple[str, tuple[str, str] | None] = (device, None)
    concrete, no_device = part("device", lambda: _resolve(device, torch), unresolved)
    cpp = _standard(torch)
    cache = part("cache", host.cache_folder, Path.home())
    return Facts(
        wanted=device,
        device=concrete,
        no_device=no_device,
        software=Software(
            python=sys.version_info[:2],
            system=sys.platform,
            machine=platform.machine(),
            packages=part("packages", _packages, {}),
            torch=torch,
            compilers=part("compilers", lambda: _compilers(cpp), Compilers(cpp=cpp)),
        ),
        processor=part("processor", lambda: _processor(root), Processor(cores=1)),
        memory=part("memory", lambda: _memory(root), Memory(usable_bytes=0)),
        driver=part("driver", lambda: read_driver(concrete, bool(torch and torch.usable), root), Driver()),
        open_files=part("open files", lambda: _limit("RLIMIT_NOFILE"), None),
        cache=str(cache),
        cache_free_bytes=part("disk", lambda: free_at(cache), None),
        unknown=unknown,
    )


def free_at(folder: Path) -> int | None:
    """Bytes free where a folder is, or will be made; None if it cannot be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free if folder.is_dir() and os.access(folder, os.W_OK) else None


def _torch() -> Torch:
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways: a missing library, a wrong NumPy
        return Torch(broken=f"{type(error).__name__}: {str(error).strip()}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    cudnn = environment.versions().get("cudnn")
    return Torch(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        cudnn=_cudnn(int(cudnn)) if cudnn else None,
        architectures=tuple(torch.cuda.get_arch_list()),
        usable=usable,
        complaint=str(said[-1].message).strip() if said and not usable else "",
        threads=torch.get_num_threads(),
    )


def _cudnn(number: int) -> str:
    """The version that cuDNN writes as one number: 91900 is 9.19.0."""
    return f"{number // 10_000}.{number % 10_000 // 100}.{number % 100}"


def _standard(torch: Torch | None) -> int:
    """The C++ standard of what torch generates; the newest one for a torch that the table does not know."""
    row = compatibility().release(torch.version) if torch else None
    return row.cpp if row else max(release.cpp for release in compatibility().torch.values())


def _resolve(device: str, torch: Torch | None) -> tuple[str, tuple[str, str] | None]:
    if torch is None or torch.broken:
        return ("cpu" if device == "auto" else device), None
    try:
        return environment.resolve_device(device), None
    except UsageError as error:
        return device, (error.message, error.cure)


def _packages() -> dict[str, str]:
    found = {}
    for name, distributions in PACKAGES.items():
        version = next(filter(None, map(environment.installed_version, distributions)), None)
        if version:
            found[name] = version
    return found


def _compilers(cpp: int) -> Compilers:
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = [*chosen[:1], "g++", "clang++", "c++"]
    cxx = next((path for name in names if (path := shutil.which(name))), None)
    own = [name for name in shlex.split(os.environ.get("CC", ""))[:1] if name]
    cc = next((path for name in [*own, "gcc", "clang", "cc"] if (path := shutil.which(name))), None)
    include = sysconfig.get_paths()["include"]
    complaint = _trial([cxx, *(chosen[1:] if chosen and shutil.which(chosen[0]) == cxx else [])], cpp) if cxx else None
    return Compilers(cxx, cc, cpp, complaint, (Path(include) / "Python.h").is_file(), include)


def _trial(compiler: list[str], cpp: int) -> str:
    """Build a few lines as torch would, and give the compiler's complaint, or nothing."""
    with tempfile.TemporaryDirectory(prefix="onecard-doctor-") as folder:
        flags = [
            f"-std=c++{cpp}",
            "-fopenmp",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            "-",
            "-o",
            str(Path(folder) / "trial.so"),
        ]
        try:
            done = subprocess.run(
                [*compiler, *flags], input=_TRIAL, capture_output=True, text=True, timeout=_TRIAL_LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else f"ended with {done.returncode}")


def _processor(root: Path) -> Processor:
    cores = root / "sys/devices/system/cpu"
    return Processor(
        cores=host.usable_cores(root),
        quota=host.cpu_quota(root),
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        governors=_each(cores, "cpu[0-9]*/cpufreq/scaling_governor"),
        scaling_driver=next(iter(_each(cores, "cpu[0-9]*/cpufreq/scaling_driver")), None),
        energy_preferences=_each(cores, "cpu[0-9]*/cpufreq/energy_performance_preference"),
    )


def _each(folder: Path, pattern: str) -> tuple[str, ...]:
    """What stands in the files of a pattern, each once."""
    return tuple(sorted({text for path in folder.glob(pattern) if (text := _text(path))}))


def _memory(root: Path) -> Memory:
    amounts = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        amounts[name] = int(rest.split()[0]) * _KIB
    usable = host.usable_memory(root)
    shared = root / "dev/shm"
    return Memory(
        usable_bytes=usable,
        available_bytes=amounts.get("MemAvailable"),
        swap_used_bytes=amounts.get("SwapTotal", 0) - amounts.get("SwapFree", 0),
        shared_bytes=shutil.disk_usage(shared).total if shared.is_dir() else None,
        locked_bytes=_limit("RLIMIT_MEMLOCK"),
        limited=usable < amounts.get("MemTotal", usable),
    )


def _limit(name: str) -> int | None:
    """A limit of this process (the soft one), or None where there is none."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else int(soft)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
