"""Facts from this machine, from another machine's files, and from cards that are played by a library of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard.doctor import examine, gather
from onecard.doctor.gather import free_at
from onecard.doctor.gather_card import cards_on_bus, module_version, read_cards, start_error

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_this_machine() -> None:
    facts = gather()
    assert facts.unknown == {}
    assert facts.no_device is None
    assert facts.software.python == sys.version_info[:2]
    assert facts.software.torch is not None
    assert facts.software.torch.version == torch.__version__
    assert facts.software.torch.threads == torch.get_num_threads()
    assert {"numpy", "openvino"} <= set(facts.software.packages)
    assert facts.processor.cores >= 1
    assert facts.memory.usable_bytes > GIB // 2
    assert {"python", "torch", "disk", "threads"} <= {finding.area for finding in examine(facts)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is usable here")
def test_a_card_that_is_not_here() -> None:
    facts = gather("cuda")
    assert facts.no_device is not None
    assert "cpu" in facts.no_device[0]
    first = examine(facts)[0]
    assert (first.area, first.level) == ("device", "error")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is usable here")
def test_the_card_that_is_here() -> None:
    facts = gather("cuda:0")
    assert facts.card is not None
    assert facts.card.compute_capability == "{}.{}".format(*torch.cuda.get_device_capability(0))
    areas = {finding.area: finding.level for finding in examine(facts)}
    assert areas["driver"] in ("ok", "note")
    assert areas["architecture"] == "ok"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is usable here")
def test_looking_starts_no_cuda() -> None:
    code = "import torch, onecard.doctor as d; d.visit('cuda:0'); assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_torch_is_imported_only_if_asked_for() -> None:
    code = (
        "import sys, onecard.doctor as d\n"
        "assert 'torch' not in sys.modules\n"
        "facts = d.gather(with_torch=False)\n"
        "d.examine(facts)\n"
        "assert facts.software.torch is None and facts.device == 'cpu' and not facts.unknown\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["no-such-bundle"]])
def test_a_torch_that_cannot_be_imported_is_a_finding(arguments: list[str], tmp_path: Path) -> None:
    write(tmp_path, {"torch/__init__.py": "raise ImportError('libcudart.so.13: cannot open shared object file')"})
    code = f"import sys\nfrom onecard.cli import app\nsys.exit(app(['doctor', *{arguments!r}], standalone_mode=False))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "libcudart.so.13" in done.stdout
    assert "pip install --force-reinstall" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_another_machines_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 1048576 kB\nSwapTotal: 8388608 kB\n"
            "SwapFree: 4194304 kB\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/memory.max": "536870912\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "acpi-cpufreq\n",
            "sys/devices/system/cpu/cpufreq/ondemand": "",
        },
    )
    facts = gather("cpu", root=tmp_path)
    assert facts.unknown == {}
    assert facts.memory.usable_bytes == 512 * 2**20
    assert facts.memory.limited
    assert facts.memory.available_bytes == GIB
    assert facts.memory.swap_used_bytes == 4 * GIB
    assert facts.memory.shared_bytes is None
    assert (facts.processor.cores, facts.processor.quota) == (1, 0.5)
    assert facts.processor.governors == ("powersave",)
    assert facts.processor.scaling_driver == "acpi-cpufreq"


def test_a_file_that_makes_no_sense_costs_its_own_part_alone(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: plenty\n"})
    facts = gather("cpu", root=tmp_path)
    assert list(facts.unknown) == ["memory"]
    assert facts.software.packages
    assert "could not be looked at" in examine(facts)[0].what


def test_the_driver_in_the_kernels_files(tmp_path: Path) -> None:
    for index, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]):
        write(
            tmp_path, {f"sys/bus/pci/devices/{index}/{n}": t + "\n" for n, t in (("vendor", vendor), ("class", kind))}
        )
    assert cards_on_bus(tmp_path) == 1  # not its sound device, and not Intel's
    assert module_version(tmp_path) is None
    for line in (
        "UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22",
        "UNIX Open Kernel Module for x86_64  550.54.14  Rel",
    ):
        write(tmp_path, {"proc/driver/nvidia/version": f"NVRM version: NVIDIA {line}\nGCC version: gcc 12.3.0\n"})
        assert module_version(tmp_path) == "550.54.14"


def test_nvmls_own_error_number() -> None:
    assert start_error() == (None if torch.cuda.is_available() else 12)  # 12: there is no library


class CardLibrary:
    """Two cards as NVML tells of them: one cut into partitions, and one that knows nothing of most questions."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.first: dict[str, Any] = {
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=141 * GIB),
            "nvmlDeviceGetMigMode": [1, 1],
            "nvmlDeviceGetMaxMigDeviceCount": 7,
            "nvmlDeviceGetPersistenceMode": 0,
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetTotalEccErrors": 3,
            "nvmlDeviceGetRemappedRows": (0, 1, 1, 0),
            "nvmlDeviceGetComputeMode": 3,
            "nvmlDeviceGetName": b"NVIDIA H200",
            "nvmlDeviceGetUUID": "GPU-1",
            "nvmlDeviceGetEnforcedPowerLimit": 350_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetTemperature": 41,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40,
        }

    def __getattr__(self, function: str) -> Any:
        if not function.startswith("nvml"):
            raise AttributeError(function)

        def answer(handle: Any = None, *arguments: Any) -> Any:
            if function == "nvmlDeviceGetCount":
                return 2
            if function == "nvmlDeviceGetHandleByIndex":
                return handle
            if function == "nvmlDeviceGetMigDeviceHandleByIndex" and arguments[0] < 2:
                return f"part {arguments[0]}"
            if function == "nvmlDeviceGetUUID" and isinstance(handle, str):
                return f"MIG-{handle[-1]}"
            if handle == 0 and function in self.first:
                return self.first[function]
            raise RuntimeError("Not Supported")

        return answer


def test_cards_as_their_library_tells_of_them() -> None:
    cut, plain = read_cards(CardLibrary())
    assert (cut.name, cut.uuid, cut.compute_capability, cut.memory_bytes) == ("NVIDIA H200", "GPU-1", "9.0", 141 * GIB)
    assert (cut.mig, cut.partitions) == (True, ("MIG-0", "MIG-1"))
    assert (cut.persistence, cut.compute_mode, cut.ecc, cut.uncorrected) == (False, 3, True, 3)
    assert (cut.remap_pending, cut.remap_failed) == (True, False)
    assert (cut.power_limit_w, cut.power_default_w) == (350.0, 700.0)
    assert (cut.state.temperature_c, cut.state.throttle) == (41.0, ("hw_thermal",))
    assert (plain.index, plain.name, plain.mig, plain.persistence, plain.ecc) == (1, "unknown", None, None, None)
    assert (plain.compute_mode, plain.power_limit_w, plain.uncorrected) == (0, None, None)


def test_a_compiler_from_cxx_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\necho \"my-c++: error: unrecognized option '$2'\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O2")
    tools = gather("cpu").software.compilers
    assert tools.cxx == str(compiler)
    assert tools.complaint == f"my-c++: error: unrecognized option '-std=c++{tools.cpp}'"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    assert gather("cpu").software.compilers.complaint == ""


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = gather("cpu").software.compilers
    assert (tools.cxx, tools.cc, tools.complaint) == (None, None, None)


def test_room_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert free_at(tmp_path / "not" / "yet")
    assert free_at(tmp_path / "file" / "below") is None
