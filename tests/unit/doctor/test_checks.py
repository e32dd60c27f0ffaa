"""Every fault is shown to the doctor, who finds that one thing and its cure; a sound machine is silent."""

from __future__ import annotations

import pytest

from onecard.doctor import Facts, Finding, examine, exit_code
from onecard.doctor.examine import CHECKS
from onecard.doctor.facts import COMPUTE_EXCLUSIVE, COMPUTE_PROHIBITED, Compilers, Driver, Memory, Processor, Torch
from onecard.evidence import CardState
from tests.unit.doctor.machines import (
    GIB,
    H200,
    ON_A_CARD,
    ON_A_CPU,
    trouble,
    with_,
    with_card,
    with_packages,
)

MIG_UUID = "MIG-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
OTHER_MIG = "MIG-ffffffff-bbbb-cccc-dddd-eeeeeeeeeeee"


def no_device(facts: Facts) -> Facts:
    return with_(facts, no_device=("there is no device 'cuda' here.", "Pass 'auto'."), device="cuda", wanted="cuda")


def processor(facts: Facts, **changes: object) -> Facts:
    return with_(facts, "processor", **changes)


FAULTS: dict[str, tuple[Facts, str, str, str, str]] = {
    # name: facts, area, level, words of what was found, words of the cure
    "no such device": (no_device(ON_A_CPU), "device", "error", "no device 'cuda'", "pass --device cpu"),
    "no such card": (
        with_(ON_A_CARD, no_device=("there is no device 'cuda:3' here.", "Pass 'auto'."), wanted="cuda:3"),
        *("device", "error", "no device 'cuda:3'", "Pass 'auto'"),
    ),
    "CUDA does not start": (
        with_(ON_A_CARD, "software.torch", usable=False, complaint="CUDA unknown error"),
        *("device", "error", "CUDA unknown error", "nvidia-smi"),
    ),
    "old Python": (with_(ON_A_CPU, "software", python=(3, 9)), "python", "error", "3.9", "Python 3.10"),
    "Python that this torch has no wheel for": (
        with_(with_packages(ON_A_CPU, torchvision=None), "software", python=(3, 16)),
        *("python", "warning", "3.10 to 3.15", "Use Python 3.15"),
    ),
    "torch broken": (
        with_(ON_A_CPU, "software", torch=Torch(broken="OSError: libgomp.so.1: cannot open")),
        *("torch", "error", "libgomp", "pip install --force-reinstall"),
    ),
    "old torch": (
        with_(with_packages(ON_A_CPU, torchvision=None, torchao=None), "software.torch", version="2.10.1+cpu"),
        *("torch", "error", "too old", "pip install 'torch>=2.11'"),
    ),
    "unknown torch": (
        with_(with_packages(ON_A_CPU, torchvision=None), "software.torch", version="2.19.0+cpu"),
        *("torch", "note", "not in onecard's table", "pip install -U onecard"),
    ),
    "CPU build beside a card": (
        with_(ON_A_CPU, driver=ON_A_CARD.driver),
        *("torch", "warning", "built without CUDA", "--index-url https://download.pytorch.org/whl/cu130"),
    ),
    "CPU build where a card is asked for": (
        with_(ON_A_CPU, driver=ON_A_CARD.driver, device="cuda:0", wanted="cuda:0"),
        *("torch", "error", "built without CUDA", "--index-url"),
    ),
    "driver and libraries of two versions": (
        with_(ON_A_CPU, driver=Driver(error=18, module="580.95.05", on_bus=1)),
        *("driver", "warning", "NVML error 18", "sudo reboot"),
    ),
    "the same where a card is asked for": (
        no_device(with_(ON_A_CPU, driver=Driver(error=18, module="580.95.05", on_bus=1))),
        *("driver", "error", "(580.95.05)", "sudo reboot"),
    ),
    "card without driver": (
        with_(ON_A_CPU, driver=Driver(error=12, on_bus=1)),
        *("driver", "warning", "no driver library", "docker run --gpus all"),
    ),
    "module not loaded": (
        with_(ON_A_CPU, driver=Driver(error=9, on_bus=1)),
        *("driver", "warning", "not loaded", "sudo modprobe nvidia"),
    ),
    "NVML error of another number": (
        with_(ON_A_CPU, driver=Driver(error=999, on_bus=1)),
        *("driver", "warning", "error 999", "nvidia-smi"),
    ),
    "old driver": (
        with_(ON_A_CARD, "driver", version="575.57.08"),
        *("driver", "error", "too old for CUDA 13.0, which needs 580.65.06", "Install driver 580.65.06"),
    ),
    "driver one patch too old": (
        with_(ON_A_CARD, "driver", version="580.65"),
        *("driver", "error", "too old", "580.65.06"),
    ),
    "driver older than CUDA's own": (
        with_(with_(ON_A_CARD, "software.torch", cuda="13.2"), "driver", version="580.95.05"),
        *("driver", "note", "older than CUDA 13.2's own, 595.45.04", "Install driver 595.45.04"),
    ),
    "CUDA that the table does not know": (
        with_(ON_A_CARD, "software.torch", cuda="13.9"),
        *("driver", "note", "not in onecard's table", "https://docs.nvidia.com/"),
    ),
    "Windows is not judged by Linux numbers": (
        with_(with_(ON_A_CARD, "driver", version="576.02"), "software", system="win32"),
        *("driver", "note", "on win32 is not in", "https://docs.nvidia.com/"),
    ),
    "driver without a version": (
        with_(ON_A_CARD, "driver", version=None),
        *("driver", "warning", "cannot be read", "nvidia-smi"),
    ),
    "every card hidden": (
        with_(with_(ON_A_CARD, "driver", visible="", chosen=None), device="cpu"),
        *("visible cards", "warning", "hides every card", "unset CUDA_VISIBLE_DEVICES"),
    ),
    "a card that is not there is named": (
        with_(with_(ON_A_CARD, "driver", visible="3"), wanted="cuda:0"),
        *("visible cards", "error", "names '3', which is not there (there are: 0)", "export CUDA_VISIBLE_DEVICES=0"),
    ),
    "a card named twice": (
        with_(ON_A_CARD, "driver", visible="0,0"),
        *("visible cards", "warning", "twice", "once"),
    ),
    "MIG without an instance": (
        with_card(mig=True),
        *("mig", "error", "has no partition", "sudo nvidia-smi -i 0 -mig 0"),
    ),
    "MIG and none chosen": (
        with_card(mig=True, partitions=(MIG_UUID, OTHER_MIG)),
        *("mig", "note", "2 partitions", f"export CUDA_VISIBLE_DEVICES={MIG_UUID}"),
    ),
    "torch without this card's kernels": (
        with_card(compute_capability="7.0", name="Tesla V100"),
        *("architecture", "error", "compute capability 7.0", "https://download.pytorch.org/whl/cu126"),
    ),
    "no build of torch has this card's kernels": (
        with_card(compute_capability="3.7", name="Tesla K80"),
        *("architecture", "error", "3.7", "TORCH_CUDA_ARCH_LIST=3.7"),
    ),
    "memory errors": (with_card(uncorrected=2), "ecc", "warning", "2 memory errors", "sudo nvidia-smi -i 0 -r"),
    "broken row": (with_card(remap_failed=True), "ecc", "error", "broken row", "replaced"),
    "row to be replaced": (with_card(remap_pending=True), "ecc", "warning", "waits for a reset", "nvidia-smi -i 0 -r"),
    "no error correction": (with_card(ecc=False), "ecc", "note", "switched off", "sudo nvidia-smi -i 0 -e 1"),
    "prohibited": (
        with_card(compute_mode=COMPUTE_PROHIBITED),
        *("compute mode", "error", "PROHIBITED", "sudo nvidia-smi -i 0 -c DEFAULT"),
    ),
    "exclusive": (
        with_card(compute_mode=COMPUTE_EXCLUSIVE),
        *("compute mode", "warning", "EXCLUSIVE_PROCESS", "-c DEFAULT"),
    ),
    "no persistence": (with_card(persistence=False), "persistence", "note", "off", "sudo nvidia-smi -i 0 -pm 1"),
    "less power": (with_card(power_limit_w=350.0), "power limit", "note", "350 W", "sudo nvidia-smi -i 0 -pl 700"),
    "lower clock": (with_card(clock_limit_mhz=990), "clock limit", "note", "990 MHz", "sudo nvidia-smi -i 0 -rac"),
    "throttled": (
        with_card(state=CardState(temperature_c=90, sm_clock_mhz=600, throttle=("hw_thermal",))),
        *("card", "warning", "throttled now by hw_thermal", "nvidia-smi -i 0 -q -d PERFORMANCE"),
    ),
    "busy": (with_card(state=CardState(utilisation=0.97)), "card", "warning", "97%", "nvidia-smi -i 0 shows who"),
    "card that cannot be read": (
        with_(ON_A_CARD, "driver", chosen=None),
        *("card", "warning", "NVML cannot be read for cuda:0", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
    ),
    "no Triton": (
        with_packages(ON_A_CARD, triton=None),
        *("triton", "warning", "not installed", "pip install 'triton>=3.7,<3.8'"),
    ),
    "wrong Triton": (
        with_packages(ON_A_CARD, triton="3.4.0"),
        *("versions", "warning", "goes with triton >=3.7,<3.8, not with 3.4.0", "pip install 'triton>=3.7,<3.8'"),
    ),
    "no compiler": (
        with_(ON_A_CPU, "software", compilers=Compilers(None, None, headers=True)),
        *("compiler", "warning", "no C++ compiler", "apt-get install -y g++"),
    ),
    "compiler that is too old": (
        with_(ON_A_CPU, "software.compilers", complaint="g++: error: unrecognized option '-std=c++20'"),
        *("compiler", "warning", "cannot build C++20 with OpenMP: g++: error", "apt-get install -y g++"),
    ),
    "no C compiler for Triton": (
        with_(ON_A_CARD, "software.compilers", cc=None),
        *("compiler", "warning", "no C compiler", "apt-get install -y gcc"),
    ),
    "no headers": (
        with_(ON_A_CPU, "software.compilers", headers=False),
        *("headers", "warning", "Python.h is not in /usr/include/python3.12", "apt-get install -y python3.12-dev"),
    ),
    "both ONNX Runtimes": (
        with_packages(ON_A_CARD, onnxruntime="1.32.0"),
        *("onnxruntime", "warning", "both installed", "pip install 'onecard[onnxruntime-gpu]'"),
    ),
    "ONNX Runtime without CUDA": (
        with_packages(ON_A_CARD, onnxruntime_gpu=None, onnxruntime="1.32.0"),
        *("onnxruntime", "note", "the build without CUDA", "pip uninstall -y onnxruntime onnxruntime-gpu"),
    ),
    "ONNX Runtime for another CUDA": (
        with_packages(ON_A_CARD, onnxruntime_gpu="1.23.2"),
        *("versions", "warning", "goes with cuda >=12,<13, not with 13.0", "pip install 'onnxruntime-gpu>=1.27'"),
    ),
    "Torch-TensorRT for another torch": (
        with_packages(ON_A_CARD, torch_tensorrt="2.12.1", tensorrt="10.16.1.11"),
        *("versions", "warning", "goes with torch >=2.12,<2.13", "pip install 'torch-tensorrt>=2.13,<2.14'"),
    ),
    "TensorRT for another Torch-TensorRT": (
        with_packages(ON_A_CARD, tensorrt="10.16.1.11"),
        *("versions", "warning", "goes with tensorrt >=11.0,<11.1", "pip install 'tensorrt>=11.0,<11.1'"),
    ),
    "torchao for another torch": (
        with_packages(ON_A_CPU, torchao="0.16.0"),
        *("versions", "warning", "goes with torch >=2.8,<2.11", "pip install 'torchao>=0.17'"),
    ),
    "ExecuTorch for another torchao": (
        with_packages(ON_A_CPU, executorch="1.5.1", torchao="0.17.0"),
        *("versions", "warning", "goes with torchao >=0.18,<0.19", "pip install 'torchao>=0.18,<0.19'"),
    ),
    "torchvision for another torch": (
        with_packages(ON_A_CPU, torchvision="0.26.0"),
        *("versions", "warning", "goes with torch >=2.11,<2.12", "pip install 'torchvision>=0.28,<0.29'"),
    ),
    "NumPy too new for NNCF": (
        with_packages(ON_A_CPU, numpy="2.5.1"),
        *("versions", "warning", "nncf 3.4.0 goes with numpy", "pip install 'numpy>=1.24,<2.5'"),
    ),
    "no OpenVINO": (
        with_packages(ON_A_CPU, openvino=None),
        *("openvino", "note", "not installed: openvino", "pip install 'onecard[openvino]'"),
    ),
    "half a vision": (
        with_packages(ON_A_CPU, timm=None),
        *("vision", "note", "not installed: timm", "pip install 'onecard[vision]'"),
    ),
    "no ONNX Runtime on a card": (
        with_packages(ON_A_CARD, onnxruntime_gpu=None),
        *("onnxruntime", "note", "not installed", "pip install 'onecard[onnxruntime-gpu]'"),
    ),
    "half a core and 64 threads": (
        with_(processor(ON_A_CPU, cores=1, quota=0.5), "software.torch", threads=64),
        *("threads", "warning", "64 threads on 1 usable cores (the control group grants 0.5)", "OMP_NUM_THREADS=1"),
    ),
    "half a core and one thread": (
        with_(processor(ON_A_CPU, cores=1, quota=0.5), "software.torch", threads=1),
        *("threads", "warning", "grants 0.5 cores", "docker run --cpus=2"),
    ),
    "one thread on many cores": (
        with_(processor(ON_A_CPU, omp_threads="1"), "software.torch", threads=1),
        *("threads", "note", "1 of 8 usable cores", "unset OMP_NUM_THREADS"),
    ),
    "powersave": (
        processor(ON_A_CPU, scaling_driver="acpi-cpufreq", energy_preferences=()),
        *("clocks", "warning", "'powersave'", "echo performance | sudo tee"),
    ),
    "told to save power": (
        processor(ON_A_CPU, energy_preferences=("balance_power",)),
        *("clocks", "warning", "'balance_power'", "echo performance | sudo tee"),
    ),
    "little memory in a container": (
        with_(ON_A_CPU, "memory", usable_bytes=2 * GIB, limited=True),
        *("memory", "warning", "control group lets this process have 2.0 GiB", "docker run --memory=8g"),
    ),
    "little memory": (
        with_(ON_A_CPU, "memory", usable_bytes=2 * GIB),
        *("memory", "warning", "this machine has 2.0 GiB", "Add memory"),
    ),
    "no memory free": (
        with_(ON_A_CPU, "memory", available_bytes=GIB),
        *("memory", "warning", "only 1.0 GiB", "ps aux --sort=-rss"),
    ),
    "memory in swap": (
        with_(ON_A_CPU, "memory", swap_used_bytes=20 * GIB),
        *("swap", "warning", "20.0 GiB of memory lie in swap", "sudo swapoff -a"),
    ),
    "tiny shared memory": (
        with_(ON_A_CPU, "memory", shared_bytes=64 * 2**20),
        *("shared memory", "warning", "/dev/shm is 64 MiB", "docker run --shm-size=1g"),
    ),
    "no shared memory": (
        with_(ON_A_CPU, "memory", shared_bytes=None),
        *("shared memory", "note", "no /dev/shm", "mount -t tmpfs"),
    ),
    "little memory may be locked": (
        with_(ON_A_CARD, "memory", locked_bytes=64 * 1024),
        *("locked memory", "note", "lock 64 KiB", "ulimit -l unlimited"),
    ),
    "few open files": (with_(ON_A_CPU, open_files=1024), "open files", "note", "1024 files", "ulimit -n 65536"),
    "folder that cannot be written": (
        with_(ON_A_CPU, cache_free_bytes=None),
        *("disk", "error", "cannot be written", "export ONECARD_CACHE"),
    ),
    "full disk": (with_(ON_A_CPU, cache_free_bytes=GIB), "disk", "error", "only 1.0 GiB", "export ONECARD_CACHE"),
    "nearly full disk": (with_(ON_A_CPU, cache_free_bytes=5 * GIB), "disk", "warning", "only 5.0 GiB", "ONECARD_CACHE"),
}


@pytest.mark.parametrize("facts", [ON_A_CPU, ON_A_CARD], ids=["on a CPU", "on a card"])
def test_a_sound_machine_is_silent(facts: Facts) -> None:
    assert [finding for finding in examine(facts) if finding.level != "ok"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_with_its_cure(fault: str) -> None:
    facts, area, level, what, cure = FAULTS[fault]
    findings = [finding for finding in examine(facts) if finding.area == area and finding.level != "ok"]
    assert [(finding.level, what in finding.what, cure in finding.cure) for finding in findings] == [
        (level, True, True)
    ], findings
    assert findings[0].why


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_raises_or_is_without_a_cure(fault: str) -> None:
    findings = examine(FAULTS[fault][0])
    assert not [finding for finding in findings if "could not be checked" in finding.what]
    assert all(finding.cure and finding.why for finding in findings if finding.level != "ok")
    assert exit_code(findings) == int(any(finding.level == "error" for finding in findings))


SPREADING = {"no such device", "the same where a card is asked for", "CPU build where a card is asked for"}
"""Faults of a machine without a card, asked for one: that Triton is missing too is said as well."""


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - SPREADING))
def test_a_fault_alarms_no_other_check(fault: str) -> None:
    facts, area, *_ = FAULTS[fault]
    assert [finding for finding in trouble(examine(facts)) if finding.area != area] == []


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ("9.0", ("sm_80", "sm_90"), "sm_90"),
        ("8.9", ("sm_80", "sm_86", "sm_90"), "sm_80"),
        ("9.0", ("sm_80", "sm_90a"), ""),
        ("8.0", ("sm_86",), ""),
        ("12.0", ("sm_90", "sm_100"), ""),
        ("12.0", ("sm_90", "compute_90"), "compute_90"),
        ("7.0", ("sm_75", "compute_75"), ""),
        ("12.1", ("sm_120",), "sm_120"),
    ],
)
def test_which_architecture_serves_a_card(capability: str, architectures: tuple[str, ...], served: str) -> None:
    from onecard.doctor.check_software import serving

    assert serving(capability, architectures) == served


@pytest.mark.parametrize(
    "visible", ["0", H200.uuid, H200.uuid[:12], MIG_UUID, f"{MIG_UUID},{OTHER_MIG}"], ids=lambda text: text[:8]
)
def test_cards_that_are_named_rightly(visible: str) -> None:
    mig = visible.startswith("MIG")
    facts = with_card(mig=mig, partitions=(MIG_UUID, OTHER_MIG) if mig else ())
    assert trouble(examine(with_(facts, "driver", visible=visible))) == []


def test_the_processor_that_is_wanted_hears_nothing_of_the_card() -> None:
    driver = Driver(error=18, module="580.95.05", on_bus=1)
    assert trouble(examine(with_(ON_A_CPU, wanted="cpu", driver=driver))) == []
    hidden = with_(ON_A_CPU, wanted="cpu", driver=with_(ON_A_CARD, "driver", visible="7").driver)
    assert trouble(examine(hidden)) == []


def test_without_torchs_facts_the_rest_is_checked() -> None:
    facts = with_(with_(ON_A_CPU, "software", torch=None), "memory", shared_bytes=0)
    assert [finding.area for finding in trouble(examine(facts))] == ["shared memory"]


def test_threads_without_torch_come_from_the_environment() -> None:
    facts = with_(ON_A_CPU, "software", torch=None)
    found = trouble(examine(processor(facts, omp_threads="32,2")))
    assert [(finding.area, finding.cure) for finding in found] == [("threads", "export OMP_NUM_THREADS=8")]


def test_a_check_that_raises_is_a_finding() -> None:
    def faints(facts: Facts) -> list[Finding]:
        raise KeyError("nobody thought of this")

    found = examine(ON_A_CPU, {"python": CHECKS["python"], "nerves": faints, "disk": CHECKS["disk"]})
    assert [finding.area for finding in found] == ["python", "nerves", "disk"]
    assert found[1].level == "warning"
    assert "could not be checked: KeyError: 'nobody thought of this'" in found[1].what
    assert "--json" in found[1].cure


def test_what_could_not_be_found_out_is_a_finding() -> None:
    found = trouble(examine(with_(ON_A_CPU, unknown={"memory": "ValueError: odd"})))
    assert [finding.what for finding in found] == ["could not be looked at: ValueError: odd"]


def test_facts_of_a_part_that_failed_alarm_nobody_else() -> None:
    facts = with_(ON_A_CPU, memory=Memory(usable_bytes=0, shared_bytes=GIB), processor=Processor(cores=8))
    assert trouble(examine(facts)) == []


def test_exit_code() -> None:
    ok, note, warning, error = (Finding("a", level, "") for level in ("ok", "note", "warning", "error"))
    assert exit_code([]) == exit_code([ok, note, warning]) == 0
    assert exit_code([ok, error]) == 1
    assert exit_code([ok, note], strict=True) == 0
    assert exit_code([ok, warning], strict=True) == 1
